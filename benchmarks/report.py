"""Prints tables from result files, or writes those of README and docs/.

    python -m benchmarks.report benchmarks/results/reward.json benchmarks/results/step.json
    python -m benchmarks.report --pages         # tables of README and docs/, and plots

Printed together, files of different machines or versions are refused: their times say nothing about each other.
"""

import argparse
from pathlib import Path
from typing import Any

from pmc_fast.bench import results
from pmc_fast.errors import PMCError

MUST_AGREE = ("machine", "versions")


def load(paths: list[Path]) -> list[dict[str, Any]]:
    """Read result files; SystemExit with one line if they do not belong together."""
    try:
        documents = {str(path): results.read(path) for path in paths}
        if documents:
            results.require_alike(documents, *MUST_AGREE)
    except PMCError as error:
        raise SystemExit(f"benchmarks.report: {error}") from error
    return list(documents.values())


def table(document: dict[str, Any]) -> str:
    """Return one suite's results as a Markdown table, times relative to each contest's first contestant."""
    lines = [
        f"### {document['suite']}",
        "",
        "| case | contestant | median | quartiles | x | peak memory |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in document["results"]:
        contestants = result.get("contestants")  # runs end to end have a report of their own
        if not contestants:
            continue
        base = next(iter(contestants.values()))["median_s"]
        for i, (name, c) in enumerate(contestants.items()):
            low, high = c["quartiles_s"]
            peak = "-" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**20:.1f} MiB"
            lines.append(
                f"| {result['name'] if i == 0 else ''} | {name} | {_seconds(c['median_s'])} "
                f"| {_seconds(low)} - {_seconds(high)} | {c['median_s'] / base:.2f} | {peak} |"
            )
    m, v = document["machine"], document["versions"]
    device = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
    lines += ["", f"{device}; torch {v['torch']}, commit {document['commit']}, {document['date']}", ""]
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of the files named on the command line, or write those of README and docs/."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--pages", action="store_true", help="write the tables of README and docs/ and the plots again"
    )
    given = parser.parse_args(arguments)
    if not given.files and not given.pages:
        parser.error("name result files, or --pages")
    for document in load(given.files):
        print(table(document))
    if given.pages:
        from . import kernels_page, readme, suites

        readme.rewrite()
        page = kernels_page.PAGE
        page.write_text(kernels_page.fill(page.read_text(encoding="utf-8"), suites.load()), encoding="utf-8")


if __name__ == "__main__":
    main()
