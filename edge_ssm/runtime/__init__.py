"""The streaming runtime: what happens to a sample between source and sink."""
