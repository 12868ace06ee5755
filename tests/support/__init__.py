"""What tests share: networks, emulators of hardware and services, and the commands."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
