"""Input and output: sources deliver bytes, codecs turn bytes into frames, sinks deliver formatted decisions."""
