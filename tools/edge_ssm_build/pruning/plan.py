"""Pruning plans: which share of the operators is removed at each rate, how they are chosen, and what replaces them.

A plan makes a nested family of networks by removing whole SSM operators in steps, with fine-tuning. S4oP (arXiv
2606.18096) draws different channels with several seeds at each rate, fine-tunes each candidate for an eighth of the
original epochs, and takes the best by validation as the member of that rate and the start of the next. The choice of
the operators, what a removed operator becomes, and what else is removed are parts of a ``Plan``; S4oP is the plan with
a random choice, the depth budget and the identity bypass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_ssm.errors import UsageError
from edge_ssm.model.network import MIXING_DTYPES, MixingDtype
from edge_ssm_build.pruning import states
from edge_ssm_build.pruning.importance import BUDGETS, BYPASSES, SCORES, Budget, Bypass, allocate
from edge_ssm_build.training.checkpoint import Checkpoint

FINE_TUNE_SHARE = 1 / 8
"""Epochs of fine-tuning per candidate, over those of the training."""
MAX_SEED = 1 << 31


@dataclass(frozen=True)
class Plan:
    """How a family is made. Shares have one entry per rate."""

    rates: tuple[float, ...]
    """Share of all operators that is removed, ascending."""
    seeds: tuple[int, ...]
    """One candidate is made per rate and seed."""
    choice: str = "random"
    """Name of the score in ``SCORES`` that chooses the operators, or "random"."""
    budget: Budget = "depth"
    bypass: Bypass = "identity"
    columns: tuple[float, ...] = ()
    """Share of all mixing columns that is removed. Bypass "zero" removes those of the removed operators in any case."""
    rows: tuple[float, ...] = ()
    """Share of all mixing rows that is removed."""
    states: tuple[float, ...] = ()
    """Share that is removed of the states that the unpruned network has in the remaining channels."""
    states_method: str = "h2"
    """Name of the reduction in ``states.METHODS``."""
    mixing_dtype: MixingDtype = "float32"
    refit: bool = False
    """Refit the mixing by ridge regression before fine-tuning."""
    distill: float = 0.0
    """Weight of the unpruned network's logits in fine-tuning."""
    epochs: int = 1
    """Epochs of fine-tuning per candidate."""


@dataclass(frozen=True)
class Method:
    """A named choice of operators and the settings that suit it, each of which an option can override."""

    choice: str
    budget: Budget = "global"
    bypass: Bypass = "gain"
    seeds: tuple[int, ...] = (0,)
    refit: bool = False
    distill: float = 0.0
    columns: str = "0"
    """Share in the notation of ``parse_shares``; the same for ``rows`` and ``states``."""
    rows: str = "0"
    states: str = "0"


METHODS: dict[str, Method] = {
    "s4op": Method("random", "depth", "identity", (0, 1, 2)),
    **{name: Method(name) for name in SCORES},
    "best": Method("sensitivity", refit=True, distill=0.5),
    "compact": Method("sensitivity", refit=True, distill=0.5, columns="0.75*rate", rows="0.75*rate", states="0.7"),
    "smallest": Method("sensitivity", refit=True, distill=0.5, columns="rate", rows="rate", states="0.8"),
}
"""The values of --method."""


def parse_shares(text: str, rates: Sequence[float], option: str) -> tuple[float, ...]:
    """Return one share per rate.

    Parameters
    ----------
    text
        "rate", "F*rate", one number for all rates, or as many ascending numbers as there are rates.
    rates
        The rates of the plan.
    option
        Name of the option, for the error message.

    Returns
    -------
    tuple
        One share per rate; empty if all are zero.

    Raises
    ------
    UsageError
        If the text is anything else, or a share is not from 0 to below 1.
    """
    factor, star, word = text.rpartition("*")
    try:
        if word == "rate":
            shares = [float(factor if star else 1) * rate for rate in rates]
        else:
            shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) == 1:
        shares *= len(rates)
    if len(shares) != len(rates) or any(not 0 <= share < 1 for share in shares) or shares != sorted(shares):
        raise UsageError(
            f"{option} {text!r}: expected rate, 0.5*rate, a share from 0 to below 1, or {len(rates)} ascending ones"
        )
    return tuple(shares) if any(shares) else ()


def make_plan(method: Method, rates: Sequence[float], checkpoint: Checkpoint) -> Plan:
    """Return the method's plan for these rates. Raise UsageError as ``check_plan`` does."""
    plan = Plan(
        rates=tuple(rates),
        seeds=method.seeds,
        choice=method.choice,
        budget=method.budget,
        bypass=method.bypass,
        columns=parse_shares(method.columns, rates, "--columns"),
        rows=parse_shares(method.rows, rates, "--rows"),
        states=parse_shares(method.states, rates, "--states"),
        refit=method.refit,
        distill=method.distill,
    )
    return check_plan(checkpoint, plan)


def check_plan(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """Return the plan with its number of epochs. Raise UsageError if it cannot be carried out on the checkpoint."""
    _check_values(plan)
    config = checkpoint.model.config
    if plan.states and plan.states_method != "h2" and config.kernel == "s4":
        raise UsageError(f"states method {plan.states_method!r}: needs a diagonal kernel; h2 reduces s4 as well")
    if checkpoint.model.present_config().shapes() != replace(config, layers=None).shapes():
        raise UsageError("checkpoint: already pruned; start from the unpruned one, because the rates are nested")
    operators = config.d_model * config.n_layers
    counts = [round(rate * operators) for rate in plan.rates]
    if counts[0] == 0 or len(set(counts)) != len(counts):
        raise UsageError(
            f"rates: {list(plan.rates)} remove {counts} of {operators} operators; each must remove more than the last"
        )
    for count in counts:
        allocate(config.d_model, config.n_layers, count, plan.budget)
    return replace(plan, epochs=max(1, round(checkpoint.recipe.epochs * FINE_TUNE_SHARE)))


def _check_values(plan: Plan) -> None:
    """Raise UsageError for values that no checkpoint allows."""
    rates = plan.rates
    if not rates or any(not 0 < r < 1 for r in rates) or list(rates) != sorted(set(rates)):
        raise UsageError(f"rates: {list(rates)}, expected ascending numbers between 0 and 1, such as 0.1,0.3,0.5")
    seeds = plan.seeds
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < MAX_SEED for seed in seeds):
        raise UsageError(f"seeds: {list(seeds)}, expected one or more different whole numbers from 0 to {MAX_SEED - 1}")
    for name, value, known in (
        ("method", plan.choice, ("random", *SCORES)),
        ("budget", plan.budget, BUDGETS),
        ("bypass", plan.bypass, BYPASSES),
        ("states method", plan.states_method, states.METHODS),
        ("mixing dtype", plan.mixing_dtype, MIXING_DTYPES),
    ):
        if value not in known:
            raise UsageError(f"{name} {value!r}: unknown, expected {', '.join(known)}")
    if plan.choice == "random" and plan.budget == "global":
        raise UsageError("budget 'global': a random choice has no scores to compare layers by; use depth or uniform")
    if not 0 <= plan.distill <= 1:
        raise UsageError(f"distill: {plan.distill}, expected a weight from 0 to 1")
