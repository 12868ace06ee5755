"""Descriptions of a model file, as plain values for programs and as text."""

from __future__ import annotations

from typing import Any

from edge_ssm.formats.artifact import Artifact
from edge_ssm.formats.loading import Model
from edge_ssm.model.cost import cost
from edge_ssm.model.network import TokenEncoder
from edge_ssm.text import sanitize


def describe(artifact: Artifact, signature: str | None = None) -> dict[str, Any]:
    """Describe an artifact as plain values that can be written as JSON.

    The numbers of multiply-adds count real operations. ``signature`` is the name of the signature file beside the
    artifact, which is not checked; None if there is none.
    """
    network = artifact.network
    total = cost(network)
    layers = [
        {
            "layer": i,
            "active": c.active,
            "bypassed": c.bypassed,
            "active_channels": block.ssm.active.tolist(),
            "d_state": 2 * int(block.ssm.pairs.max(initial=0)),
            "states": 2 * c.pairs,
            "channel_states": [2 * int(n) for n in block.ssm.pairs],
            "low_rank_channels": int(block.ssm.rank_one.sum()),
            "mixing": block.mixing.kind,
            "mixing_columns": c.columns,
            "mixing_rows": c.rows,
            "mixing_dtype": block.mixing.dtype,
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
        "signature": signature,
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
        "rounding_error": network.rounding_error,
        "layers": layers,
        "parameters": total.parameters,
        "weight_bytes": total.weight_bytes,
        "bytes_per_step": total.weight_bytes + 4 * total.state_values,
        "state_bytes": 4 * total.state_values,
        "multiply_adds_per_step": total.multiply_adds,
        "provenance": artifact.provenance,
    }


def describe_model(model: Model, signature: str | None = None) -> dict[str, Any]:
    """Describe a model file: its artifact and, for an exported file, its graph under ``graph``."""
    description = describe(model.artifact, signature)
    if model.exported is not None:
        graph, document = model.exported.graph, model.exported.document
        description["graph"] = {
            "kind": graph.kind,
            "digest": document.digest,
            "file_bytes": len(graph.content),
            "weights": graph.spec.weights,
            "chunk": graph.spec.chunk,
            "max_error": document.measured.max_error,
            "samples": document.measured.samples,
            "samples_from": document.measured.samples_from,
        }
    return description


def render(description: dict[str, Any]) -> str:
    """Return a description as a page of text."""
    d = description
    rate = d["input"]["sample_rate_hz"]
    units = d["input"]["units"] or [""] * d["d_input"]
    channels = ", ".join(f"{c} [{u}]" if u else c for c, u in zip(d["input"]["channels"], units, strict=True))
    window = f"{d['window']} samples" + (f" ({d['window'] / rate:g} s at {rate:g} Hz)" if rate else "")
    norm = "before" if d["prenorm"] else "after"
    signed = f"{d['signature']}, not checked (edge-ssm verify-signature does)" if d["signature"] else "none"
    kind = "S4" if any(row["low_rank_channels"] for row in d["layers"]) else "S4D"
    lines = [
        f"{kind} network, {d['task']}: {d['d_input']} in, {len(d['layers'])} layers of {d['d_model']} channels, "
        f"{d['d_output']} out",
        f"  input       {channels}",
        f"  window      {window}, {d['pooling']} pooling",
        f"  labels      {', '.join(d['labels']) or '(none)'}",
        f"  structure   {d['discretization']} discretization, norm {norm} the block",
        "",
        "  layer  active  rank-one  bypassed  d_state  states  mixing                norm    parameters  "
        "multiply-adds/step",
    ]
    for row in d["layers"]:
        mixing = f"{row['mixing']} {row['mixing_columns']}x{row['mixing_rows']} {row['mixing_dtype']}"
        lines.append(
            f"  {row['layer']:>5}  {row['active']:>6}  {row['low_rank_channels']:>8}  {row['bypassed']:>8}  "
            f"{_span(row['channel_states']):>7}  {row['states']:>6}  {mixing:<20}  {row['norm'] or 'none':<6}  "
            f"{row['parameters']:>10,}  {row['multiply_adds']:>18,}"
        )
    lines += [
        f"  total  {sum(r['active'] for r in d['layers']):>6}  "
        f"{sum(r['low_rank_channels'] for r in d['layers']):>8}  {sum(r['bypassed'] for r in d['layers']):>8}"
        f"{'':>9}  {sum(r['states'] for r in d['layers']):>6}{'':>30}  {d['parameters']:>10,}  "
        f"{d['multiply_adds_per_step']:>18,}",
        "",
        f"  step        reads {d['bytes_per_step']:,} bytes, {d['state_bytes']:,} of them state",
        *([f"  rounding    changed an output by up to {d['rounding_error']:.1e}"] if d["rounding_error"] else []),
        f"  file        {d['file_bytes']:,} bytes, format {d['format_version']}, digest {d['digest'][:16]}...",
        f"  signature   {signed}",
        *(_graph_lines(d["graph"]) if "graph" in d else []),
        "  provenance",
        *(f"    {line}" for line in _outline(d["provenance"])),
    ]
    return "\n".join(lines)


def _graph_lines(graph: dict[str, Any]) -> list[str]:
    chunk = {0: "chunks of any size", 1: "single samples"}.get(
        graph["chunk"], f"single samples and chunks of {graph['chunk']}"
    )
    return [
        f"  exported    {graph['kind']}, {graph['file_bytes']:,} bytes, digest {graph['digest'][:16]}...; "
        "it contains the artifact described above",
        f"              {graph['weights']} mixing weights, {chunk}; largest error {graph['max_error']:.1e} on "
        f"{graph['samples']} samples ({graph['samples_from']})",
    ]


def _span(values: list[int]) -> str:
    """Return the smallest and the largest value as text."""
    if not values:
        return "0"
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _outline(value: Any, name: str = "") -> list[str]:
    """Return a JSON value as indented lines, one for each scalar, without the control characters it may contain."""
    name = sanitize(name, None)
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        nested = [line for key, item in items for line in _outline(item, str(key))]
        return [f"{name}:", *(f"  {line}" for line in nested)] if name else nested
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return [f"{name}: {sanitize(text, None)}"]
