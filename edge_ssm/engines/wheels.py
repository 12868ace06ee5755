"""Which wheels of other projects' runtimes exist for a Python and a machine, for the message when one is missing.

Looked up on the package index in November 2026.
"""

from __future__ import annotations

import platform
import sys

MACHINES = ("x86_64", "aarch64")


def note(engine: str, python: tuple[int, int] | None = None, machine: str | None = None) -> str:
    """For the engines onnx and tflite, in words; empty for the others. By default for this Python and machine."""
    python, machine = python or sys.version_info[:2], machine or platform.machine()
    if engine not in ("onnx", "tflite"):
        return ""
    here = f"for Python {python[0]}.{python[1]} on {machine}"
    if machine not in MACHINES:
        return f"{here} there is no wheel; they are for {' and '.join(MACHINES)}"
    return f"{here}: {_onnx(python, machine) if engine == 'onnx' else _tflite(python)}"


def _onnx(python: tuple[int, int], machine: str) -> str:
    cpu = "onnxruntime up to 1.23.2" if python < (3, 11) else "onnxruntime"
    if machine == "x86_64":
        gpu = f"or onnxruntime-gpu{' up to 1.23.2' if python < (3, 11) else ''} for a GPU"
    elif python >= (3, 11):
        gpu = "or onnxruntime-gpu from 1.29 on for a GPU"
    else:
        gpu = "and no onnxruntime-gpu, which needs Python 3.11, or on JetPack 6 NVIDIA's own index"
    return f"{cpu}, {gpu}"


def _tflite(python: tuple[int, int]) -> str:
    older = (
        "or tflite-runtime 2.14, with numpy below 2" if python < (3, 12) else "no tflite-runtime, which ends at 3.11"
    )
    return f"ai-edge-litert, {older}"
