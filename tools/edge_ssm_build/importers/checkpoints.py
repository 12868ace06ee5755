"""Checkpoints of other projects: state-spaces' minimal S4D, its S4Block stacks, and those of S4oP.

A checkpoint is read into ``Layer`` records, whose field names follow the papers. ``importers.convert`` makes a network
of them, and ``importers.verification`` computes from them, independently, the output of the checkpoint's own
convolution. Parts that cannot stream or are not known are refused by name. No code in a checkpoint is ever run: only
tensors and plain values are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from edge_ssm.errors import InputRefused, UsageError
from edge_ssm.model.network import Array
from edge_ssm_build.importers.architecture import Architecture, ImportedCheckpoint, Layer
from edge_ssm_build.training.checkpoint import read_torch


@dataclass(frozen=True)
class Format:
    """A kind of checkpoint, recognised by its keys."""

    pattern: str
    """Regular expression that matches a key of every such checkpoint, and no key of the formats after it."""
    encoder: str
    """Name of the encoder layer; the same for ``decoder``."""
    decoder: str
    pooling: Literal["mean", "last"] | None
    """Pooling that the project uses; None if ARCH.toml must state it."""


FORMATS: dict[str, Format] = {
    "s4op": Format(r"^(embedding\.|fc\.|s4d_layers\.)", "embedding", "fc", "mean"),
    "state-spaces-s4d": Format(r"\.kernel\.log_dt$", "encoder", "decoder", None),
    "state-spaces-s4block": Format(r"\.layer\.kernel\.inv_dt$", "encoder", "decoder", None),
}
"""Every format by its name; the first that matches is taken."""


class _Keys:
    """The tensors of a checkpoint that have not been read yet. Each is read once, with its expected shape."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path, self.unread = path, dict(tensors)

    def has(self, name: str) -> bool:
        """Return True if there is an unread tensor of this name."""
        return name in self.unread

    def take(self, name: str, shape: tuple[int | None, ...] | None = None) -> Array:
        """Return a tensor as float64, or in its own type if it holds integers. None in ``shape`` allows any size."""
        if name not in self.unread:
            raise InputRefused(f"{self.path}: {name} is missing")
        tensor = self.unread.pop(name)
        actual = tuple(tensor.shape)
        if shape is not None and (
            len(actual) != len(shape) or any(e not in (None, a) for e, a in zip(shape, actual, strict=True))
        ):
            expected = tuple("any" if n is None else n for n in shape)
            raise InputRefused(f"{self.path}: {name} has shape {actual}, expected {expected}".replace("'any'", "any"))
        values: Array = tensor.detach().cpu().to(torch.float64 if tensor.is_floating_point() else tensor.dtype).numpy()
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise InputRefused(f"{self.path}: {name} holds a non-finite value (NaN or infinity)")
        return values

    def take_complex(self, name: str, shape: tuple[int | None, ...]) -> Array:
        """Return a tensor of (real, imaginary) pairs, shape (*shape, 2), as complex128 of shape ``shape``."""
        pairs = self.take(name, (*shape, 2))
        result: Array = pairs[..., 0] + 1j * pairs[..., 1]
        return result

    def check_all_read(self) -> None:
        """Raise InputRefused if there are tensors that were not read and do not belong to buffers without effect."""
        ignored = re.compile(r"(^|\.)(num_batches_tracked|omega|z)$")
        unknown = [name for name in self.unread if not ignored.search(name)]
        if unknown:
            shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
            raise InputRefused(f"{self.path}: unknown keys {shown}; this network has parts that edge-ssm does not know")


UNSUPPORTED = (
    (r"\.(input_gate|output_gate)\.", "a gate"),
    (r"\.input_linear\.", "a bottleneck"),
    (r"\.(weight_g|weight_v|parametrizations)(\.|$)", "weight normalisation"),
    (r"\.(in_proj|conv1d|x_proj|A_log)(\.|$)", "a Mamba block"),
)
"""Patterns of keys of parts that cannot stream, and the names of the parts."""


def _tensors(path: Path) -> tuple[dict[str, torch.Tensor], list[list[int]] | None]:
    """Return the state dictionary without wrappers and prefixes, and S4oP's list of active channels."""
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


def recognise(tensors: Mapping[str, torch.Tensor], path: Path) -> str:
    """Return the name of the format that the keys belong to. Raise InputRefused if there is none."""
    names = "\n".join(tensors)
    for name, checkpoint_format in FORMATS.items():
        if re.search(checkpoint_format.pattern, names, re.MULTILINE):
            return name
    raise InputRefused(
        f"{path}: not recognised as {', '.join(FORMATS)}; its keys begin with {', '.join(list(tensors)[:4])}"
    )


