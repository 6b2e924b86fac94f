"""A step of each method of `pmc_fast.methods`, and of PMC's training part, against the same loss in plain padded torch.

    python -m benchmarks.methods                     # time and peak memory of 8 forget + 8 retain pairs
    python -m benchmarks.methods --train 15          # instead: what 15 steps do to each method's own objective

Needs the demo's model, which knows the facts (`make demo DEMO=--short` makes it). A step is its gradients, without the
optimizer. Before they are timed, losses and gradients of both must agree. A number of log-probs that a method needs of the
untouched model is computed before the step; its copy, where a method holds one, counts for neither side, and what it computes of a pair,
which ours keeps, is computed in every step of both.
"""

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.demo_model import finetuned_model
from pmc_fast.bench import measure
from pmc_fast.bench import results as files
from pmc_fast.bench.contests import same_numbers
from pmc_fast.bench.table import OURS, duration, few_rounds, ranged, size, times
from pmc_fast.config import PMCConfig
from pmc_fast.data import Encoded, collate, load_rows
from pmc_fast.data.packing import num_targets
from pmc_fast.errors import PMCError
from pmc_fast.methods import METHODS, Memorize, Method, Unlearner, extrapolate
from pmc_fast.models.context import tolerance

from . import harness
from .plain_methods import Plain
from .settings import TOFU, StepSetting
from .suites import Suites, machines

PLAIN = "plain torch"
KNOWN: dict[str, type[Method]] = {**METHODS, "memorize": Memorize}
NAMES = ("pmc", *KNOWN)
COUNT = 8
MOVED = 0.05  # of a weight's deviation: how far training has come, so that no divergence is 0
ALPHA = 4.0  # of the extrapolation


# --- one step, both ways


@dataclasses.dataclass
class Step:
    """Both ways to a step's gradients: each adds them to `.grad` and returns the loss."""

    ours: Callable[[], float]
    plain: Callable[[], float]
    warm_up: Callable[[], Any]  # ours, on less: what a first pass takes for good is in no peak
    facts: dict[str, int]  # tokens: what is in the sequences, what a padded batch holds, what is trained


def step_of(name: str, model: Any, tokenizer: Any, path: Path, count: int = COUNT) -> Step:
    """Return both ways to a method's step on an untouched model, with what both need of it."""
    config = PMCConfig(prompt_format="tags", retain_weight=1.25)
    forget, retain = (load_rows(f"{TOFU}/{file}.jsonl", answers=True)[:count] for file in ("forget20", "retain60"))
    if name == "pmc":  # picked samples are as long as the true answers
        setting = StepSetting(path, count, model=model, sampled=False)
        batches = {"forget": [of for [of] in setting.step.answers], "retain": setting.kept}

        def ours() -> float:
            loss = setting.pmc.loss(setting.step, setting.kept).loss
            loss.backward()
            return loss.item()

        method: Any = setting.config

        def warm_up() -> Any:
            return setting.pmc.loss(setting.pmc.sample([0]), setting.kept[:1]).loss.backward()

    else:
        method = KNOWN[name]()
        task = Unlearner(model, tokenizer, config, method, forget)
        kept = [task.encoder.pair(row.question, row.answer or "") for row in retain]
        task.prepare()
        batches = {str(kind): of for kind, of in task.answers.items()}
        if method.retain_weight or any(method.divergences):
            batches["retain"] = kept

        def ours() -> float:
            if task.teacher is not None:
                task.teacher.drop_rows()
            return task.backward(range(count), kept)

        warm_up = lambda: task.backward([0], kept[:1])  # noqa: E731
    pad = tokenizer.pad_token_id
    padded = {
        kind: {k: v.to(model.device) for k, v in collate(sequences, pad).items()}
        for kind, sequences in batches.items()
    }
    return Step(ours, Plain(name, method, model, padded).backward, warm_up, token_counts(list(batches.values())))


def token_counts(batches: Sequence[Sequence[Encoded]]) -> dict[str, int]:
    sizes = [[len(s.input_ids) for s in batch] for batch in batches]
    return {
        "tokens": sum(map(sum, sizes)),
        "padded_tokens": sum(len(of) * max(of) for of in sizes),
        "targets": sum(num_targets(s) for batch in batches for s in batch),
    }


@torch.no_grad()
def move(model: Any, by: float = MOVED) -> None:
    """Move the weights as training does, the same way each time."""
    for i, p in enumerate(model.parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.device, p.dtype)
        p += by * p.float().std().to(p.dtype) * noise


