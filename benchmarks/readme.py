"""README's tables and plots, from the result files: what stands between `<!-- bench:NAME -->` and `<!-- /bench -->`.

    python -m benchmarks.report --readme

A row whose result is not there is left out, a table without any is a line that says what makes it. Words around the
tables are written by hand.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import compare_report, end_to_end, gpu_page, harness

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Documents = Mapping[str, dict[str, Any]]


class Missing(KeyError):
    """A result that a row needs is not there."""


class Suites:
    """Result files by suite."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents

    def results(self, suite: str) -> list[dict[str, Any]]:
        return self.documents[suite]["results"] if suite in self.documents else []

    def case(self, suite: str, name: str) -> dict[str, Any]:
        """Return the result whose name begins with `name`."""
        for result in self.results(suite):
            if result.get("name", "").startswith(name):
                return result
        raise Missing(f"{suite}: {name}")

    def value(self, suite: str, name: str, who: str, key: str = "median_s") -> float:
        found = self.case(suite, name)["contestants"].get(who, {}).get(key)
        if found is None:
            raise Missing(f"{suite}: {name}: {who}")
        return float(found)

    def best(self, suite: str, name: str, who: str) -> tuple[str, float]:
        """Return the fastest of the contestants whose names begin with `who`, and its seconds."""
        of = self.case(suite, name)["contestants"]
        found = {n: float(c["median_s"]) for n, c in of.items() if n.startswith(who)}
        if not found:
            raise Missing(f"{suite}: {name}: {who}")
        return min(found.items(), key=lambda item: item[1])


Cell = str | Callable[[Suites], str]  # of a table's row


def times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 2 else f"{ratio:.1f} x"


def less(ratio: float) -> str:
    return f"{times(ratio)} less"


def machines(documents: list[dict[str, Any]]) -> str:
    """Return what results were measured on, each machine once."""
    seen = []
    for d in documents:
        m, v = d["machine"], d["versions"]
        device = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
        form = "; short form" if d.get("facts", {}).get("short") else ""
        seen.append(f"{device}, torch {v['torch']}, transformers {v['transformers']}{form}")
    return "; ".join(dict.fromkeys(seen))


# --- the CPU suites


def _against(suite: str, name: str, who: str, theirs: str, key: str = "median_s") -> Callable[[Suites], str]:
    return lambda s: less(s.value(suite, name, theirs, key) / s.value(suite, name, who, key))


def _nll(name: str, theirs: str = "torch eager", who: str = "pmc_fast") -> tuple[Cell, Cell]:
    """Return the time and memory cells of a case of weighted_nll."""
    time, memory = (_against("weighted_nll", name, who, theirs, key) for key in ("median_s", "peak_bytes"))
    return time, memory


def _gemms(s: Suites) -> str:
    names = [f"M {count}, forward + backward" for count in (500, 1600)]
    who = ("three GEMMs alone", "pmc_fast")
    shares = [s.value("weighted_nll", n, who[0]) / s.value("weighted_nll", n, who[1]) for n in names]
    return f"{', '.join(f'{share:.0%}'.replace('%', ' %') for share in shares)} of their rate"


def _step(s: Suites) -> str:
    theirs, ours = (s.value("step", "training step", who) for who in ("reference", "pmc_fast"))
    return f"{less(theirs / ours)} ({theirs:.1f} s, {ours:.1f} s)"


def _step_memory(s: Suites) -> str:
    peaks = s.case("step", "training step")["facts"]["peak_bytes_of_loss_and_backward"]
    theirs, ours = peaks["reference"], peaks["pmc_fast"]
    return f"{less(theirs / ours)} ({theirs / 1e9:.1f}, {ours / 1e9:.1f} GB)"


def _lora(s: Suites) -> str:
    full = s.value("step", "LoRA", "full")
    few, all_ = (full / s.value("step", "LoRA", f"LoRA r 16, {which}") for which in ("q and v", "all linear layers"))
    return f"{less(few)} ({times(all_)})"


def _trainers(s: Suites) -> str:
    who = ("PMCTrainer", "accelerate", "TRL", "OpenUnlearning")
    name = "3 steps in other trainers"
    shares = [s.value("integrations", name, w) / s.value("integrations", name, "core") for w in who]
    return ", ".join(f"{share:.2f}" for share in shares) + " x"


