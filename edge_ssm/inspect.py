"""What an artifact holds, for people and for programs."""

from __future__ import annotations

from typing import Any

from edge_ssm.artifact import Artifact
from edge_ssm.network import TokenEncoder, cost


def describe(artifact: Artifact) -> dict[str, Any]:
    """The artifact as plain values, ready for JSON. Bytes count float32; multiply-adds are real ones."""
    network = artifact.network
    total = cost(network)
    layers = [
        {
            "layer": i,
            "active": c.active,
            "bypassed": c.bypassed,
            "active_channels": block.ssm.active.tolist(),
            "d_state": 2 * c.pairs,
            "mixing": block.mixing.kind,
            "norm": block.norm.kind if block.norm else None,
            "parameters": c.parameters,
            "multiply_adds": c.multiply_adds,
        }
        for i, (block, c) in enumerate(zip(network.blocks, total.blocks, strict=True))
    ]
    return {
        "format_version": artifact.format_version,
        "digest": artifact.digest,
        "file_bytes": artifact.file_bytes,
        "task": network.task,
        "labels": list(network.labels),
        "input": {
            "channels": list(network.input.channels),
            "units": list(network.input.units),
            "mean": network.input.mean.tolist(),
            "std": network.input.std.tolist(),
            "sample_rate_hz": network.input.sample_rate_hz,
            "encoder": "token" if isinstance(network.encoder, TokenEncoder) else "linear",
        },
        "d_input": network.d_input,
        "d_model": network.d_model,
        "d_output": network.d_output,
        "discretization": network.discretization,
        "prenorm": network.prenorm,
        "pooling": network.pooling,
        "window": network.window,
        "layers": layers,
        "parameters": total.parameters,
        "bytes_per_step": 4 * (total.parameters + total.state_values),
        "state_bytes": 4 * total.state_values,
        "multiply_adds_per_step": total.multiply_adds,
        "provenance": artifact.provenance,
    }


def render(description: dict[str, Any]) -> str:
    """``describe``'s result as a page of text."""
    d = description
    rate = d["input"]["sample_rate_hz"]
    units = d["input"]["units"] or [""] * d["d_input"]
    channels = ", ".join(f"{c} [{u}]" if u else c for c, u in zip(d["input"]["channels"], units, strict=True))
    window = f"{d['window']} samples" + (f" ({d['window'] / rate:g} s at {rate:g} Hz)" if rate else "")
    norm = "before" if d["prenorm"] else "after"
    lines = [
        f"S4D network, {d['task']}: {d['d_input']} in, {len(d['layers'])} layers of {d['d_model']} channels, "
        f"{d['d_output']} out",
        f"  input       {channels}",
        f"  window      {window}, {d['pooling']} pooling",
        f"  labels      {', '.join(d['labels']) or '(none)'}",
        f"  form        {d['discretization']} discretization, norm {norm} the block",
        "",
        "  layer  active  bypassed  d_state  mixing  norm    parameters  multiply-adds a step",
    ]
    for row in d["layers"]:
        lines.append(
            f"  {row['layer']:>5}  {row['active']:>6}  {row['bypassed']:>8}  {row['d_state']:>7}  {row['mixing']:<6}  "
            f"{row['norm'] or 'none':<6}  {row['parameters']:>10,}  {row['multiply_adds']:>20,}"
        )
    lines += [
        f"  total  {sum(r['active'] for r in d['layers']):>6}  {sum(r['bypassed'] for r in d['layers']):>8}"
        f"{'':>27}  {d['parameters']:>10,}  {d['multiply_adds_per_step']:>20,}",
        "",
        f"  a step reads {d['bytes_per_step']:,} bytes (float32), of which state {d['state_bytes']:,}",
        f"  file        {d['file_bytes']:,} bytes, format {d['format_version']}, digest {d['digest'][:16]}...",
        "  provenance",
        *(f"    {line}" for line in _outline(d["provenance"])),
    ]
    return "\n".join(lines)


def _outline(value: Any, name: str = "") -> list[str]:
    """A JSON value as indented lines, one scalar a line."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = [line for key, item in items for line in _outline(item, str(key))]
        return [f"{name}:", *(f"  {line}" for line in nested)] if name else nested
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return [f"{name}: {text}"]
