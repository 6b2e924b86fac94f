"""The table of what was measured on a card, from `python -m benchmarks.gpu --short`."""

from typing import Any

from pmc_fast.bench.table import duration

from .suites import few_rounds, ranged

COMMAND = "`python -m benchmarks.gpu --short`"


def table(document: dict[str, Any] | None) -> str:
    """Return a row for each contest and for the demo's task, with the card's name below."""
    if document is None:
        return f"Not measured yet: {COMMAND} on a machine with a GPU."
    lines = ["| | pmc_fast | Hugging Face | x |", "|---|---:|---:|---:|"]
    runs: list[dict[str, Any]] = []
    for result in document["results"]:
        if "contestants" not in result:
            runs.append(result)
            continue
        contestants = dict(result["contestants"])
        ours = contestants.pop("pmc_fast")
        theirs = min(contestants.values(), key=lambda c: float(c["median_s"]))
        counters = result["facts"].get("counters")
        speed = f", {counters['sampled_tokens'] / ours['median_s']:,.0f} tokens/s" if counters else ""
        few = few_rounds(ours)
        name = result["name"] + (f" ({few})" if few else "")
        lines.append(
            f"| {name} | {ranged(ours)}{speed} | {ranged(theirs)} | {theirs['median_s'] / ours['median_s']:.1f} |"
        )
    by = {(r["method"], r["steps"]): r for r in runs}
    for (method, steps), r in by.items():
        if method != "pmc_fast":
            continue
        end = r["curve"][-1]
        name, ours = f"the demo's task, {steps} steps", duration(r["seconds"])
        theirs = by.get(("reference", steps))
        if theirs:
            lines.append(
                f"| {name} | {ours} | {duration(theirs['seconds'])} | {theirs['seconds'] / r['seconds']:.1f} |"
            )
        else:
            quality = f"quality {end['unlearn_quality']:.1f}, utility {end['utility']:.1f}"
            lines.append(f"| {name}: {quality} | {ours} | not run | |")
    m, v = document["machine"], document["versions"]
    lines += [
        "",
        f"Measured on one {m['gpu']}, torch {v['torch']}, transformers {v['transformers']}, bfloat16; medians (smallest - largest).",
    ]
    return "\n".join(lines)
