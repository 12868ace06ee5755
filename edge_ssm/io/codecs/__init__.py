"""Codecs: bytes to frames, one module per format."""
