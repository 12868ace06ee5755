"""Report of the trade-off of pruned families: PNG, a self-contained HTML page, CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_ssm import files
from edge_ssm.errors import InputRefused, UsageError

Row = dict[str, Any]
MAX_FAMILY_BYTES = 1 << 26


class _Score(msgspec.Struct):
    accuracy: float
    balanced_accuracy: float


class _Agreement(msgspec.Struct):
    ties: int
    ties_differing: int
    max_error: float


class _Member(msgspec.Struct):
    rate: float
    seed: int | None
    artifact: str | None
    active: list[int]
    states: int
    columns: list[int]
    rows: list[int]
    validation: _Score
    parameters: int
    weight_bytes: int
    multiply_adds: int
    file_bytes: int
    step_us: float
    base_step_us: float
    test: _Score | None
    agreement: dict[str, _Agreement] | None = None
    failure: str | None = None


class _Family(msgspec.Struct):
    version: int
    method: str
    data: str
    kernel: str
    latency: str
    chosen: float | None
    members: list[_Member]


def _read_family(run: Path) -> _Family:
    """Read ``family.json`` in the folder of a run."""
    path = run / "family.json"
    content = files.read_regular_file(path, MAX_FAMILY_BYTES, remedy="expected a folder that prune wrote")
    try:
        family = msgspec.json.decode(content, type=_Family)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not a family of edge-ssm-build prune ({error})") from None
    if family.version != 2 or not family.members:
        raise InputRefused(f"{path}: version {family.version}, expected 2 and at least one member; prune again")
    return family


def rows_of(runs: Sequence[Path]) -> list[Row]:
    """Return one row per member of every run. Raise InputRefused for a folder without a readable family."""
    rows = []
    for run in runs:
        family = _read_family(run)
        rows += [_row(run, family, member) for member in family.members]
    return rows


def _row(run: Path, family: _Family, m: _Member) -> Row:
    cpu = (m.agreement or {}).get("cpu")
    return {
        "run": run.name,
        "method": family.method,
        "data": family.data,
        "kernel": family.kernel,
        "rate": m.rate,
        "seed": m.seed,
        "chosen": m.rate == family.chosen,
        "validation": m.validation.balanced_accuracy,
        "test": m.test.balanced_accuracy if m.test else None,
        "step_us": m.step_us,
        "base_step_us": m.base_step_us,
        "time_saved": 1 - m.step_us / m.base_step_us,
        "parameters": m.parameters,
        "weight_bytes": m.weight_bytes,
        "file_bytes": m.file_bytes,
        "multiply_adds": m.multiply_adds,
        "states": m.states,
        "active": m.active,
        "columns": m.columns,
        "rows": m.rows,
        "artifact": m.artifact,
        "latency": family.latency,
        "max_error": cpu and cpu.max_error,
        "ties": cpu and cpu.ties,
        "ties_differing": cpu and cpu.ties_differing,
        "failure": m.failure,
    }


AXES = (("step_us", "step latency, us"), ("parameters", "parameters"), ("file_bytes", "artifact, bytes"))


def _label(row: Row) -> str:
    return f"{row['run']} ({row['method']})" if row["method"] else str(row["run"])


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_label(row), []).append(row)
    return groups


def _figures(rows: Sequence[Row]) -> tuple[Any, Any]:
    """Return two figures: accuracy over the three costs, and active channels by layer and rate."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("report needs matplotlib; pip install 'edge-ssm[host]'") from None
    groups = _grouped(rows)
    return _trade_off(Figure(figsize=(13, 4.2), layout="constrained"), groups), _layers(
        Figure(figsize=(1.5 + 3.2 * len(groups), 3.6), layout="constrained"), groups
    )


def _trade_off(trade: Any, groups: dict[str, list[Row]]) -> Any:
    """Draw accuracy over each of the three costs; the chosen member has a star."""
    for axis, (key, title) in zip(trade.subplots(1, 3, sharey=True), AXES, strict=True):
        for label, members in groups.items():
            axis.plot([m[key] for m in members], [100 * m["validation"] for m in members], "o-", label=label)
            for m in members:
                axis.annotate(
                    f"{m['rate']:g}",
                    (m[key], 100 * m["validation"]),
                    fontsize=7,
                    xytext=(3, 4),
                    textcoords="offset points",
                )
                if m["chosen"]:
                    axis.plot(m[key], 100 * m["validation"], "*", color="black", markersize=15, zorder=3)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    trade.axes[0].set_ylabel("balanced accuracy, validation, %")
    trade.axes[0].legend(fontsize=8)
    return trade


