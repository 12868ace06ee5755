"""Input and output: addresses, codecs, sources and sinks."""
