"""PMC and other methods on questions that no setting was tuned on, for the same time on the same machine.

    python -m benchmarks.compare_methods                  # tuning, then 3 seeds at each budget: hours on two cores
    python -m benchmarks.compare_methods --tune           # the tuning alone
    python -m benchmarks.compare_methods --methods pmc_fast npo --seeds 0 --budgets 240
    python -m benchmarks.compare_methods --methods pmc_fast npo flat mollm icu eul --budgets 240 \\
        --json benchmarks/results/compare_more.json --settings-of benchmarks/results/compare_methods.json
    python -m benchmarks.compare_methods --ablate --json benchmarks/results/compare_extensions.json \\
        --settings-of benchmarks/results/compare_methods.json    # PMC with each of its extensions left out
    python -m benchmarks.compare_methods --report         # tables and plots of what has been measured

**Time.** A run has one core at a time, with one thread, and as many run at once as there are cores (--workers). Every two seconds they
change cores: those of a shared machine are not equally fast. A budget counts a core's seconds: 240 are two minutes of both of two
cores. Rollouts, initial answers and training count; evaluations do not. All methods use the same batches, AdamW, packed pass and rows, and retain pairs in the same shuffled order. The learning rate
rises over the first epoch and falls linearly with the clock, to zero at the end of the budget; no step begins that would end
after it.

**Tuning.** Every setting of a method's grid runs once, seed 0, on the demo's 20 questions, for TUNING seconds. The best by RULE
then runs at every budget and with every seed on 20 other questions, with other pairs to retain, of a model that was taught those
(`finetuned_model("heldout")`). Methods of LONGER_GRIDS are tuned again at a longer budget, whose best one runs there. With
--settings-of, methods that were tuned in other files, on other machines, take what was chosen there.

All but PMC, IDK and the retain pairs alone train on the answers to be forgotten.

Runs are added to results/compare_methods.json one by one; a run that is there is not repeated unless --again.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from examples.demo_model import Task, finetuned_model
from pmc_fast.config import PRESETS, UnlearnConfig
from pmc_fast.data import Encoder
from pmc_fast.errors import NotFiniteError
from pmc_fast.evaluation import evaluate, greedy_answers, mean_nlls, sampling_attack, summarize
from pmc_fast.models import loading
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.schedule import RetainDraws, Schedule, micro_batches
from pmc_fast.report.environment import commit
from pmc_fast.utils.malloc import keep_freed_memory

from . import compare_report, harness
from .baselines import COMPARED, make
from .compare_report import MAX_DEGENERATE, METHOD_ALONE, TUNING, chosen
from .runs import Run, measured, optimizer_of, summary, task_config
from .settings import TOFU

Grids = dict[str, list[dict[str, Any]]]  # of each method, the settings that are tried
RESULT = harness.RESULTS / "compare_methods.json"
BUDGETS = (240.0, 480.0)  # seconds of one core
# 30 of each, which the demo has, are too few to tell methods apart
GENERAL = [f"{TOFU}/real_authors100.jsonl", f"{TOFU}/world_facts117.jsonl"]
RETAIN_ORDER = "shuffled"  # of all methods
EXTENSIONS: dict[str, Any] = {  # of "pmc_fast"; "pmc" is as published, with the preset "small", but for the order of retain pairs
    name: PRESETS["fast"][name]
    for name in (
        "num_samples", "temperature", "answer_penalty", "resample_above", "selection", "rollout_batch_size", "question_dropout",
        "max_length_ratio", "retain_loss",
    )
}  # fmt: skip
GRIDS: Grids = {
    "pmc_fast": [
        {"learning_rate": lr, "retain_weight": w} for lr, w in ((1.5e-4, 5.0), (2e-4, 5.0), (1.5e-4, 3.0))
    ],
    "pmc": [{"learning_rate": 1e-4, "retain_weight": w} for w in (1.25, 3.0)],
    "npo": [
        {"learning_rate": lr, "retain_weight": w, "beta": 0.5, "retain_loss": kind}
        for lr, w, kind in ((1e-4, 3.0, "nll"), (1e-4, 3.0, "kl"), (2e-4, 5.0, "kl"))
    ],
    "simnpo": [
        {"learning_rate": lr, "retain_weight": w, "beta": b, "retain_loss": kind}
        for lr, w, b, kind in ((5e-5, 1.25, 2.5, "nll"), (5e-5, 3.0, 4.5, "kl"), (1e-4, 3.0, 4.5, "kl"))
    ],
    "grad_diff": [
        {"learning_rate": lr, "retain_weight": w} for lr, w in ((1e-5, 1.25), (2e-5, 3.0), (2e-5, 8.0), (5e-5, 8.0))
    ],
    "idk": [
        {"learning_rate": lr, "retain_weight": w, "retain_loss": kind}
        for lr, w, kind in ((1e-4, 1.25, "nll"), (5e-5, 3.0, "kl"), (1e-4, 3.0, "kl"))
    ],
    "retain_only": [{"learning_rate": 5e-5}],
    "flat": [{"learning_rate": lr, "retain_weight": w} for lr, w in ((2e-5, 0.0), (5e-5, 3.0))],
    "mollm": [{"learning_rate": lr, "retain_weight": w} for lr, w in ((5e-5, 1.0), (1e-4, 1.0))],
    "icu": [{"learning_rate": lr, "retain_weight": w} for lr, w in ((1e-5, 0.5), (2e-5, 3.0))],
    "eul": [{"learning_rate": lr, "retain_weight": w} for lr, w in ((2e-5, 1.0), (5e-5, 1.0), (5e-5, 3.0))],
}  # fmt: skip
# by budget; written after the tuning with TUNING seconds
LONGER_GRIDS: dict[float, Grids] = {
    480.0: {
        "pmc_fast": [{"learning_rate": lr, "retain_weight": 5.0} for lr in (1.5e-4, 2e-4)],
        "npo": [
            {"learning_rate": lr, "retain_weight": w, "beta": 0.5, "retain_loss": "kl"}
            for lr, w in ((1e-4, 3.0), (2e-4, 5.0))
        ],
    },
}
ABLATED: list[dict[str, Any]] = [  # what is put in place of some of EXTENSIONS
    {"retain_loss": "nll"},
    {"question_dropout": 0.0},
    {"selection": "argmin"},
    {"answer_penalty": 0.0, "temperature": 1.25},
    {"answer_penalty": 3.0, "temperature": 1.0},
    {"resample_above": 0.0},
    {"rollout_batch_size": 0},
    {"max_length_ratio": 0.0},
    {"num_samples": 5},
    {"retain_order": "random"},
]
ATTACK: dict[str, Any] = {"num_samples": 20, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
PREFILL = "The answer is:"
ATTACK_LENGTH = 100  # tokens of prompt and answer; no forget question and its truth take more than 76
RULE = (
    f"highest harmonic mean of unlearn quality and utility, at most {MAX_DEGENERATE:.0%} of the answers say nothing"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run that is to be made."""

    method: str
    setting: dict[str, Any]
    seed: int
    budget: float
    task: Task = "heldout"
    attack: bool = True

    def find(self, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        own = (self.task, self.method, self.setting, self.seed, self.budget)
        names = ("task", "method", "setting", "seed", "budget_s")
        return next((r for r in results if tuple(r[name] for name in names) == own), None)


def config_of(plan: Plan) -> UnlearnConfig:
    """Return a run's settings, without those of its method's own."""
    own = {name: value for name, value in plan.setting.items() if name not in METHOD_ALONE}
    extensions = EXTENSIONS if plan.method == "pmc_fast" else {}
    given = {"general": GENERAL, "retain_order": RETAIN_ORDER} | extensions | own
    return task_config(plan.task, plan.seed, **given)


class TimedRun(Run):
    """A plan's run. Its clock is that of one core: torch has one thread, and another process may need the core at times."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan.method, config_of(plan))
        self.plan, self.clock = plan, time.process_time
        self.task = make(plan.method, plan.setting, self.model, self.tokenizer, self.config, self.forget)
        self.answer = lambda asked: greedy_answers(self.task.engine, self.task.encoder, asked)

    def start(self) -> None:
        self.started = self.clock()  # other runs have the other cores: nobody waits

    def resume(self) -> None:
        self.start()

    def evaluate(self, step: int) -> None:
        """As every run, and: how much of an answer repeats itself, its perplexity, and each question's recall."""
        start, rows = time.perf_counter(), []  # type: float, list[dict[str, Any]]
        made = evaluate(self.answer, self.sets, log_text=True, rows=rows)
        texts = {name: of.pop("texts") for name, of in made["sets"].items()}
        for name, of in made["sets"].items():
            of["repeated"] = repeated_share([text["answer"] for text in texts[name]])
            of["recalls"] = [row["rouge_l_recall"] for row in rows if row["set"] == name]
        said = [(text["question"], text["answer"]) for text in texts["forget"]]
        self.curve.append({
            "step": step, "seconds": self.seconds, **made, "perplexity": self.perplexity(said),
            "evaluation_s": time.perf_counter() - start,
        })  # fmt: skip

    def perplexity(self, said: Sequence[tuple[Any, str]]) -> float:
        """Return exp of the mean, over answers, of the untouched model's nll a token."""
        untouched = loading.load_model(
            self.config.model, device=self.model.device, dtype="float32", param_dtype="float32"
        )
        groups = [[self.task.encoder.pair(question, answer)] for question, answer in said]
        nlls = [nll for [nll] in mean_nlls(PackedPass(untouched.model), groups)]
        return math.exp(sum(nlls) / len(nlls))

    def train(self) -> None:
        c, task = self.config, self.task
        kept = [task.encoder.pair(row.question, row.answer or "") for row in self.retain]
        optimizer, draws = optimizer_of(self), RetainDraws.of(c, len(kept))
        warmup = Schedule.plan(c, len(self.forget)).steps_per_epoch
        self.start()
        task.prepare()
        self.stop()
        prepared = self.seconds
        self.resume()
        for step, [indices] in enumerate(micro_batches(c, len(self.forget)), start=1):
            mean = (self.seconds - prepared) / max(1, step - 1)
            if self.seconds + mean > self.plan.budget:
                break
            left = max(0.0, 1 - self.seconds / self.plan.budget)
            for group in optimizer.param_groups:
                group["lr"] = c.learning_rate * min(1.0, step / warmup) * left
            self.model.train()
            loss = task.backward(indices, [kept[i] for drawn in draws(len(indices)) for i in drawn])
            optimizer.step()
            optimizer.zero_grad()
            self.stop()
            self.history.append({"step": step, "loss": loss})
            self.resume()

    def run(self) -> dict[str, Any]:
        diverged = None
        try:
            self.train()
            self.evaluate(len(self.history))
            if self.plan.attack:
                self.curve[-1]["attacks"] = {"sampling": self.attack(""), "prefill": self.attack(PREFILL)}
        except NotFiniteError as error:  # gradient ascent may end there: that is a result too
            diverged = str(error)
        return {
            "task": self.plan.task, "method": self.method, "setting": self.plan.setting, "seed": self.config.seed,
            "budget_s": self.plan.budget, "seconds": self.seconds, "steps": len(self.history), "diverged": diverged,
            "curve": self.curve, "commit": commit(),
        }  # fmt: skip

    def attack(self, prefill: str) -> dict[str, Any]:
        config = dataclasses.replace(self.config, max_length=ATTACK_LENGTH)
        encoder = Encoder(self.tokenizer, config, self.model.generation_config)
        made = summarize(sampling_attack(self.task.engine, encoder, self.forget, **ATTACK, prefill=prefill))
        return {name: made[name] for name in ("worst", "leaking_questions", "degenerate", "per_question", "seconds")}


def repeated_share(answers: Sequence[str]) -> float:
    """Return the mean share of an answer's words that it has said before."""
    words = [a.lower().split() for a in answers]
    return sum(1 - len(set(w)) / len(w) for w in words if w) / len(words)


def untouched(task: Task) -> Plan:
    """Return a run without time: the model as it was."""
    return Plan("retain_only", {}, 0, 0.0, task)


def tuning_plans(methods: Sequence[str], budgets: Iterable[float] = ()) -> Iterator[Plan]:
    """Yield every setting's run with TUNING seconds, and those of LONGER_GRIDS: the first ones of all methods first."""
    for budget, grids in {TUNING: GRIDS, **LONGER_GRIDS}.items():
        for turn in range(max(map(len, grids.values()))):
            for method in methods if budget == TUNING or budget in budgets else ():
                for setting in grids.get(method, [])[turn : turn + 1]:
                    yield Plan(method, setting, 0, budget, "demo", attack=False)


def final_plans(
    methods: Sequence[str],
    seeds: Sequence[int],
    budgets: Sequence[float],
    results: Sequence[dict[str, Any]],
    elsewhere: Sequence[dict[str, Any]] = (),
) -> Iterator[Plan]:
    """Yield the chosen settings' runs, budget by budget and seed by seed; what was chosen elsewhere comes first."""
    for budget in budgets:
        for seed in seeds:
            for method in methods:
                setting = chosen(elsewhere, method, budget) or chosen(results, method, budget)
                if setting is not None:
                    yield Plan(method, setting, seed, budget)


def ablation_plans(results: Sequence[dict[str, Any]]) -> Iterator[Plan]:
    """Yield the chosen setting of "pmc_fast", whole and without one extension each, on the questions of the tuning."""
    setting = chosen(results, "pmc_fast", TUNING)
    if setting is None:
        raise SystemExit("no setting of pmc_fast was chosen yet: tune it first (--methods pmc_fast --tune)")
    for change in ({}, *ABLATED):
        yield Plan("pmc_fast", setting | change, 0, TUNING, "demo", attack=False)


def require_same_conditions(path: Path, facts: dict[str, Any]) -> None:
    """Refuse to add runs to those that were made under other conditions, which the file would then deny."""
    made = json.loads(path.read_text(encoding="utf-8"))["facts"] if path.exists() else {}
    for name in ("extensions", "general", "retain_order", "attack", "tuning_s"):
        if made and made.get(name) != facts[name]:
            raise SystemExit(
                f"{path} has runs with {name} {made.get(name)}, now {facts[name]}: use another --json, or move it away"
            )


def in_process(plan: Plan) -> dict[str, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()
    made = TimedRun(plan).run()
    gc.collect()  # a run refers to itself: its model would stay until memory is short
    return made


def make_all(
    plans: Iterable[Plan],
    path: Path,
    *,
    workers: int,
    again: bool,
    facts: dict[str, Any],
    run: Callable[[Plan], dict[str, Any]] = in_process,
) -> None:
    """Make the runs that are not there yet, `workers` at a time, and write each as it ends."""
    todo = [plan for plan in distinct(plans) if again or plan.find(measured(path)) is None]
    seconds = sum(plan.budget for plan in todo) / workers
    print(f"{len(todo)} runs to make: {seconds / 60:.0f} min of training, and their evaluations", flush=True)
    for task in {plan.task for plan in todo}:
        finetuned_model(task)  # before the workers, which would each make it

    def write(plan: Plan, result: dict[str, Any]) -> None:
        results = measured(path)
        old = plan.find(results)
        harness.write(path, "compare_methods", [*(r for r in results if r is not old), result], facts=facts)
        end = result["diverged"] or summary(result["curve"][-1])
        print(f"{plan.task}: {plan.method} {plan.setting}, seed {plan.seed}, {plan.budget:.0f} s: {end}", flush=True)

    if workers == 1:
        for plan in todo:
            write(plan, run(plan))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool, harness.taking_turns():
        pending: dict[Future[dict[str, Any]], Plan] = {pool.submit(run, plan): plan for plan in todo}
        while pending:
            for done in wait(pending, return_when=FIRST_COMPLETED).done:
                write(pending.pop(done), done.result())


def distinct(plans: Iterable[Plan]) -> list[Plan]:
    """Return each plan once, in order."""
    once: list[Plan] = []
    for plan in plans:
        if plan not in once:
            once.append(plan)
    return once


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="seconds of one core")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at once, a core each")
    parser.add_argument("--tune", action="store_true", help="only tune")
    parser.add_argument("--ablate", action="store_true", help="only PMC, whole and without one extension each")
    parser.add_argument("--again", action="store_true", help="repeat runs that have been measured")
    parser.add_argument("--report", action="store_true", help="only print the tables and draw the plots")
    parser.add_argument(
        "--settings-of",
        type=Path,
        nargs="+",
        default=[],
        help="result files whose chosen settings are used, where they have any",
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="where results are; the plot goes beside it")
    o = parser.parse_args(arguments)
    elsewhere = [result for path in o.settings_of for result in measured(path)]
    facts = {
        "settings_of": [path.name for path in o.settings_of],
        "grids": GRIDS, "longer_grids": {f"{budget:g}": grids for budget, grids in LONGER_GRIDS.items()},
        "extensions": EXTENSIONS, "general": GENERAL, "retain_order": RETAIN_ORDER, "rule": RULE, "tuning_s": TUNING, "workers": o.workers,
        "attack": ATTACK | {"max_length": ATTACK_LENGTH, "prefill": PREFILL},
    }  # fmt: skip
    if not o.report:
        require_same_conditions(o.json, facts)
    run_all = functools.partial(make_all, path=o.json, workers=o.workers, again=o.again, facts=facts)
    if not o.report:
        with harness.alone():
            run_all([untouched("demo"), untouched("heldout")])
            if o.ablate:
                run_all(ablation_plans(elsewhere if chosen(elsewhere, "pmc_fast", TUNING) else measured(o.json)))
            else:
                run_all(tuning_plans([m for m in o.methods if chosen(elsewhere, m, TUNING) is None], o.budgets))
                if not o.tune:
                    run_all(final_plans(o.methods, o.seeds, o.budgets, measured(o.json), elsewhere))
    results = measured(o.json)
    print("\n\n".join(table(results) for table in compare_report.TABLES.values()))
    if compare_report.budgets(results):
        compare_report.draw(results, o.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
