"""Checkpoints that other projects write: state-spaces' minimal S4D, its S4Block stacks, and S4oP's.

A checkpoint is read into ``Layer`` records, whose names follow the papers; ``importing`` makes a network of them, and
``verification`` computes from them, by itself, what the checkpoint's own convolution gives. What can't stream, or is
not known, is refused with its name. Nothing in a checkpoint is ever run: only tensors and plain values are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.model.network import Array
from edge_ssm_build.training.checkpoint import read_torch

Form = Literal["state-spaces-s4d", "state-spaces-s4block", "s4op"]
FORMS: tuple[Form, ...] = ("state-spaces-s4d", "state-spaces-s4block", "s4op")
Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]
MAX_ARCH_BYTES = 1 << 20
Size = Annotated[int, msgspec.Meta(ge=1)]


class Arch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """ARCH.toml: what a checkpoint's keys can't tell. What they can tell may be left out, and is checked if given."""

    d_input: Size | None = None
    d_model: Size | None = None
    d_state: Size | None = None
    n_layers: Size | None = None
    d_output: Size | None = None
    norm: Literal["layer", "batch"] | None = None
    prenorm: bool | None = None
    kernel: Literal["diag", "dplr"] | None = None
    discretization: Literal["zoh", "bilinear"] | None = None
    pooling: Literal["mean", "last"] | None = None
    window: Size | None = None
    sample_rate_hz: Annotated[float, msgspec.Meta(gt=0)] | None = None
    labels: list[str] = []
    channels: list[str] = []
    mean: list[float] = []
    std: list[float] = []
    dt_transform: Transform = "exp"
    real_transform: Transform = "exp"
    imag_transform: Transform = "none"


def read_arch(path: Path) -> Arch:
    """Raises InputRefused, naming file and field."""
    content = files.read_regular_file(path, MAX_ARCH_BYTES, remedy="expected a TOML file; see docs/import.md")
    try:
        return msgspec.toml.decode(content, type=Arch)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputRefused(f"{path}: {error}; docs/import.md lists the fields") from None


@dataclass(frozen=True)
class Layer:
    """One block as the checkpoint has it, all float64. K active channels of M conjugate pairs."""

    active: Array  # (K,) int64
    A: Array  # (K, M) complex
    B: Array  # (K, M) complex
    C: Array  # (K, M) complex; truncated to ``l_kernel`` samples where that is not 0
    P: Array | None  # (K, M) complex: DPLR
    dt: Array  # (K, 1), or (K, M) where each state has its own
    l_kernel: int
    D: Array  # (K,)
    weight: Array  # (2H, H) or (H, H)
    bias: Array
    norm_weight: Array  # (H,)
    norm_bias: Array  # (H,)
    running: tuple[Array, Array] | None  # BatchNorm's mean and variance


@dataclass(frozen=True)
class Checkpoint:
    form: Form
    encoder: tuple[Array, Array] | None  # weight (H, d_input), bias (H,)
    embedding: Array | None  # (V, H)
    layers: tuple[Layer, ...]
    decoder: tuple[Array, Array]
    discretization: Literal["zoh", "bilinear"]
    prenorm: bool
    pooling: Literal["mean", "last"]
    window: int
    arch: Arch

    @property
    def d_model(self) -> int:
        return int(self.decoder[0].shape[1])


# --- keys ------------------------------------------------------------------------------------------------------


class _Keys:
    """The tensors of a checkpoint, each taken once with the shape that is expected of it."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path, self.left = path, dict(tensors)

    def has(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> Array:
        """float64; None in ``shape`` stands for any size."""
        if name not in self.left:
            raise InputRefused(f"{self.path}: {name} is missing")
        tensor = self.left.pop(name)
        found = tuple(tensor.shape)
        if shape is not None and (
            len(found) != len(shape) or any(e not in (None, f) for e, f in zip(shape, found, strict=True))
        ):
            expected = tuple("any" if n is None else n for n in shape)
            raise InputRefused(f"{self.path}: {name} has shape {found}, expected {expected}".replace("'any'", "any"))
        values: Array = tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else tensor.dtype).numpy()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputRefused(f"{self.path}: {name} holds a non-finite value (NaN or infinity)")
        return values

    def complex_(self, name: str, shape: tuple[int | None, ...]) -> Array:
        pairs = self.take(name, (*shape, 2))
        result: Array = pairs[..., 0] + 1j * pairs[..., 1]
        return result

    def end(self) -> None:
        """Nothing may be left that was not understood."""
        ignored = re.compile(r"(^|\.)(num_batches_tracked|omega|z)$")
        unknown = [name for name in self.left if not ignored.search(name)]
        if unknown:
            shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            raise InputRefused(f"{self.path}: unknown keys {shown}; this network has parts that edge-ssm does not know")