def _rollout(name: str) -> Callable[[Suites], str]:
    def cell(s: Suites) -> str:
        theirs = s.value("rollout", name, "generate")
        ours, drafts = (theirs / s.value("rollout", name, who) for who in ("pmc_fast", "pmc_fast, drafts"))
        return f"{less(ours)}, with drafts {times(drafts)}"

    return cell


def _rollout_memory(name: str) -> Callable[[Suites], str]:
    def cell(s: Suites) -> str:
        peaks = s.case("rollout", name)["facts"]["peak_bytes_of_a_first_call"]
        return less(peaks["generate"] / peaks["pmc_fast"])

    return cell


def _all_differ(s: Suites) -> str:
    """Time, and time a sampled token: the two draw different samples."""
    name = "does not know the facts"
    ratio = s.value("rollout", name, "generate") / s.value("rollout", name, "pmc_fast")
    facts = s.case("rollout", name)["facts"]
    tokens = facts["counters"]["pmc_fast"]["sampled_tokens"] / facts["generate_tokens"]
    return f"{less(ratio)} ({times(ratio * tokens)} a token)"


def _best(suite: str, name: str, who: str) -> Callable[[Suites], str]:
    return lambda s: less(s.best(suite, name, who)[1] / s.value(suite, name, "pmc_fast"))


def _best_name(suite: str, name: str, who: str, label: str) -> Callable[[Suites], str]:
    return lambda s: label.format(s.best(suite, name, who)[0].removeprefix(who).strip(" ,"))


def _attack(name: str) -> Callable[[Suites], str]:
    """Return how often which questions are asked, as the suite has named its case."""
    return lambda s: f"leak attack: {s.case('leakage', name)['name']}"


GREEDY, ASKED, SCORED = "greedy, 140 questions", "evaluation, 160 questions", "likelihoods, 20 questions x 7 answers"
ROWS: list[tuple[Cell, Cell, Cell, Cell]] = [
    ("`rouge_l_recall`, 320 candidates x 40 words, words seen before", "rouge_score",
     _against("reward", "320 candidates", "pmc_fast", "rouge_score"), ""),
    ("the same, no word seen before", "rouge_score",
     _against("reward", "320 candidates", "pmc_fast, new words", "rouge_score"), ""),
    ("`weighted_nll`, 8 x 200 padded, 496 count, forward + backward", "torch eager", *_nll("8 x 200 padded")),
    ("`weighted_nll`, 500 valid rows", "torch eager", *_nll("M 500, forward + backward")),
    ("`weighted_nll`, 1600 valid rows", "torch eager", *_nll("M 1600, forward + backward")),
    ("the same two, three bare GEMMs of that size", "", _gemms, ""),
    ("`weighted_nll`, 500 rows, frozen head", "full head",
     *_nll("M 500, frozen head", "pmc_fast, full", "pmc_fast, frozen")),
    ("`weighted_nll`, 8 questions x 20 samples in one call", "20 eager passes",
     *_nll("8 questions x 20 samples", "torch eager, 20 passes", "pmc_fast, one call")),
    ("training step, 8 questions + 8 retain rows", "reference (padded to 200, third forward)", _step, _step_memory),
    ("training step with LoRA r 16 on q and v (all linear layers)", "full fine-tuning", _lora, ""),
    ("training step in PMCTrainer, accelerate, TRL, OpenUnlearning (stand-in)", "the core's", _trainers, ""),
    ("rollouts, model that knows the facts, T 0.9", "generate", _rollout("knows the facts, T 0.9"),
     _rollout_memory("knows the facts, T 0.9")),
    ("rollouts, the same, T 1.25", "generate", _rollout("knows the facts, T 1.25"), ""),
    ("rollouts, model without the facts, T 0.9", "generate", _all_differ, _rollout_memory("does not know the facts")),
    ("greedy answers to 140 questions, token-identical",
     _best_name("rollout", GREEDY, "generate, batches of", "generate, its best batch size ({})"),
     _best("rollout", GREEDY, "generate"), ""),
    ("evaluation: 160 questions answered and scored",
     _best_name("evaluation", ASKED, "generate, batches of", "generate, its best batches ({})"),
     _best("evaluation", ASKED, "generate"), ""),
    ("likelihoods of 7 answers to 20 questions",
     _best_name("evaluation", SCORED, "padded batches of", "padded batches of {}"),
     _best("evaluation", SCORED, "padded"), ""),
    (_attack("sampling"), "generate", _best("leakage", "sampling", "generate"), ""),
    (_attack("prefill"), "generate", _best("leakage", "prefill", "generate"), ""),
    (_attack("after unlearning"), "generate", _best("leakage", "after unlearning", "generate"), ""),
]  # fmt: skip
CPU_SUITES = ("reward", "weighted_nll", "step", "integrations", "rollout", "evaluation", "leakage")


