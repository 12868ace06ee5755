"""Checkpoints of other projects, imported and verified."""
