"""The report of a profile as a self-contained HTML page: tables, and curves as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from edge_ssm.profiler.report import NOT_MEASURED, Report, Result, brevity_text, energy_text, percentile_texts

WIDTH, HEIGHT = 860, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 18, 34
COLOURS = ("#0b6e99", "#c4552d", "#3f8f4f", "#8a5aa8", "#a88618", "#666f7a")
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--paper:#fff;--line:#d5dbe1}
@media (prefers-color-scheme:dark){:root{--ink:#e3e8ed;--paper:#15191d;--line:#3a434c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:56rem;
 margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child,.facts td{text-align:left}.facts td{white-space:normal}
svg{width:100%;height:auto}svg text{fill:var(--ink);font-size:12px}
.grid{stroke:var(--line)}.active{opacity:.1}
.bad{border-left:4px solid #c4302b;padding:.4rem .8rem}.note{color:#7a838c}
"""
Scale = Callable[[float], float]


def render(report: Report) -> str:
    """Return a report as an HTML page."""
    m, e = report.machine, html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>edge-ssm profile: {e(m.board)}</title><style>{_STYLE}</style>",
        f"<h1>{e(', '.join(x.path for x in report.models))} on {e(m.board)}</h1>",
    ]
    parts += [f"<p class=bad>Invalid: {e(reason)}.</p>" for reason in report.invalid_because]
    if brevity := brevity_text(report):
        parts.append(f"<p class=note>{e(brevity.capitalize())}.</p>")
    parts += ["<h2>Latency</h2>", _latency_table(report.results), _latency_plot(report.results)]
    parts += ["<h2>Power and energy</h2>"]
    if report.meter is None:
        parts.append(f"<p>{e(NOT_MEASURED.capitalize())}.</p>")
    else:
        parts += [_energy_table(report), _power_plot(report)]
        parts.append(
            f"<p class=note>Measured by {e(report.meter.name)}: {e(report.meter.covers)}; a reading every "
            f"{report.meter.period_s * 1e3:.0f} ms, in steps of {report.meter.resolution_w * 1e3:.3g} mW. Active "
            "blocks are shaded in the colour of their workload; the time before the first block is the warm-up.</p>"
        )
    if report.curves.temperature_c:
        parts += ["<h2>Temperature</h2>", _temperature_plot(report)]
    parts += ["<h2>Machine and protocol</h2>", _facts(report)]
    parts += [f"<p class=note>{e(note)}</p>" for note in report.notes]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<div class=scroll><table><tr>{top}{body}</table></div>"


def _latency_table(results: Sequence[Result]) -> str:
    head = ["microseconds per call", "p50", "p90", "p99", "p99.9", "max", "95 % of p50", "samples/s", "misses"]
    rows = []
    for r in results:
        misses = "" if r.deadline_us is None else f"{r.deadline_misses} of {r.samples // r.chunk // r.lanes}"
        interval = f"{r.latency_low_us:.2f} to {r.latency_high_us:.2f}"
        rows.append([r.name, *percentile_texts(r.latency_us), interval, f"{r.samples_per_s:.0f}", misses])
    return _table(head, rows)


def _energy_table(report: Report) -> str:
    rails = list(report.idle_w)
    rows = [["idle", "", *(f"{report.idle_w[rail]:.3f} W" for rail in rails)]]
    for r in report.results:
        watts = [f"{r.power_w[rail]:.3f} W" if rail in r.power_w else "" for rail in rails]
        rows.append([r.name, energy_text(r.energy_per_step_uj), *watts])
    return _table(["", "energy per sample", *rails], rows)


def _frame(
    x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]], x: str, y: str, body: str
) -> str:
    """Return a plot of ``body`` with axes; a tick is a coordinate in the picture and its label."""
    low = HEIGHT - BOTTOM
    lines = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{html.escape(y)} over {html.escape(x)}">']
    for at, text in x_ticks:
        lines.append(f'<line class=grid x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{low}"/>')
        lines.append(f'<text x="{at:.1f}" y="{low + 15}" text-anchor=middle>{text}</text>')
    for at, text in y_ticks:
        lines.append(f'<line class=grid x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor=end>{text}</text>')
    lines.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor=middle>{html.escape(x)}</text>')
    lines.append(f'<text x="{LEFT}" y="{TOP - 3}">{html.escape(y)}</text>')
    return "\n".join([*lines, body, "</svg>"])


def _linear(low: float, high: float, first: float, last: float) -> Scale:
    """Return the linear map from values in [low, high] to coordinates in [first, last]."""
    span = (high - low) or 1.0
    return lambda v: first + (v - low) / span * (last - first)


def _round_ticks(low: float, high: float) -> list[float]:
    step: float = 10 ** math.floor(math.log10(max(high - low, 1e-9)))
    step *= next((f for f in (0.1, 0.2, 0.5, 1.0) if (high - low) / (step * f) <= 7), 2.0)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _legend(names: Sequence[str]) -> str:
    return "".join(
        f'<text x="{WIDTH - RIGHT - 4}" y="{TOP + 14 + 15 * i}" text-anchor=end '
        f'style="fill:{COLOURS[i % len(COLOURS)]}">'
        f"{html.escape(name)}</text>"
        for i, name in enumerate(names)
    )