UNSUPPORTED = (
    (r"\.(input_gate|output_gate)\.", "a gate"),
    (r"\.input_linear\.", "a bottleneck"),
    (r"\.(weight_g|weight_v|parametrizations)(\.|$)", "weight normalisation"),
    (r"\.(in_proj|conv1d|x_proj|A_log)(\.|$)", "a Mamba block"),
)


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[list[int]] | None]:
    """The state dictionary, freed of wrappers, and S4oP's list of active channels."""
    raw = read_torch(path)
    active = raw.get("active_idx_layers") if isinstance(raw, dict) else None
    for name in ("model_state_dict", "state_dict", "model", "net"):
        if isinstance(raw, dict) and isinstance(raw.get(name), dict):
            raw = raw[name]
            break
    if not isinstance(raw, dict) or not raw or not all(isinstance(v, torch.Tensor) for v in raw.values()):
        raise InputRefused(f"{path}: holds no state dictionary of tensors; save model.state_dict() with torch.save")
    tensors = {str(name): tensor for name, tensor in raw.items()}
    for prefix in ("module.", "model.", "net."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors, None if active is None else [[int(c) for c in channels] for channels in active]


def recognise(tensors: Mapping[str, torch.Tensor], path: Path) -> Form:
    names = "\n".join(tensors)
    if re.search(r"^(embedding\.|fc\.|s4d_layers\.)", names, re.M):
        return "s4op"
    if re.search(r"\.kernel\.log_dt$", names, re.M):
        return "state-spaces-s4d"
    if re.search(r"\.layer\.kernel\.inv_dt$", names, re.M):
        return "state-spaces-s4block"
    raise InputRefused(
        f"{path}: not recognised as {', '.join(FORMS)}; its keys begin with {', '.join(list(tensors)[:4])}"
    )


def read(path: Path, form: str, arch: Arch) -> Checkpoint:
    """A foreign checkpoint. ``form`` is one of FORMS or "auto".

    Raises InputRefused for what is damaged, unknown or can't stream, UsageError for what ``arch`` must say.
    """
    tensors, active = _tensors(path)
    for pattern, what in UNSUPPORTED:
        found = [name for name in tensors if re.search(pattern, f".{name}")]
        if found:
            raise InputRefused(f"{path}: {found[0]} belongs to {what}, which edge-ssm can't stream")
    chosen = recognise(tensors, path) if form == "auto" else form
    if chosen not in FORMS:
        raise UsageError(f"--from {form!r}: unknown, expected auto, {', '.join(FORMS)}")
    keys = _Keys(path, tensors)
    return _Reader(path, keys, chosen, arch, active).checkpoint()


# --- layers ----------------------------------------------------------------------------------------------------

_TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "exp": np.exp,
    "relu": lambda x: np.maximum(x, 0) + 1e-4,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}