def cpu_table(suites: Suites) -> str:
    lines = []
    for row in ROWS:
        try:
            lines.append(f"| {' | '.join(cell if isinstance(cell, str) else cell(suites) for cell in row)} |")
        except Missing:
            continue
    if not lines:
        return "Not measured yet: `make bench`."
    measured = machines([suites.documents[name] for name in CPU_SUITES if name in suites.documents])
    head = ["| CPU benchmark (`make bench`) | against | time | memory |", "|---|---|---:|---:|"]
    return "\n".join([*head, *lines, "", f"Measured on {measured}."])


# --- whole runs


def demo_table(suites: Suites) -> str:
    """Return what the demo ends with: seed 0 of whole runs."""
    runs = [r for r in suites.results("end_to_end") if (r["method"], r["seed"]) == ("pmc_fast", 0)]
    if not runs:
        return "Not measured yet: `python -m benchmarks.end_to_end`."
    lines = [
        "| run | unlearn quality | utility | R(retain) | words an answer | under 3 words |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for label, p in (("before", runs[0]["curve"][0]), ("`make demo`: pmc_fast, seed 0", runs[0]["curve"][-1])):
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
        f"| seed | seconds | to unlearn and record | to verify | steps | unlearn quality | R(retain) | under 3 words "
        f"| worst of {runs[0]['samples']} samples | questions that leak |",
        "|---:|" + "---:|" * 9,
    ]
    for r in runs:
        after, leak = r["metrics"]["after"], r["verified"]["sampling"]
        lines.append(
            f"| {r['seed']} | {r['seconds']:.0f} | {r['unlearn_s']:.0f} | {r['verify_s']:.0f} | {r['steps']} "
            f"| {after['unlearn_quality']:.1f} | {after['sets']['retain']['rouge_l_recall']:.3f} "
            f"| {100 * after['sets']['forget']['degenerate']:.0f} % | {leak['worst']['value']:.3f} "
            f"| {100 * leak['leaking_questions']:.0f} % |"
        )
    return "\n".join(lines)


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


def _compared(make: Callable[[list[dict[str, Any]]], str]) -> Callable[[Suites], str]:
    def block(suites: Suites) -> str:
        runs = suites.results("compare_methods")
        return make(runs) if runs else "Not measured yet: `python -m benchmarks.compare_methods`."

    return block


BLOCKS: dict[str, Callable[[Suites], str]] = {
    "demo": demo_table,
    "end_to_end": runs_table,
    "drop_ins": drop_ins_table,
    "cpu": cpu_table,
    "request": request_table,
    "skip": skip_table,
    "gpu": lambda suites: gpu_page.table(suites.documents.get("gpu")),
    "compare_methods": _compared(compare_report.table),
    "compare_grids": _compared(compare_report.grid_table),
    "retain_weight": _compared(compare_report.retain_weight_table),
}


def load(directory: Path = harness.RESULTS) -> Suites:
    files = sorted(directory.glob("*.json"))
    return Suites({f.stem: json.loads(f.read_text(encoding="utf-8")) for f in files})


def fill(text: str, suites: Suites) -> str:
    """Return a text with its blocks made anew; SystemExit names a block that nobody makes."""

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise SystemExit(f"benchmarks.report: README asks for bench:{match[2]}; there are {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[match[2]](suites)}\n{match[3]}"

    return BLOCK.sub(block, text)


def rewrite(path: Path = README, directory: Path = harness.RESULTS) -> None:
    """Write README's tables and the plots again from the result files."""
    suites = load(directory)
    path.write_text(fill(path.read_text(encoding="utf-8"), suites), encoding="utf-8")
    if runs := suites.results("end_to_end"):
        end_to_end.plot(runs)
    if runs := suites.results("compare_methods"):
        compare_report.draw(runs, directory / "compare_methods.svg")