def _latency_plot(results: Sequence[Result]) -> str:
    """Plot the share of calls that take longer than a time, on two logarithmic axes, which show the tail."""
    low = min(r.histogram[0][0] for r in results) / 1e3 * 0.8
    high = max(r.latency_us.max for r in results) * 1.2
    calls = max(sum(n for _, n in r.histogram) for r in results)
    deepest = max(1, math.ceil(math.log10(calls)))
    x, y = _linear(math.log(low), math.log(high), LEFT, WIDTH - RIGHT), _linear(0, -deepest, TOP, HEIGHT - BOTTOM)
    lines = []
    for i, r in enumerate(results):
        total, over, points = sum(n for _, n in r.histogram), sum(n for _, n in r.histogram), []
        for edge, n in r.histogram:
            at = x(math.log(min(edge / 1e3, high)))
            points.append(f"{at:.1f},{y(math.log10(over / total)):.1f}")
            over -= n
            points.append(f"{at:.1f},{y(math.log10(over / total) if over else -deepest):.1f}")
        lines.append(f'<polyline fill=none stroke="{COLOURS[i % len(COLOURS)]}" points="{" ".join(points)}"/>')
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    x_ticks = [
        (x(math.log(v)), f"{v:g}") for d in decades for v in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= v <= high
    ]
    y_ticks = [(y(-d), f"{100 * 10.0**-d:g} %") for d in range(deepest + 1)]
    return _frame(
        x_ticks,
        y_ticks,
        "microseconds per call",
        "calls that take longer",
        "".join(lines) + _legend([r.name for r in results]),
    )


def _shaded_blocks(report: Report, x: Scale) -> str:
    kinds = [r.name for r in report.results]
    return "".join(
        f'<rect class=active fill="{COLOURS[kinds.index(kind) % len(COLOURS)]}" x="{x(begin):.1f}" y="{TOP}" '
        f'width="{x(end) - x(begin):.1f}" height="{HEIGHT - TOP - BOTTOM}">'
        f"<title>{html.escape(kind)}</title></rect>"
        for kind, begin, end in report.curves.blocks
        if kind != "idle"
    )


def _time_plot(report: Report, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], label: str) -> str:
    """Plot curves, each of them times and values by name, over time in seconds."""
    last = max([t for times, _ in curves.values() for t in times] + [end for _, _, end in report.curves.blocks])
    values = [v for _, curve in curves.values() for v in curve]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    x, y = _linear(0, last, LEFT, WIDTH - RIGHT), _linear(low, high, HEIGHT - BOTTOM, TOP)
    lines = [_shaded_blocks(report, x)]
    for i, (times, curve) in enumerate(curves.values()):
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in zip(times, curve, strict=True))
        lines.append(f'<polyline fill=none stroke="{COLOURS[i % len(COLOURS)]}" points="{points}"/>')
    lines.append(_legend(list(curves)) if len(curves) > 1 else "")
    x_ticks = [(x(t), f"{t:g}") for t in _round_ticks(0, last)]
    y_ticks = [(y(v), f"{v:.4g}") for v in _round_ticks(low, high)]
    return _frame(x_ticks, y_ticks, "seconds", label, "".join(lines))


def _power_plot(report: Report) -> str:
    curves = report.curves
    return _time_plot(report, {"power": (curves.power_s, curves.power_w)}, "watts") if curves.power_s else ""


def _temperature_plot(report: Report) -> str:
    curves = report.curves
    shown = list(curves.temperature_c.items())[: len(COLOURS)]
    return _time_plot(report, {zone: (curves.temperature_s, celsius) for zone, celsius in shown}, "degrees Celsius")


def _facts(report: Report) -> str:
    m = report.machine
    rows = [
        ["processor", f"{m.processor}, {m.cores} cores, {m.memory_mib} MiB"],
        ["system", f"Linux {m.kernel}, Python {m.python}" + (f", {m.jetpack}" if m.jetpack else "")],
        ["power mode", m.power_mode or "none"],
        ["firmware profile", report.profile or "none"],
        ["governor", m.governor or "unknown"],
        ["highest clock", ", ".join(f"{mhz:g} MHz" for mhz in sorted(set(report.clocks_mhz))) or "unknown"],
        ["gpu clock", f"{report.gpu_mhz:g} MHz" if report.gpu_mhz else "no GPU seen"],
        ["fan", f"{report.fan_rpm:g} rpm" if report.fan_rpm is not None else "none seen"],
        ["protocol", f"{report.rounds} rounds of {report.block_s:g} s blocks in random order, seed {report.seed}"],
        ["samples", report.samples_from],
        ["timing adds", f"{report.timer_ns:.0f} ns to a call"],
        ["resident memory", f"{report.resident_mib:.0f} MiB"],
        ["a run without samples", "not measured" if report.start_up_s is None else f"{report.start_up_s:.2f} s"],
        ["load before the run", f"{report.load_percent:.0f} %"],
        *([f"model {model.path}", model.digest] for model in report.models),
        ["measured", f"{report.created}, edge-ssm {report.edge_ssm}"],
    ]
    return _table(["", ""], rows).replace("<table", "<table class=facts")