class _Reader:
    def __init__(self, path: Path, keys: _Keys, form: Form, arch: Arch, active: list[list[int]] | None) -> None:
        self.path, self.keys, self.form, self.arch, self.active = path, keys, form, arch, active

    def _agree(self, name: str, found: Any) -> None:
        stated = getattr(self.arch, name)
        if stated is not None and stated != found:
            raise UsageError(f"ARCH {name}: {stated}, but {self.path} has {found}")

    def _stated(self, name: str, default: Any = None) -> Any:
        value = getattr(self.arch, name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"ARCH {name}: missing; the keys of {self.path} can't tell it")
        return value

    def checkpoint(self) -> Checkpoint:
        keys, op = self.keys, self.form == "s4op"
        encoder_name, decoder_name = ("embedding", "fc") if op else ("encoder", "decoder")
        decoder = keys.take(f"{decoder_name}.weight", (None, None)), keys.take(f"{decoder_name}.bias", (None,))
        h = decoder[0].shape[1]
        encoder, embedding = None, None
        if keys.has(f"{encoder_name}.bias"):
            encoder = keys.take(f"{encoder_name}.weight", (h, None)), keys.take(f"{encoder_name}.bias", (h,))
        else:
            embedding = keys.take(f"{encoder_name}.weight", (None, h))
        stack = "s4d_layers" if any(name.startswith("s4d_layers.") for name in keys.left) else "s4_layers"
        count = len({match[1] for name in keys.left if (match := re.match(rf"{stack}\.(\d+)\.", name))})
        if count == 0:
            raise InputRefused(f"{self.path}: no layers; expected keys {stack}.0.*")
        dplr = any(name.endswith(".kernel.P") for name in keys.left)
        block = any(name.endswith(".kernel.inv_dt") for name in keys.left)
        self._agree("kernel", "dplr" if dplr else "diag")
        default = "bilinear" if dplr else None if block else "zoh"
        discretization = self._stated("discretization", default)
        if default is not None and discretization != default:
            raise UsageError(f"ARCH discretization: {discretization}, but {self.path} is {default} by its form")
        layers = tuple(self._layer(f"{stack}.{i}", f"norms.{i}", i, h, block) for i in range(count))
        keys.end()
        for name, found in (
            ("d_model", h),
            ("n_layers", count),
            ("d_output", decoder[0].shape[0]),
            ("d_state", 2 * layers[0].A.shape[1]),
            ("norm", "batch" if layers[0].running else "layer"),
            ("d_input", 1 if encoder is None else encoder[0].shape[1]),
        ):
            self._agree(name, found)
        prenorm, window = self._stated("prenorm"), self._stated("window")
        pooling = self._stated("pooling", "mean" if op else None)
        return Checkpoint(
            self.form, encoder, embedding, layers, decoder, discretization, prenorm, pooling, window, self.arch
        )

    def _layer(self, prefix: str, norm: str, i: int, h: int, block: bool) -> Layer:
        keys = self.keys
        active = self._active(prefix, i, h)
        k = len(active)
        inner = f"{prefix}.layer" if block else prefix
        if block:
            D = keys.take(f"{inner}.D", (None, None))
            if D.shape[0] != 1:
                raise InputRefused(f"{self.path}: {inner}.D has {D.shape[0]} channels; only channels = 1 can stream")
            A, B, C, P, dt, l_kernel = self._block_kernel(f"{inner}.kernel", D.shape[1])
            D = D[0]
        else:
            D = keys.take(f"{inner}.D", (None,))
            C = keys.complex_(f"{inner}.kernel.C", (len(D), None))
            m = C.shape[1]
            dt = np.exp(keys.take(f"{inner}.kernel.log_dt", (len(D),)))[:, None]
            real = keys.take(f"{inner}.kernel.log_A_real", (len(D), m))
            A = -np.exp(real) + 1j * keys.take(f"{inner}.kernel.A_imag", (len(D), m))
            B, P, l_kernel = np.ones_like(A), None, 0
        if len(D) == h and k < h:
            # A masked layer keeps the parameters of channels that it no longer uses.
            A, B, C, dt, D = (values[active] for values in (A, B, C, dt, D))
            P = None if P is None else P[active]
        if len(D) != k:
            raise InputRefused(f"{self.path}: {inner}.D has {len(D)} channels, expected {k} (active of {h})")
        weight, bias = self._mixing(prefix, h)
        running = None
        scale, shift = keys.take(f"{norm}.weight", (h,)), keys.take(f"{norm}.bias", (h,))
        if keys.has(f"{norm}.running_mean"):
            running = keys.take(f"{norm}.running_mean", (h,)), keys.take(f"{norm}.running_var", (h,))
        return Layer(active, A, B, C, P, dt, l_kernel, D, weight, bias, scale, shift, running)

    def _active(self, prefix: str, i: int, h: int) -> Array:
        keys = self.keys
        active = np.arange(h)
        if self.active is not None:
            if i >= len(self.active):
                raise InputRefused(f"{self.path}: active_idx_layers has {len(self.active)} layers, {prefix} is another")
            active = np.array(self.active[i], dtype=np.int64)
        for name in (f"{prefix}.active_idx", f"{prefix}.layer.active_idx", f"{prefix}.layer.kernel.active_idx"):
            if keys.has(name):
                active = keys.take(name, (None,)).astype(np.int64)
        if keys.has(f"{prefix}.pruning_mask"):
            active = np.flatnonzero(keys.take(f"{prefix}.pruning_mask", (h,)))
        if len(set(active.tolist())) != len(active) or not ((active >= 0) & (active < h)).all():
            raise InputRefused(f"{self.path}: active channels of {prefix} are repeated or outside 0 to {h - 1}")
        if (np.diff(active) < 0).any():
            raise InputRefused(f"{self.path}: active channels of {prefix} are not ascending")
        return active

    def _block_kernel(self, name: str, h: int) -> tuple[Array, Array, Array, Array | None, Array, int]:
        keys, arch = self.keys, self.arch
        C = keys.complex_(f"{name}.C", (None, h, None))
        if C.shape[0] != 1:
            raise InputRefused(
                f"{self.path}: {name}.C has {C.shape[0]} channels: a bidirectional or multi-channel layer can't stream"
            )
        m = C.shape[2]
        real, imag = keys.take(f"{name}.A_real", (None, m)), keys.take(f"{name}.A_imag", (None, m))
        ssms = real.shape[0]
        if h % ssms:
            raise InputRefused(f"{self.path}: {name}.A_real has {ssms} systems, expected a divisor of {h}")

        def repeated(values: Array) -> Array:
            """(n_ssm, M) -> (H, M): the copies follow each other as a whole."""
            return np.tile(values, (h // ssms, 1))

        transforms = _TRANSFORMS[arch.real_transform], _TRANSFORMS[arch.imag_transform]
        A = repeated(-transforms[0](real) - 1j * transforms[1](imag))
        B = repeated(keys.complex_(f"{name}.B", (1, ssms, m))[0])
        dt = _TRANSFORMS[arch.dt_transform](keys.take(f"{name}.inv_dt", (h, None)))
        if dt.shape[1] not in (1, m):
            raise InputRefused(f"{self.path}: {name}.inv_dt has shape {dt.shape}, expected ({h}, 1) or ({h}, {m})")
        P, l_kernel = None, 0
        if keys.has(f"{name}.P"):
            raw = keys.complex_(f"{name}.P", (None, ssms, m))
            if raw.shape[0] != 1:
                raise InputRefused(f"{self.path}: {name}.P has rank {raw.shape[0]}; only rank 1 can stream")
            if dt.shape[1] != 1:
                raise InputRefused(f"{self.path}: {name}.inv_dt is not tied (dt_tie = False), which DPLR can't stream")
            P = repeated(raw[0])
            l_kernel = int(keys.take(f"{name}.l_kernel", ()))
        return A, B, C[0], P, dt, l_kernel

    def _mixing(self, prefix: str, h: int) -> tuple[Array, Array]:
        keys = self.keys
        name = (
            f"{prefix}.output_linear.0" if keys.has(f"{prefix}.output_linear.0.weight") else f"{prefix}.output_linear"
        )
        weight = keys.take(f"{name}.weight")
        if weight.ndim == 3 and weight.shape[2] == 1:
            weight = weight[..., 0]
        if weight.shape not in ((2 * h, h), (h, h)):
            raise InputRefused(
                f"{self.path}: {name}.weight has shape {weight.shape}, expected ({2 * h}, {h}) (GLU) or ({h}, {h})"
            )
        return weight, keys.take(f"{name}.bias", (weight.shape[0],))
