"""The measured tables of docs/kernels.md, from the result files that their first heads link to.

    python -m benchmarks.report --pages     # writes them again, with those of the other pages

The page decides on rows, columns and digits.
"""

import re
from pathlib import Path
from typing import Any

from .suites import Suites

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
TABLE = re.compile(r"^\| \[`results/([\w-]+)\.json`\][^\n]*\n\|[-:|]+\n(?:\|[^\n]*\n)+", re.MULTILINE)


def measured(result: dict[str, Any], contestant: str, column: str) -> float:
    """Return what a column shows of a contestant: a time, a peak, a rate or a counter."""
    found, facts = result["contestants"][contestant], result["facts"]
    match column:
        case "seconds":
            return found["median_s"]
        case "MB":
            return found["peak_bytes"] / 1e6
        case "GFLOP/s":  # of weighted_nll, forward and backward, on SmolLM2-135M's head
            return 6 * facts["M"] * 49152 * 576 / found["median_s"] / 1e9
        case counter:
            return facts["counters"].get(contestant, facts["counters"])[counter]


def fill(text: str, suites: Suites) -> str:
    """Return the page with the numbers of its measured tables made anew; KeyError: a row has no result."""

    def table(match: re.Match[str]) -> str:
        head, rule, *rows = match[0].splitlines()
        columns = _cells(head)[2:]
        results = {r["name"]: r for r in suites.results(match[1])}
        name, lines = "", [head, rule]
        for first, contestant, *shown in map(_cells, rows):
            name = first or name
            made = [
                _like(old, measured(results[name], contestant, column)) if old else ""
                for old, column in zip(shown, columns, strict=True)
            ]
            lines.append("| " + " | ".join([first, contestant, *made]) + " |")
        return "\n".join(re.sub(r"\|  (?=\|)", "| ", line) for line in lines) + "\n"

    return TABLE.sub(table, text)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def _like(old: str, value: float) -> str:
    """Return a number with as many digits as another one's text, thousands set apart."""
    return f"{value:,.{len(old.partition('.')[2])}f}"
