"""Write the tables of docs/exported.md from exported.json: ``python benchmarks/exported_page.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "exported.md"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def steps(rows: list[dict[str, Any]]) -> str:
    """Return the table of microseconds per step."""
    by_key = {(row["engine"], row["shape"], row["pruned"]): row for row in rows}
    networks = list(dict.fromkeys((row["shape"], row["pruned"]) for row in rows))
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = []
        for shape, pruned in networks:
            row = by_key[engine, shape, pruned]
            time = f"{row['median_us']:.1f}" if row["median_us"] >= 10 else f"{row['median_us']:.2f}"
            cells.append(time if engine == "cpu" else f"{time} ({row['ratio']:.1f}x)")
        lines.append([engine, *cells])
    return table(["", *(f"{shape}{f', {pruned} %' if pruned else ''}" for shape, pruned in networks)], lines)


def chunks(rows: list[dict[str, Any]]) -> str:
    """Return the table of microseconds per sample in chunks."""
    median_us = {(row["engine"], row["shape"]): row["median_us"] for row in rows}
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    engines = dict.fromkeys(row["engine"] for row in rows)
    lines = [[engine, *(f"{median_us[engine, shape]:.1f}" for shape in shapes)] for engine in engines]
    return table(["", *shapes], lines)


def errors(rows: list[dict[str, Any]], demo: list[dict[str, Any]]) -> str:
    """Return the table of the largest errors."""
    max_error = {(row["engine"], row["weights"], row["network"]): row["max_error"] for row in rows}
    demo_rows = {(row["engine"], row["weights"]): row for row in demo}
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = []
    for engine, weights in dict.fromkeys((row["engine"], row["weights"]) for row in rows):
        cells = [f"{max_error[engine, weights, network]:.0e}" for network in networks]
        row = demo_rows.get((engine, weights))
        cells += (
            [f"{row['max_error']:.0e} ({row['window_error']:.0e})", f"{row['labels_differing']} of {row['windows']}"]
            if row
            else ["", ""]
        )
        lines.append([f"{engine} {weights}", *cells])
    return table(["", *networks, "demo", "demo: different labels"], lines)


def main() -> None:
    """Replace the tables between their markers."""
    results = json.loads((ROOT / "benchmarks" / "exported.json").read_text())
    tables = {
        "steps": steps(results["steps"]),
        "chunks": chunks(results["chunks"]),
        "errors": errors(results["errors"], results["demo"]),
    }
    text = PAGE.read_text()
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
        before, rest = text.split(begin)
        text = before + begin + content + end + rest.split(end)[1]
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
