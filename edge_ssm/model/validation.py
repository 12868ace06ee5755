"""Check that a network is complete and consistent before anything runs it."""

from __future__ import annotations

import numpy as np

from edge_ssm.errors import NetworkError
from edge_ssm.model.network import MIXING_DTYPES, SSM, Array, Discretization, Mixing, Network, TokenEncoder


def _expect(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise NetworkError(f"{where}: {problem}")


def _check_array(array: Array, where: str, shape: tuple[int, ...]) -> None:
    _expect(array.shape == shape, where, f"shape {array.shape}, expected {shape}")
    _expect(bool(np.isfinite(array).all()), where, "holds a non-finite value (NaN or infinity)")


def _check_indices(indices: Array, where: str, h: int) -> None:
    _expect(indices.ndim == 1, where, f"shape {indices.shape}, expected one axis")
    if len(indices):
        low, high = int(indices.min()), int(indices.max())
        out = low if low < 0 else high
        _expect(low >= 0 and high < h, where, f"index {out} is out of range, expected 0 to {h - 1}")
        _expect(bool((np.diff(indices) > 0).all()), where, "indices are repeated or not ascending")


def _check_ssm(ssm: SSM, where: str, h: int, discretization: Discretization) -> None:
    _check_indices(ssm.active, f"{where}.active", h)
    k = len(ssm.active)
    _check_array(ssm.pairs, f"{where}.pairs", (k,))
    # Bounded before they are summed: the sum of hostile numbers could overflow to the expected one.
    fits = bool(((ssm.pairs >= 1) & (ssm.pairs <= len(ssm.A))).all())
    _expect(fits, f"{where}.pairs", f"a value is not from 1 to {len(ssm.A)}, the number of states")
    states = int(ssm.pairs.sum())
    for name in ("A", "B", "C"):
        _check_array(getattr(ssm, name), f"{where}.{name}", (states,))
    if ssm.P is not None:
        _check_array(ssm.P, f"{where}.P", (states,))
        _expect(discretization == "bilinear", f"{where}.P", "a rank-one term needs bilinear discretization")
    _check_array(ssm.D, f"{where}.D", (h,))
    _check_array(ssm.dt, f"{where}.dt", (k,))
    _expect(bool((ssm.dt > 0).all()), f"{where}.dt", "a step size is not positive")
    unstable = np.flatnonzero(ssm.A.real >= 0)
    if len(unstable):
        at = unstable[0]
        owner = int(ssm.owner[at])
        n = int(at - ssm.pairs[:owner].sum())
        problem = f"unstable: Re A = {ssm.A.real[at]:.3g} at channel {ssm.active[owner]}, state {n}; expected < 0"
        raise NetworkError(f"{where}.A: {problem}")


def _check_mixing(mixing: Mixing, ssm: SSM, where: str, h: int) -> None:
    _check_indices(mixing.columns, f"{where}.columns", h)
    _check_indices(mixing.rows, f"{where}.rows", h)
    doubled = 2 if mixing.kind == "glu" else 1
    _expect(mixing.weight.dtype.name in MIXING_DTYPES, f"{where}.weight", f"dtype {mixing.weight.dtype}")
    _check_array(mixing.weight, f"{where}.weight", (doubled * len(mixing.rows), len(mixing.columns)))
    _check_array(mixing.bias, f"{where}.bias", (doubled * h,))
    _expect(
        (mixing.scale is None) == (mixing.dtype == "float32"),
        f"{where}.scale",
        "required for float16 and int8 weights, and only for them",
    )
    if mixing.scale is not None:
        _check_array(mixing.scale, f"{where}.scale", (doubled * len(mixing.rows),))
        _expect(bool((mixing.scale > 0).all()), f"{where}.scale", "a value is not positive")
    # A mask, because NumPy's set functions import its masked arrays: 5 % of the time to the first decision.
    is_left = np.zeros(h, dtype=bool)
    is_left[mixing.columns] = True
    removed, cut_off = np.flatnonzero(~is_left), ssm.active[~is_left[ssm.active]]
    _expect(len(cut_off) == 0, f"{where}.columns", f"channel {cut_off[:1]} is active but does not enter the mixing")
    _expect(bool((ssm.D[removed] == 0).all()), f"{where}.columns", "a channel with a gain does not enter the mixing")


def check(network: Network) -> None:
    """Check that all shapes agree, all values are finite and every SSM is stable.

    Raises NetworkError, which names the part, if they do not.
    """
    h, d_input, d_output = network.d_model, network.d_input, network.d_output
    _expect(d_input >= 1 and h >= 1 and d_output >= 1, "network", "d_input, d_model and d_output must be positive")
    _expect(len(set(network.input.channels)) == d_input, "input.channels", "names are repeated")
    units = network.input.units
    _expect(len(units) in (0, d_input), "input.units", f"{len(units)} given, expected {d_input} or none")
    _check_array(network.input.mean, "input.mean", (d_input,))
    _check_array(network.input.std, "input.std", (d_input,))
    _expect(bool((network.input.std > 0).all()), "input.std", "a value is not positive")
    rate = network.input.sample_rate_hz
    _expect(rate is None or (np.isfinite(rate) and rate > 0), "input.sample_rate_hz", f"{rate}, expected positive")
    if isinstance(network.encoder, TokenEncoder):
        _expect(d_input == 1, "input.channels", f"a token encoder reads 1 channel, not {d_input}")
        vocabulary = network.encoder.embedding.shape[0]
        _expect(vocabulary >= 1, "encoder.embedding", "the vocabulary is empty")
        _check_array(network.encoder.embedding, "encoder.embedding", (vocabulary, h))
    else:
        _check_array(network.encoder.weight, "encoder.weight", (h, d_input))
        _check_array(network.encoder.bias, "encoder.bias", (h,))
    for i, block in enumerate(network.blocks):
        where = f"blocks.{i}"
        _check_ssm(block.ssm, f"{where}.ssm", h, network.discretization)
        _check_mixing(block.mixing, block.ssm, f"{where}.mixing", h)
        if block.norm is not None:
            _check_array(block.norm.weight, f"{where}.norm.weight", (h,))
            _check_array(block.norm.bias, f"{where}.norm.bias", (h,))
            _expect(block.norm.eps > 0 and np.isfinite(block.norm.eps), f"{where}.norm.eps", "not positive")
    _check_array(network.decoder.weight, "decoder.weight", (d_output, h))
    _check_array(network.decoder.bias, "decoder.bias", (d_output,))
    _expect(network.window >= 1, "window", f"{network.window} samples, expected 1 or more")
    _expect(network.pooling != "none" or network.window == 1, "window", "a network without pooling has window 1")
    n_labels = len(network.labels)
    _expect(n_labels in (0, d_output), "labels", f"{n_labels} given, expected {d_output} (one per output) or none")
    _expect(len(set(network.labels)) == n_labels, "labels", "names are repeated")
    _expect(0 <= network.rounding_error < np.inf, "rounding_error", f"{network.rounding_error}, expected 0 or more")