def read_checkpoint(path: Path, format_name: str, arch: Architecture) -> ImportedCheckpoint:
    """Read a checkpoint of another project.

    Parameters
    ----------
    path
        File that ``torch.save`` wrote.
    format_name
        Name of the format, one of FORMATS, or "auto".
    arch
        What the keys cannot express.

    Raises
    ------
    InputRefused
        If the file is damaged, or has parts that are unknown or cannot stream.
    UsageError
        If the format is unknown, or ``arch`` lacks a field or contradicts the keys.
    """
    tensors, active = _tensors(path)
    for pattern, part in UNSUPPORTED:
        matches = [name for name in tensors if re.search(pattern, f".{name}")]
        if matches:
            raise InputRefused(f"{path}: {matches[0]} belongs to {part}, which edge-ssm cannot stream")
    name = recognise(tensors, path) if format_name == "auto" else format_name
    if name not in FORMATS:
        raise UsageError(f"--from {format_name!r}: unknown, expected auto, {', '.join(FORMATS)}")
    return _Reader(path, _Keys(path, tensors), name, arch, active).checkpoint()


_TRANSFORMS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "exp": np.exp,
    "relu": lambda x: np.maximum(x, 0) + 1e-4,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
}


class _Reader:
    """Reads the tensors of one checkpoint."""

    def __init__(
        self, path: Path, keys: _Keys, format_name: str, arch: Architecture, active: list[list[int]] | None
    ) -> None:
        self.path, self.keys, self.format_name, self.arch, self.active = path, keys, format_name, arch, active

    def _check_stated(self, name: str, actual: Any) -> None:
        """Raise UsageError if ARCH.toml states another value."""
        stated = getattr(self.arch, name)
        if stated is not None and stated != actual:
            raise UsageError(f"ARCH {name}: {stated}, but {self.path} has {actual}")

    def _stated(self, name: str, default: Any = None) -> Any:
        """Return the value in ARCH.toml or the default. Raise UsageError if there is neither."""
        value = getattr(self.arch, name)
        value = default if value is None else value
        if value is None:
            raise UsageError(f"ARCH {name}: missing; it does not follow from the keys of {self.path}")
        return value

    def checkpoint(self) -> ImportedCheckpoint:
        """Read every tensor and check that none is left."""
        keys, names = self.keys, FORMATS[self.format_name]
        decoder = keys.take(f"{names.decoder}.weight", (None, None)), keys.take(f"{names.decoder}.bias", (None,))
        h = decoder[0].shape[1]
        encoder, embedding = self._encoder(names.encoder, h)
        stack, count = self._stack()
        is_rank_one = any(name.endswith(".kernel.P") for name in keys.unread)
        is_block = any(name.endswith(".kernel.inv_dt") for name in keys.unread)
        self._check_stated("kernel", "dplr" if is_rank_one else "diag")
        discretization = self._discretization(is_rank_one, is_block)
        layers = tuple(self._layer(f"{stack}.{i}", f"norms.{i}", i, h, is_block) for i in range(count))
        keys.check_all_read()
        for name, actual in (
            ("d_model", h),
            ("n_layers", count),
            ("d_output", decoder[0].shape[0]),
            ("d_state", 2 * layers[0].A.shape[1]),
            ("norm", "batch" if layers[0].running else "layer"),
            ("d_input", 1 if encoder is None else encoder[0].shape[1]),
        ):
            self._check_stated(name, actual)
        return ImportedCheckpoint(
            format_name=self.format_name,
            encoder=encoder,
            embedding=embedding,
            layers=layers,
            decoder=decoder,
            discretization=discretization,
            prenorm=self._stated("prenorm"),
            pooling=self._stated("pooling", names.pooling),
            window=self._stated("window"),
            arch=self.arch,
        )

    def _encoder(self, name: str, h: int) -> tuple[tuple[Array, Array] | None, Array | None]:
        """Return the linear encoder (weight, bias) or, if it has no bias, the embedding of tokens."""
        keys = self.keys
        if keys.has(f"{name}.bias"):
            return (keys.take(f"{name}.weight", (h, None)), keys.take(f"{name}.bias", (h,))), None
        return None, keys.take(f"{name}.weight", (None, h))

    def _stack(self) -> tuple[str, int]:
        """Return the name of the list of layers and its length."""
        names = list(self.keys.unread)
        stack = "s4d_layers" if any(name.startswith("s4d_layers.") for name in names) else "s4_layers"
        count = len({match[1] for name in names if (match := re.match(rf"{stack}\.(\d+)\.", name))})
        if count == 0:
            raise InputRefused(f"{self.path}: no layers; expected keys {stack}.0.*")
        return stack, count

    def _discretization(self, is_rank_one: bool, is_block: bool) -> Literal["zoh", "bilinear"]:
        """Return the discretization; only a diagonal S4Block can have either."""
        default = "bilinear" if is_rank_one else None if is_block else "zoh"
        discretization: Literal["zoh", "bilinear"] = self._stated("discretization", default)
        if default is not None and discretization != default:
            raise UsageError(f"ARCH discretization: {discretization}, but {self.path} is {default} by its format")
        return discretization

    def _layer(self, prefix: str, norm: str, i: int, h: int, is_block: bool) -> Layer:
        """Read one layer; ``norm`` is the name of its norm."""
        keys = self.keys
        active = self._active(prefix, i, h)
        k = len(active)
        inner = f"{prefix}.layer" if is_block else prefix
        D, A, B, C, P, dt, l_kernel = self._s4block(inner) if is_block else self._minimal_s4d(inner)
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

    def _minimal_s4d(self, name: str) -> tuple[Array, Array, Array, Array, Array | None, Array, int]:
        """Return (D, A, B, C, P, dt, l_kernel) of a layer of the minimal S4D; B is 1, and there is no P."""
        keys = self.keys
        D = keys.take(f"{name}.D", (None,))
        C = keys.take_complex(f"{name}.kernel.C", (len(D), None))
        m = C.shape[1]
        dt = np.exp(keys.take(f"{name}.kernel.log_dt", (len(D),)))[:, None]
        real = keys.take(f"{name}.kernel.log_A_real", (len(D), m))
        A = -np.exp(real) + 1j * keys.take(f"{name}.kernel.A_imag", (len(D), m))
        return D, A, np.ones_like(A), C, None, dt, 0

    def _s4block(self, name: str) -> tuple[Array, Array, Array, Array, Array | None, Array, int]:
        """Return (D, A, B, C, P, dt, l_kernel) of an S4Block layer."""
        D = self.keys.take(f"{name}.D", (None, None))
        if D.shape[0] != 1:
            raise InputRefused(f"{self.path}: {name}.D has {D.shape[0]} channels; only channels = 1 can stream")
        return D[0], *self._block_kernel(f"{name}.kernel", D.shape[1])

    def _active(self, prefix: str, i: int, h: int) -> Array:
        """Return the active channels of layer ``i``, ascending."""
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
        """Return (A, B, C, P, dt, l_kernel) of an S4Block kernel with h channels."""
        keys, arch = self.keys, self.arch
        C = keys.take_complex(f"{name}.C", (None, h, None))
        if C.shape[0] != 1:
            raise InputRefused(
                f"{self.path}: {name}.C has {C.shape[0]} channels: a bidirectional or multi-channel layer cannot stream"
            )
        m = C.shape[2]
        real, imag = keys.take(f"{name}.A_real", (None, m)), keys.take(f"{name}.A_imag", (None, m))
        ssms = real.shape[0]
        if h % ssms:
            raise InputRefused(f"{self.path}: {name}.A_real has {ssms} systems, expected a divisor of {h}")

        def repeated(values: Array) -> Array:
            """Copy tied systems to every channel: (n_ssm, M) -> (H, M), as a whole one after the other."""
            return np.tile(values, (h // ssms, 1))

        transforms = _TRANSFORMS[arch.real_transform], _TRANSFORMS[arch.imag_transform]
        A = repeated(-transforms[0](real) - 1j * transforms[1](imag))
        B = repeated(keys.take_complex(f"{name}.B", (1, ssms, m))[0])
        dt = _TRANSFORMS[arch.dt_transform](keys.take(f"{name}.inv_dt", (h, None)))
        if dt.shape[1] not in (1, m):
            raise InputRefused(f"{self.path}: {name}.inv_dt has shape {dt.shape}, expected ({h}, 1) or ({h}, {m})")
        P, l_kernel = None, 0
        if keys.has(f"{name}.P"):
            raw = keys.take_complex(f"{name}.P", (None, ssms, m))
            if raw.shape[0] != 1:
                raise InputRefused(f"{self.path}: {name}.P has rank {raw.shape[0]}; only rank 1 can stream")
            if dt.shape[1] != 1:
                raise InputRefused(f"{self.path}: {name}.inv_dt is not tied (dt_tie = False), which DPLR cannot stream")
            P = repeated(raw[0])
            l_kernel = int(keys.take(f"{name}.l_kernel", ()))
        return A, B, C[0], P, dt, l_kernel

    def _mixing(self, prefix: str, h: int) -> tuple[Array, Array]:
        """Return weight and bias of the layer's output map."""
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
