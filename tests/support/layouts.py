"""Checkpoints as other projects lay them out, made from a network of ours: the same parameters under their names."""

import numpy as np
import torch

from edge_ssm_build.training.network import SSMNetwork


def _real(values):
    return torch.view_as_real(values)


def _ends(model, encoder, decoder):
    keys = {f"{encoder}.weight": model.encoder.weight, f"{encoder}.bias": model.encoder.bias}
    keys |= {f"{decoder}.weight": model.decoder.weight, f"{decoder}.bias": model.decoder.bias}
    for i, block in enumerate(model.layers()):
        for name, value in block.norm.state_dict().items():
            keys[f"norms.{i}.{name}"] = value
    return keys


def minimal_s4d(model: SSMNetwork, stack="s4_layers", encoder="encoder", decoder="decoder"):
    """The example network of state-spaces around its minimal S4D; also S4oP's S4D under other names."""
    keys = _ends(model, encoder, decoder)
    for i, block in enumerate(model.layers()):
        name, ssm = f"{stack}.{i}", block.ssm
        keys[f"{name}.D"] = ssm.full_D()[ssm.active]
        for part in ("C", "log_dt", "log_A_real", "A_imag"):
            keys[f"{name}.kernel.{part}"] = getattr(ssm, part)
        keys[f"{name}.output_linear.0.weight"] = block.mixing.weight[..., None]
        keys[f"{name}.output_linear.0.bias"] = block.mixing.bias
    return _detached(keys)


INVERSE = {
    "none": lambda x: x,
    "exp": torch.log,
    "relu": lambda x: x - 1e-4,
    "sigmoid": torch.logit,
    "softplus": lambda x: torch.log(torch.expm1(x)),
}


def block_stack(
    model: SSMNetwork, *, encoder="encoder", decoder="decoder", tied=False, untied_dt=False, real="exp", dt="exp"
):
    """A stack of S4Block, diagonal or DPLR; ``tied`` shares A, B, P of the first channel (n_ssm = 1)."""
    keys = _ends(model, encoder, decoder)
    for i, block in enumerate(model.layers()):
        name, ssm = f"s4_layers.{i}.layer", block.ssm
        A = torch.complex(-torch.exp(ssm.log_A_real), ssm.A_imag)
        B = torch.view_as_complex(ssm.B) if ssm.rank_one else torch.ones_like(A)
        C = torch.view_as_complex(ssm.C)
        # Theirs stores the other half of the spectrum, with a negative imaginary part.
        A, B, C = A.conj(), B.conj(), C.conj()
        P = torch.view_as_complex(ssm.P).conj() if ssm.rank_one else None
        if tied:
            A, B, P = A[:1], B[:1], None if P is None else P[:1]
        step = torch.exp(ssm.log_dt)[:, None]
        if untied_dt:
            step = step * torch.linspace(0.5, 2.0, C.shape[1])
        keys[f"{name}.D"] = ssm.full_D()[ssm.active][None]
        keys[f"{name}.kernel.inv_dt"] = INVERSE[dt](step)
        keys[f"{name}.kernel.A_real"] = INVERSE[real](-A.real)
        keys[f"{name}.kernel.A_imag"] = -A.imag
        keys[f"{name}.kernel.B"] = _real(B.resolve_conj())[None]
        keys[f"{name}.kernel.C"] = _real(C.resolve_conj())[None]
        if P is not None:
            keys[f"{name}.kernel.P"] = _real(P.resolve_conj())[None]
            keys[f"{name}.kernel.l_kernel"] = torch.tensor(ssm.l_kernel)
        keys[f"s4_layers.{i}.output_linear.0.weight"] = block.mixing.weight
        keys[f"s4_layers.{i}.output_linear.0.bias"] = block.mixing.bias
    return _detached(keys)


def s4op(model: SSMNetwork):
    """S4oP's file: what pruning left of each layer, and which channels those are."""
    rank_one = model.config.kernel == "s4"
    names = {"encoder": "embedding", "decoder": "fc"}
    state = block_stack(model, **names) if rank_one else minimal_s4d(model, "s4d_layers", **names)
    return {"model_state_dict": state, "active_idx_layers": [list(a) for a in model.active()]}


def _detached(keys):
    return {name: tensor.detach().clone() for name, tensor in keys.items()}


def arch_toml(**fields):
    lines = []
    for name, value in fields.items():
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, str):
            text = f'"{value}"'
        else:
            text = str(list(value)) if isinstance(value, (list, tuple, np.ndarray)) else str(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines) + "\n"
