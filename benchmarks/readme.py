"""The tables and plots of README and docs/, from the result files: what stands between `<!-- bench:NAME -->` and
`<!-- /bench -->`.

    python -m benchmarks.report --pages

A row without a result is left out; a table without any becomes a line that names the command that makes it. The words
around the tables are written by hand.
"""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from pmc_fast.bench.table import duration
from pmc_fast.cli.bench import measured_on, table_of

from . import busy_core, compare_report, end_to_end, gpu_page, harness, methods, peers
from .cpu_page import cpu_table
from .suites import Missing, Suites, few_rounds, load, ranged

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


# --- the first tables of README

QUICK_ROWS = ("tokens/s", "seconds", "peak memory")

SUMMARY = [  # what, suite, case, whose time it is compared with
    ("Llama-3.2-3B, rollouts of 8 questions x 20", "gpu", "Llama-3.2-3B: rollouts", "generate"),
    ("Llama-3.2-3B, loss and backward, 8 + 8 rows", "gpu", "Llama-3.2-3B: loss", "reference"),
    ("SmolLM2-135M, rollouts of 8 questions x 20", "gpu", "SmolLM2-135M: rollouts", "generate"),
    ("SmolLM2-135M, loss and backward, 8 + 8 rows", "gpu", "SmolLM2-135M: loss", "reference"),
    ("SmolLM2-135M, rollouts, facts known", "rollout", "knows the facts, T 0.9", "generate"),
    ("SmolLM2-135M, rollouts, facts not known", "rollout", "does not know the facts", "generate"),
    ("SmolLM2-135M, training step, 8 + 8 rows", "step", "training step", "reference"),
]