def agree(model: Any, step: Step) -> tuple[dict[str, float], dict[str, int | None]]:
    """Compare losses, and gradients by the norm of their difference; return what was found, and peaks.

    Raises
    ------
    PMCError
        They differ by more than rounding.
    """
    dtype, losses = next(model.parameters()).dtype, list[float]()
    model.zero_grad()
    peaks = {OURS: measure.peak_bytes(lambda: losses.append(step.ours()), model.device)}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    peaks[PLAIN] = measure.peak_bytes(lambda: losses.append(step.plain()), model.device)
    ours, plain = losses
    same_numbers("losses", ours, plain, max(abs(ours), 1.0) * tolerance(dtype).logps)
    apart, whole = 0.0, 0.0
    for mine, p in zip(gradients, model.parameters(), strict=True):
        theirs = p.grad.double()
        apart += float((theirs if mine is None else mine.double() - theirs).square().sum())
        whole += float(theirs.square().sum())
    apart = (apart / whole) ** 0.5
    model.zero_grad()
    if not apart <= tolerance(dtype).gradients:
        raise PMCError(f"gradients of pmc_fast and the plain step differ by {apart:.2g} of their norm: not compared")
    return {"loss": ours, "plain_loss": plain, "gradients_apart": apart}, peaks


def contest(name: str, model: Any, tokenizer: Any, path: Path, rounds: int, count: int = COUNT) -> dict[str, Any]:
    """Return one method's times and peaks, both ways, on a model that is put back as it was."""
    device = model.device
    untouched = copy.deepcopy(model.state_dict())
    try:
        step = step_of(name, model, tokenizer, path, count)
        move(model)
        model.train()
        step.warm_up()
        found, peaks = agree(model, step)

        def cleared(backward: Callable[[], float]) -> measure.Contestant:
            def run() -> None:
                try:
                    backward()
                finally:
                    model.zero_grad()

            return run

        ways = {OURS: cleared(step.ours), PLAIN: cleared(step.plain)}
        measured = [measure.time_round(ways, number, device) for number in range(rounds)]
    finally:
        model.load_state_dict(untouched)
    times_of = measure.summarize(measured, peaks) if rounds else {who: {"peak_bytes": n} for who, n in peaks.items()}
    return {"name": name, "facts": step.facts | found, "contestants": times_of}


# --- training


