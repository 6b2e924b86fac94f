"""The table of the CPU benchmarks, a row for each case that has a result."""

from collections.abc import Callable

from pmc_fast.bench.table import times

from .suites import Missing, Suites, less, machines

Cell = str | Callable[[Suites], str]  # of a table's row


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