def summary_table(suites: Suites) -> str:
    """Return seconds on a card and on a CPU beside those of generate and of the published algorithm."""
    rows = []
    for what, suite, name, theirs in SUMMARY:
        try:
            ours, other = (suites.value(suite, name, who) for who in ("pmc_fast", theirs))
        except Missing:
            continue
        found = suites.case(suite, name)["contestants"]
        on_card = suites.documents[suite]["machine"]["gpu"]
        shown = [ranged(found[who]) if on_card else duration(found[who]["median_s"]) for who in ("pmc_fast", theirs)]
        few = few_rounds(found["pmc_fast"]) if on_card else ""
        rows.append((what + (f" ({few})" if few else ""), suites.documents[suite], shown, other / ours))
    if runs := suites.results("end_to_end"):
        whole, published = (
            mean([r["seconds"] for r in runs if r["method"] == method]) for method in ("pmc_fast", "reference")
        )
        shown = [duration(whole), duration(published)]
        rows.append(("SmolLM2-135M, whole run, mean", suites.documents["end_to_end"], shown, published / whole))
    if not rows:
        return "Not measured yet: `make bench`."
    lines = ["| | on | pmc_fast | baseline | speed-up |", "|---|---|---:|---:|---:|"]
    for what, document, (mine, baseline), ratio in rows:
        m = document["machine"]
        where = m["gpu"].removeprefix("NVIDIA ").split(" ")[0] if m["gpu"] else f"{m['threads']} CPU cores"
        lines.append(f"| {what} | {where} | {mine} | {baseline} | {ratio:.1f} x |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- whole runs


def quick_table(suites: Suites) -> str:
    """Return what `pmc-fast bench --quick --json benchmarks/results/bench.json` measured, shortened."""
    if "bench" not in suites.documents:
        return "Not measured yet: `pmc-fast bench --quick`."
    made, text = suites.documents["bench"], io.StringIO()
    Console(file=text, width=100).print(table_of(made, QUICK_ROWS))
    table = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    s, m = made["facts"]["settings"], made["facts"]["model"]
    return (
        f"```text\n{table}\n{m['name']}, {m['compute_dtype']}; medians (smallest - largest) of {s['rounds']} rounds\n"
        f"{measured_on(made)}\n```"
    )


def demo_table(suites: Suites) -> str:
    """Return what the demo ends with: seed 0 of whole runs."""
    runs = [r for r in suites.results("end_to_end") if (r["method"], r["seed"]) == ("pmc_fast", 0)]
    if not runs:
        return "Not measured yet: `python -m benchmarks.end_to_end`."
    lines = [
        "| run | unlearn quality | utility | R(retain) | words an answer | under 3 words |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, p in (("before", runs[0]["curve"][0]), ("pmc_fast, preset `small`, seed 0", runs[0]["curve"][-1])):
        forget = p["sets"]["forget"]
        lines.append(
            f"| {label} | {p['unlearn_quality']:.1f} | {p['utility']:.1f} | {p['sets']['retain']['rouge_l_recall']:.3f} "
            f"| {forget['mean_words']:.1f} | {100 * forget['degenerate']:.0f} % |"
        )
    return "\n".join(lines)


def runs_table(suites: Suites) -> str:
    runs = [r for r in suites.results("end_to_end") if r["method"] in end_to_end.COMPARED]
    return end_to_end.table(runs) if runs else "Not measured yet: `python -m benchmarks.end_to_end`."


def drop_ins_table(suites: Suites) -> str:
    runs = [
        r for r in suites.results("end_to_end") if r["method"] not in end_to_end.COMPARED or r["method"] == "pmc_fast"
    ]
    seeds = {r["seed"] for r in runs if r["method"] != "pmc_fast"}
    runs = [r for r in runs if r["seed"] in seeds]
    return (
        end_to_end.table(runs)
        if runs
        else "Not measured yet: `python -m benchmarks.end_to_end --methods plain trl open_unlearning`."
    )


def request_table(suites: Suites) -> str:
    runs = suites.results("request")
    if not runs:
        return "Not measured yet: `python -m benchmarks.request`."
    lines = [
        f"| seed | seconds | to unlearn and record | to verify | steps | unlearn quality | R(retain) | say nothing "
        f"| worst of {runs[0]['samples']} samples | questions that leak |",
        "|---:|" + "---:|" * 9,
    ]
    for r in runs:
        after, leak = r["metrics"]["after"], r["verified"]["sampling"]
        lines.append(
            f"| {r['seed']} | {r['seconds']:.0f} | {r['unlearn_s']:.0f} | {r['verify_s']:.0f} | {r['steps']} "
            f"| {after['unlearn_quality']:.1f} | {after['sets']['retain']['rouge_l_recall']:.3f} "
            f"| {100 * after['sets']['forget']['says_nothing']:.0f} % | {leak['worst']['value']:.3f} "
            f"| {100 * leak['leaking_questions']:.0f} % |"
        )
    return "\n".join(lines)


WARM_PARTS = {  # of a request's time, by what the names of its stages begin with
    "before the first stage: imports, waiting": (),
    "data, model, stack": ("checking", "loading", "stacking"),
    "known questions, initial answers": ("looking", "initial"),
    "evaluation before and after": ("evaluation",),
    "training": ("unlearning",),
    "merging, report, saving": ("merging", "rendering", "saving"),
    "verification: the questions and the attack": ("request", "what was to be kept"),
}


def request_warm_table(suites: Suites) -> str:
    """Return the parts of a request's time, sent to a worker, beside those of the commands with the same seed."""
    warm, cold = ({r["seed"]: r for r in suites.results(name)} for name in ("request_warm", "request"))
    cold = {seed: r for seed, r in cold.items() if "verify_stage_seconds" in r}
    if not warm.keys() & cold.keys():
        return "Not measured yet: `python -m benchmarks.request` and then `python -m benchmarks.request --warm`."
    seed = min(warm.keys() & cold.keys())
    stages = [_cold_stages(cold[seed]), _warm_stages(warm[seed])]
    totals = [r[seed]["seconds"] for r in (cold, warm)]
    lines = [f"| seconds, seed {seed} | commands | worker |", "|---|---:|---:|"]
    for part, begins in WARM_PARTS.items():
        found = [sum(s for name, s in of if name.startswith(begins)) if begins else 0.0 for of in stages]
        if not begins:  # what no stage counts
            found = [total - sum(s for _, s in of) for total, of in zip(totals, stages, strict=True)]
        lines.append(f"| {part} | {found[0]:.1f} | {found[1]:.1f} |")
    same = "the same" if warm[seed]["adapter"] == cold[seed].get("adapter") else "another"
    lines.append(f"| together ({same} adapter) | {totals[0]:.1f} | {totals[1]:.1f} |")
    return "\n".join(lines)


def _cold_stages(r: dict[str, Any]) -> list[tuple[str, float]]:
    return [*r["stage_seconds"].items(), *r["verify_stage_seconds"].items()]


def _warm_stages(r: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name.split(": ", 1)[1], s) for name, s in r["parts"].items() if ": " in name]


def skip_table(suites: Suites) -> str:
    """Return a run that leaves out what is known to be forgotten beside one that does not."""
    runs = [r for r in suites.results("skip") if "runs" in r["facts"]]
    if not runs:
        return "Not measured yet: `python -m pytest benchmarks/test_skip.py`."
    lines = [
        "| | left out | steps | seconds | R(forget), taught | R(forget), not taught | R(paraphrased) | R(retain) |",
        "|---|" + "---:|" * 7,
    ]
    for label, key in (("all questions", "without"), ("`--skip-known-forgotten`", "skip_known_forgotten")):
        r = runs[0]["facts"]["runs"][key]
        numbers = [*(r["forget_recall"][kind] for kind in ("taught", "untaught")),
                   *(r["recalls"][name] for name in ("forget_paraphrased", "retain"))]  # fmt: skip
        recalls = " | ".join(f"{number:.3f}" for number in numbers)
        lines.append(f"| {label} | {r['left_out']} | {r['steps']} | {r['seconds']:.0f} | {recalls} |")
    return "\n".join(lines)


# files of compare_methods' results, and which of its tables are shown
COMPARISONS = {
    "compare_seven": ("final", "intervals", "tuning"),
    "compare_epyc": ("final", "tuning"),
    "compare_methods": ("final", "tuning"),
    "compare_extensions": ("ablation",),
}


def _compared(suite: str, table: str) -> Callable[[Suites], str]:
    def block(suites: Suites) -> str:
        runs = suites.results(suite)
        how = f"{'--ablate ' if table == 'ablation' else ''}--json benchmarks/results/{suite}.json"
        missing = f"Not measured yet: `python -m benchmarks.compare_methods {how}`."
        return compare_report.TABLES[table](runs) if runs else missing

    return block


BLOCKS: dict[str, Callable[[Suites], str]] = {
    "summary": summary_table,
    "quick": quick_table,
    "demo": demo_table,
    "end_to_end": runs_table,
    "drop_ins": drop_ins_table,
    "cpu": cpu_table,
    "peers": peers.table,
    "request": request_table,
    "request_warm": request_warm_table,
    "skip": skip_table,
    "busy_core": lambda suites: busy_core.table({r["name"]: r for r in suites.results("busy_core")}),
    "gpu": lambda suites: gpu_page.table(suites.documents.get("gpu")),
    "methods": methods.time_table,
    "methods_trained": methods.train_table,
    **{f"{suite}_{table}": _compared(suite, table) for suite, tables in COMPARISONS.items() for table in tables},
}


def fill(text: str, suites: Suites) -> str:
    """Return a text with its blocks made anew; SystemExit names a block that nobody makes."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise SystemExit(f"benchmarks.report: a page asks for bench:{match[2]}; there are {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[match[2]](suites)}\n{match[3]}"

    return BLOCK.sub(block, text)


def pages() -> list[Path]:
    """Return README and the pages of docs/ that have such blocks."""
    return [p for p in (README, *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(p.read_text(encoding="utf-8"))]


def rewrite() -> None:
    """Write the tables of all pages and the plots again from the result files."""
    suites = load()
    for page in pages():
        page.write_text(fill(page.read_text(encoding="utf-8"), suites), encoding="utf-8")
    if runs := suites.results("end_to_end"):
        end_to_end.plot(runs)
    for suite, tables in COMPARISONS.items():
        if "final" in tables and (runs := suites.results(suite)):
            compare_report.draw(runs, harness.RESULTS / f"{suite}.svg")
