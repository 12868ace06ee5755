"""Codecs: from bytes to frames, one module per format."""
