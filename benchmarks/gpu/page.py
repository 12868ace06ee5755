"""Make a table and a chart of the results of the GPU benchmark: python benchmarks/gpu/page.py [RESULTS.json].

Writes RESULTS.md and RESULTS.png beside the JSON that run.py wrote.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def table(results: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    rows = {(row["shape"], row["entry"]): row for row in results["rows"]}
    shapes = list(dict.fromkeys(shape for shape, _ in rows))
    entries = list(dict.fromkeys(entry for _, entry in rows))
    lines = [
        f"{results['gpu']}, driver {results['driver']}, memory {results['memory_gb_s']} GB/s by copies.",
        "",
        "Microseconds a sample by the host's clock (the GPU's own), times our step [what reading alone needs].",
        "",
        "| | " + " | ".join(shapes) + " |",
        "| --- " * (1 + len(shapes)) + "|",
    ]
    for entry in entries:
        cells = []
        for shape in shapes:
            row = rows.get((shape, entry))
            if row is None:
                cells.append("")
                continue
            own = "" if row["gpu_us_a_sample"] is None else f" ({row['gpu_us_a_sample']:.3g})"
            cells.append(f"{row['us_a_sample']:.3g}{own}, {row['ratio']:.3g}x [{row['read_us_a_sample']:.2g}]")
        lines.append(f"| {entry} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the chart."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    entries = list(dict.fromkeys(row["entry"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.35 * len(entries)))
    height = 0.8 / len(shapes)
    for i, shape in enumerate(shapes):
        of = {row["entry"]: row for row in rows if row["shape"] == shape}
        places = [j + i * height for j, entry in enumerate(entries) if entry in of]
        axes.barh(places, [of[e]["us_a_sample"] for e in entries if e in of], height, label=shape)
        floor = [of[e]["read_us_a_sample"] for e in entries if e in of]
        axes.plot(floor, places, "k|", label="reading alone" if not i else None)
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(entries))], entries, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("microseconds a sample")
    axes.set_title(results["gpu"])
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="?", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    arguments.results.with_suffix(".md").write_text(table(results))
    draw(results, arguments.results.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
