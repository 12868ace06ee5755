"""A network's step as a graph of ONNX or TFLite operators. ``docs/exported.md`` describes the files."""
