"""Engines that run an exported graph in ONNX Runtime or LiteRT."""
