"""README.md's tables and the picture, from results.json: ``python benchmarks/peers/page.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS, FLOOR = "edge-ssm", "floor"
BEGIN, END = "<!-- results -->\n", "<!-- end -->\n"


def table(rows: dict[tuple[str, str], Any], shapes: list[str], entries: list[str]) -> list[str]:
    lines = ["| microseconds a step | " + " | ".join(shapes) + " |", "| --- " * (1 + len(shapes)) + "|"]
    for entry in entries:
        cells = []
        for shape in shapes:
            row = rows[shape, entry]
            cell = f"{row['median_us']:.1f}" if row["median_us"] >= 10 else f"{row['median_us']:.2f}"
            ratio = f"{row['ratio']:.0f}" if row["ratio"] >= 10 else f"{row['ratio']:.1f}"
            cells.append(cell if entry == OURS else f"{cell} ({ratio}x)")
        lines.append(f"| {entry} | " + " | ".join(cells) + " |")
    return lines


def tails(rows: dict[tuple[str, str], Any], shapes: list[str], entries: list[str]) -> list[str]:
    lines = ["| p99, microseconds | " + " | ".join(shapes) + " | largest error |", "| --- " * (2 + len(shapes)) + "|"]
    for entry in entries:
        cells = [f"{rows[shape, entry]['p99_us']:.1f}" for shape in shapes]
        errors = [rows[shape, entry]["max_error"] for shape in shapes]
        error = "" if entry == FLOOR else f"{max(errors):.0e}"
        lines.append(f"| {entry} | " + " | ".join([*cells, error]) + " |")
    return lines


def draw(rows: dict[tuple[str, str], Any], shapes: list[str], entries: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    colors = pyplot.get_cmap("tab20").colors
    others = [entry for entry in entries if entry not in (OURS, FLOOR)]
    width = 0.8 / len(others)
    for i, entry in enumerate(others):
        places = [j + (i - len(others) / 2 + 0.5) * width for j in range(len(shapes))]
        axes.bar(places, [rows[shape, entry]["ratio"] for shape in shapes], width, label=entry, color=colors[i])
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("times edge-ssm's step")
    axes.set_title("One sample a step, one core, float32: time over that of edge-ssm's CPU engine")
    figure.legend(loc="lower center", fontsize=8, ncols=5)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=100)


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    rows = {(row["shape"], row["entry"]): row for row in results["rows"]}
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    entries = list(dict.fromkeys(entry for _, entry in rows))
    whole = [shape for shape in shapes if "-" not in shape]
    pruned = [shape for shape in shapes if "-" in shape]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    lines = [f"{results['machine']}; {versions}.", "", "![times edge-ssm's step](peers.png)", ""]
    lines += [*table(rows, whole, entries), ""]
    lines += ["Half, and 70 %, of the operators and their mixing columns removed:", ""]
    lines += [*table(rows, pruned, entries), ""]
    lines += [*tails(rows, whole, entries), ""]
    page = HERE / "README.md"
    text = page.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(before + BEGIN + "\n".join(lines) + END + after)
    draw(rows, shapes, entries, HERE / "peers.png")


if __name__ == "__main__":
    main()
