"""Who is compared. A step takes a sample (d_input,) float64 and returns the outputs (d_output,), from state zero on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from edge_ssm.model.network import Array
from peers.parts import Parts

Step = Callable[[Array], Array]
REQUIRES = {
    "NumPy": ("numpy",),
    "PyTorch eager": ("torch",),
    "TorchScript": ("torch",),
    "TorchScript, frozen": ("torch",),
    "TorchScript, real": ("torch",),
    "TorchScript, real, frozen": ("torch",),
    "ONNX Runtime": ("onnx", "onnxruntime"),
    "OpenVINO": ("onnx", "openvino"),
    "LiteRT": ("ai_edge_litert", "flatbuffers"),
    "LiteRT in place": ("ai_edge_litert", "flatbuffers"),
    "JAX": ("jax",),
    "edge-ssm on ONNX Runtime": ("onnx", "onnxruntime"),
    "edge-ssm on LiteRT": ("ai_edge_litert", "flatbuffers"),
}
ENGINES = {"edge-ssm on ONNX Runtime": "onnx", "edge-ssm on LiteRT": "tflite"}


def missing(name: str) -> list[str]:
    """Packages that an entry needs and that are not installed."""
    return [package for package in REQUIRES[name] if find_spec(package) is None]


def make(name: str, parts: Parts) -> Step:
    if name in ENGINES:
        from edge_ssm.engines.registry import create

        return create(ENGINES[name], parts.network).step
    if name == "NumPy" or name == "JAX":
        from peers import plain

        return plain.jax_step(parts) if name == "JAX" else plain.numpy_step(parts)
    if name in ("ONNX Runtime", "OpenVINO"):
        from peers import graph

        return graph.openvino_step(parts) if name == "OpenVINO" else graph.onnxruntime_step(parts)
    if name.startswith("LiteRT"):
        from peers import litert

        return litert.in_place(parts) if name == "LiteRT in place" else litert.as_called(parts)
    from peers import pytorch

    if name == "PyTorch eager":
        return pytorch.eager(parts)
    return pytorch.script(parts, real="real" in name, frozen="frozen" in name)