def train(
    name: str, model: Any, tokenizer: Any, steps: int, learning_rate: float, count: int = COUNT
) -> dict[str, Any]:
    """Train with a method, and return its objective and both cross-entropies on a fixed batch, before and after.

    AdamW at a constant rate; the fixed batch is of `count` + `count` pairs, of which a step trains on half, drawn anew. A memorising
    model is then extrapolated.
    """
    forget, retain = (load_rows(f"{TOFU}/{file}.jsonl", answers=True)[:count] for file in ("forget20", "retain60"))
    config = PMCConfig(prompt_format="tags")
    task = Unlearner(model, tokenizer, config, KNOWN[name](), forget)
    pairs = {
        kind: [task.encoder.pair(row.question, row.answer or "") for row in rows]
        for kind, rows in (("forget", forget), ("retain", retain))
    }

    def look() -> dict[str, float]:
        found = {"objective": task.backward(range(count), pairs["retain"])}
        model.zero_grad()
        with torch.no_grad():
            return found | {kind: float(task.packed.mean_nll(of)) for kind, of in pairs.items()}

    task.prepare()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()} if name == "memorize" else {}
    model.train()
    before = look()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    order, start = torch.Generator().manual_seed(0), time.perf_counter()
    for _ in range(steps):
        chosen, kept = (torch.randperm(count, generator=order)[: max(1, count // 2)].tolist() for _ in range(2))
        task.backward(chosen, [pairs["retain"][i] for i in kept])
        optimizer.step()
        optimizer.zero_grad()
    made: dict[str, Any] = {"name": name, "steps": steps, "learning_rate": learning_rate,
            "seconds": time.perf_counter() - start, "before": before, "after": look()}  # fmt: skip
    if weights:
        extrapolate(model, weights, ALPHA)
        made |= {"alpha": ALPHA, "extrapolated": look()}
    return made


# --- tables of docs/methods.md


def time_table(suites: Suites) -> str:
    """Return time and peak memory of each method's step beside the plain one's."""
    results = suites.results("methods")
    if not results:
        return "Not measured yet: `python -m benchmarks.methods`."
    document = suites.documents["methods"]
    pairs = document["facts"]["pairs"]
    lines = [
        f"| {pairs} + {pairs} pairs | pmc_fast | {PLAIN} | time | pmc_fast, peak | {PLAIN}, peak | memory |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        ours, plain = (r["contestants"][who] for who in (OURS, PLAIN))
        shown = [""] * 3
        if timed(r):
            shown = [ranged(c["median_s"], c["rounds_s"], duration) for c in (ours, plain)]
            shown.append(times(plain["median_s"] / ours["median_s"]))
        peaks = [c["peak_bytes"] for c in (ours, plain)]
        shown += ["" if p is None else size(p) for p in peaks]
        shown.append(times(peaks[1] / peaks[0]) if all(peaks) else "")
        few = few_rounds(len(ours.get("rounds_s", ())))
        lines.append(f"| `{r['name']}`{f' ({few})' if few else ''} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", f"Measured on {machines([document])}, {document['machine']['cpu_capability']}."])


def train_table(suites: Suites) -> str:
    """Return each method's objective and both cross-entropies before and after training."""
    results = suites.results("methods_trained")
    if not results:
        return "Not measured yet: `python -m benchmarks.methods --train 15`."
    lines = [
        "| | steps | learning rate | its objective | CE(forget) | CE(retain) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        moved = " | ".join(f"{r['before'][key]:.3f} to {r['after'][key]:.3f}" for key in r["before"])
        lines.append(f"| `{r['name']}` | {r['steps']} | {r['learning_rate']:g} | {moved} |")
        if "extrapolated" in r:
            moved = " | ".join(f"{r['extrapolated'][key]:.3f}" for key in ("forget", "retain"))
            lines.append(f"| then `extrapolate`, alpha {r['alpha']:g} | | | | {moved} |")
    return "\n".join(lines)


# --- command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--train", type=int, metavar="STEPS", help="train instead of timing")
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="of --train, constant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="by default bfloat16 on CUDA and float32 elsewhere"
    )
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="0: agreement and peaks alone")
    parser.add_argument(
        "--pairs", type=int, default=COUNT, help="to forget, and as many to keep; of these --train's steps draw half"
    )
    parser.add_argument("--short", action="store_true", help="one round, 2 + 2 pairs: a try, whose table says so")
    parser.add_argument("--model", type=Path, help="by default the demo's, which knows the facts")
    parser.add_argument(
        "--json", type=Path, help="by default methods.json or methods_trained.json in benchmarks/results"
    )
    return parser.parse_args(arguments)


def earlier(file: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a file's results by method that stay unless made again: of the same settings, machine and versions.

    Where times play no part, in training and peaks alone (`--rounds 0`), also those of another number of threads.
    """
    if not file.exists():
        return {}
    there, now = files.read(file), files.document("", [], 0, facts)
    threads = [d["machine"].pop("threads") for d in (there, now)]
    if any(there.get(part) != now[part] for part in ("facts", "machine", "versions")):
        return {}
    return {r["name"]: r for r in there["results"] if threads[0] == threads[1] or not timed(r)}


def timed(result: dict[str, Any]) -> bool:
    return "median_s" in result.get("contestants", {OURS: {}})[OURS]


def main(arguments: list[str] | None = None) -> None:
    """Measure, or train, method by method; results are written after each."""
    given = parse(arguments)
    path = given.model or finetuned_model()
    dtype = given.dtype or ("bfloat16" if given.device.startswith("cuda") else "float32")
    suite = "methods_trained" if given.train else "methods"
    file = given.json or harness.RESULTS / f"{suite}.json"
    count, rounds = (2, min(1, given.rounds)) if given.short else (given.pairs, given.rounds)
    facts = {"dtype": dtype, "model": path.name, "pairs": count} | ({"short": True} if given.short else {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def loaded() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(given.device)

    results = earlier(file, facts)

    def found(result: dict[str, Any], line: str) -> None:
        results[result["name"]] = result
        harness.write(file, suite, [results[name] for name in NAMES if name in results], facts=facts)
        print(f"{result['name']:12} {line}", flush=True)

    if given.train:
        for name in given.methods:
            if name == "pmc":  # benchmarks.end_to_end trains it
                continue
            r = train(name, loaded(), tokenizer, given.train, given.learning_rate, count)
            stages = [r[stage] for stage in ("before", "after", "extrapolated") if stage in r]
            shown = [f"{key} " + " -> ".join(f"{s[key]:.4f}" for s in stages) for key in stages[0]]
            found(r, ", ".join(shown) + f" ({r['seconds']:.0f} s)")
        return
    model = loaded()
    with harness.alone():
        for name in given.methods:
            r = contest(name, model, tokenizer, path, rounds, count)
            peaks = " and ".join(size(c["peak_bytes"] or 0) for c in r["contestants"].values())
            seconds = ""
            if timed(r):
                seconds = " and ".join(
                    ranged(c["median_s"], c["rounds_s"], duration) for c in r["contestants"].values()
                )
            found(r, f"{seconds}; {peaks}; {r['facts']}")


if __name__ == "__main__":
    main()
