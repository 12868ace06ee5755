"""A network's step as a graph of other runtimes' operators: ONNX and TFLite files. docs/exported.md describes them."""
