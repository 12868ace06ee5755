"""Sinks: where decisions go, one module per medium."""