def _layers(layers: Any, groups: dict[str, list[Row]]) -> Any:
    """Draw the number of active channels of each layer at each rate."""
    for axis, (label, members) in zip(
        layers.subplots(1, len(groups), squeeze=False, sharey=True)[0], groups.items(), strict=True
    ):
        grid = [m["active"] for m in members]
        axis.imshow(grid, aspect="auto", cmap="Blues", vmin=0, vmax=max(max(row) for row in grid))
        for i, counts in enumerate(grid):
            for j, count in enumerate(counts):
                axis.text(j, i, str(count), ha="center", va="center", fontsize=8)
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("layer")
        axis.set_xticks(range(len(grid[0])))
        axis.set_yticks(range(len(members)), [f"{m['rate']:g}" for m in members])
    layers.axes[0].set_ylabel("rate; active channels in the cells")
    return layers


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    # Fixed ids and no date, so that the same rows give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "edge-ssm"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("family", _label),
    ("rate", lambda r: f"{r['rate']:g}" + (" (chosen)" if r["chosen"] else "")),
    ("validation %", lambda r: f"{100 * r['validation']:.1f}"),
    ("test %", lambda r: "not written" if r["failure"] else "" if r["test"] is None else f"{100 * r['test']:.1f}"),
    ("step us", lambda r: f"{r['step_us']:.2f}"),
    ("time saved %", lambda r: f"{100 * r['time_saved']:.0f}"),
    ("parameters", lambda r: f"{r['parameters']:,}"),
    ("bytes", lambda r: f"{r['file_bytes']:,}"),
    ("active per layer", lambda r: " ".join(map(str, r["active"]))),
    ("states", lambda r: str(r["states"])),
    ("columns", lambda r: " ".join(map(str, r["columns"]))),
    ("rows", lambda r: " ".join(map(str, r["rows"]))),
)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>edge-ssm: pruning report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #1b1f24 }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #d8dee4; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
tr.chosen {{ background: #fff3c4; font-weight: 600 }}
</style></head><body>
<h1>Pruning report</h1>
<p>{summary}</p>
{trade}
<h2>Operators left in each layer</h2>
{layers}
<h2>All members</h2>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
{failures}<p>Step latency: {latency}. Accuracy is balanced (mean recall over classes).
The test split was read at the end; nothing is chosen by its scores.</p>
</body></html>
"""


def _page(rows: Sequence[Row], trade: Any, layers: Any) -> str:
    chosen = [r for r in rows if r["chosen"]]
    picked = "; ".join(
        f"{_label(r)}: rate {r['rate']:g}, {100 * r['validation']:.1f} % at {r['step_us']:.2f} us" for r in chosen
    )
    families = f"{len(_grouped(rows))} families, {len(rows)} networks."
    body = [
        f'<tr class="{"chosen" if r["chosen"] else ""}">'
        + "".join(f"<td>{html.escape(text(r))}</td>" for _, text in _COLUMNS)
        + "</tr>"
        for r in rows
    ]
    return _PAGE.format(
        summary=html.escape(f"{families} Chosen: {picked}." if chosen else f"{families} No target was given."),
        trade=_svg(trade),
        layers=_svg(layers),
        head="".join(f"<th>{name}</th>" for name, _ in _COLUMNS),
        body="\n".join(body),
        failures="".join(
            f"<p>{html.escape(_label(r))}, rate {r['rate']:g}: not written. {html.escape(r['failure'])}</p>\n"
            for r in rows
            if r["failure"]
        ),
        latency=html.escape("; ".join(sorted({r["latency"] for r in rows}))),
    )


def write_report(runs: Sequence[Path], output: Path) -> list[Path]:
    """Write report.html, tradeoff.png, layers.png, report.csv and report.json.

    Parameters
    ----------
    runs
        Folders that prune wrote.
    output
        Folder for the report.

    Returns
    -------
    list
        The paths of the files.

    Raises
    ------
    InputRefused
        If a run has no readable family. Nothing is written then.
    UsageError
        If matplotlib is missing.
    """
    rows = rows_of(runs)
    trade, layers = _figures(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    contents = {
        "report.html": _page(rows, trade, layers).encode(),
        "tradeoff.png": _png(trade),
        "layers.png": _png(layers),
        "report.csv": table.getvalue().encode(),
        "report.json": (json.dumps(rows, indent=1) + "\n").encode(),
    }
    for name, content in contents.items():
        files.write(output / name, content)
    return [output / name for name in contents]
