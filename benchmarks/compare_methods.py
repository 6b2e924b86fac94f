"""PMC, GradDiff, NPO and fine-tuning on retain pairs, on the demo's data and for the same wall time.

    python -m benchmarks.compare_methods                  # grids, 3 seeds, retain weights: 68 minutes on two cores
    python -m benchmarks.compare_methods --grid           # the grids alone
    python -m benchmarks.compare_methods --methods pmc npo --seeds 0
    python -m benchmarks.compare_methods --report         # table and plot of what has been measured

All start from the demo's fine-tuned model, with its rows, the same batches, AdamW and packed pass. GradDiff and NPO
train on the forget questions' true answers, which PMC is not given. The learning rate rises over the first epoch and
falls linearly with the clock, to zero at the end of the budget; no step begins that would end after it. The clock
counts initial answers, rollouts and training; evaluations and attacks are left out.

Each method's grid is run on seed 0 with half the budget. The setting with the highest harmonic mean of unlearn quality
and utility is then run on every seed with all of it. PMC also with other retain weights, on seed 0.

Runs are added to results/compare_methods.json one by one; a run that is there is not repeated unless --again.
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pmc_fast.data import Encoder
from pmc_fast.errors import NotFiniteError
from pmc_fast.evaluation import (
    evaluate,
    greedy_answers,
    sampling_attack,
    summarize,
)
from pmc_fast.pmc.schedule import Schedule, micro_batches

from . import harness
from .baselines import METHODS
from .compare_report import GRID_SHARE, chosen, draw, grid_table, retain_weight_table, table
from .runs import Run, demo_config, measured, optimizer_of, summary

RESULT = harness.RESULTS / "compare_methods.json"
GRIDS: dict[str, list[dict[str, float]]] = {
    "pmc": [{"learning_rate": lr, "retain_weight": w} for lr in (5e-5, 1e-4) for w in (1.25, 3.0)],
    "grad_diff": [{"learning_rate": lr, "retain_weight": w} for lr in (1e-5, 5e-5) for w in (1.25, 3.0)],
    "npo": [{"learning_rate": lr, "retain_weight": 1.25, "beta": b} for lr in (1e-5, 5e-5) for b in (0.1, 0.5)],
    "retain_only": [{"learning_rate": lr} for lr in (1e-5, 5e-5)],
}  # fmt: skip
RETAIN_WEIGHTS = (0.5, 1.25, 3.0)
POINTS = (0.1, 0.2, 0.35, 0.5, 0.75)  # shares of the budget at which seed 0 is evaluated; and every run at its end
FEW_POINTS = (0.2, 0.5)  # the other seeds
ATTACK: dict[str, Any] = {"num_samples": 20, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
ATTACK_LENGTH = 100  # tokens of prompt and answer; no forget question and its truth take more than 76
ATTACK_SECONDS = 30.0  # guessed: a model that has forgotten shares less and babbles more
RULE = "highest harmonic mean of unlearn quality and utility, seed 0, half the budget"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run that is to be made."""

    method: str
    setting: dict[str, float]
    seed: int
    budget: float
    points: Sequence[float] = ()
    attack: bool = False

    def find(self, results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        own = (self.method, self.setting, self.seed, self.budget)
        return next((r for r in results if (r["method"], r["setting"], r["seed"], r["budget_s"]) == own), None)


BEFORE = Plan("retain_only", {}, 0, 0.0, attack=True)  # no time: the untouched model


class TimedRun(Run):
    """A plan's run."""

    def __init__(self, plan: Plan) -> None:
        own = {name: value for name, value in plan.setting.items() if name != "beta"}
        super().__init__(plan.method, demo_config(plan.seed, **own), self._due)
        self.plan, self.points = plan, [share * plan.budget for share in plan.points]
        beta = plan.setting.get("beta", 0.0)
        self.task = METHODS[plan.method](self.model, self.tokenizer, self.config, self.forget, beta)
        self.answer = lambda asked: greedy_answers(self.task.engine, self.task.encoder, asked)

    def _due(self, step: int, seconds: float) -> bool:
        passed = [p for p in self.points if p <= seconds]
        self.points = self.points[len(passed) :]
        return bool(passed)

    def evaluate(self, step: int) -> None:
        """As every run, and how much of an answer repeats itself: babble has no recall either."""
        start = time.perf_counter()
        made = evaluate(self.answer, self.sets, log_text=True)
        seconds = time.perf_counter() - start
        for of in made["sets"].values():
            of["repeated"] = repeated_share([text["answer"] for text in of.pop("texts")])
        self.curve.append({"step": step, "seconds": self.seconds, **made, "evaluation_s": seconds})
        print(f"  {summary(self.curve[-1])}", flush=True)

    def train(self) -> None:
        c, task = self.config, self.task
        kept = [task.encoder.pair(row.question, row.answer or "") for row in self.retain]
        optimizer, order = optimizer_of(self), torch.Generator().manual_seed(c.seed + 1)
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
            draws = torch.randint(len(kept), (len(indices),), generator=order)
            self.model.train()
            loss = task.loss(indices, [kept[i] for i in draws.tolist()])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.on_step({"step": step, "loss": loss.item()})

    def run(self) -> dict[str, Any]:
        diverged = None
        try:
            self.train()
            if not self.curve or self.curve[-1]["step"] != len(self.history):
                self.evaluate(len(self.history))
            if self.plan.attack:
                self.curve[-1]["leakage"] = self.attack()
        except NotFiniteError as error:  # gradient ascent may end there: that is a result too
            diverged = str(error)
            print(f"  diverged: {diverged}", flush=True)
        self.lock.close()
        return {
            "method": self.method, "setting": self.plan.setting, "seed": self.config.seed, "budget_s": self.plan.budget,
            "seconds": self.seconds, "steps": len(self.history), "diverged": diverged, "curve": self.curve,
            "commit": harness.commit(),
        }  # fmt: skip

    def attack(self) -> dict[str, Any]:
        config = dataclasses.replace(self.config, max_length=ATTACK_LENGTH)
        encoder = Encoder(self.tokenizer, config, self.model.generation_config)
        made = summarize(sampling_attack(self.task.engine, encoder, self.forget, **ATTACK))
        print(f"  attack: worst {made['worst']['value']:.3f}, {made['seconds']:.0f} s", flush=True)
        return made


def repeated_share(answers: Sequence[str]) -> float:
    """Return the mean share of an answer's words that it has said before."""
    words = [a.lower().split() for a in answers]
    return sum(1 - len(set(w)) / len(w) for w in words if w) / len(words)


def grid_plans(method: str, budget: float) -> list[Plan]:
    return [Plan(method, setting, 0, budget * GRID_SHARE) for setting in GRIDS[method]]


def full_plans(
    methods: Sequence[str], seeds: Sequence[int], budget: float, results: Sequence[dict[str, Any]]
) -> Iterator[Plan]:
    """Yield the runs of the chosen settings, seed by seed, and PMC's with other retain weights."""
    best = {method: chosen(results, method, budget) or {} for method in methods}
    for seed in seeds:
        for method in methods:
            yield Plan(method, best[method], seed, budget, FEW_POINTS if seed else POINTS, attack=True)
    for weight in RETAIN_WEIGHTS if "pmc" in methods else ():
        yield Plan("pmc", best["pmc"] | {"retain_weight": weight}, 0, budget, POINTS, attack=True)


def estimate(methods: Sequence[str], seeds: Sequence[int], budget: float, grid_only: bool, evaluation: float) -> str:
    """Return what a whole run will take, in words."""
    short = [plan for method in methods for plan in grid_plans(method, budget)]
    full = [] if grid_only else list(full_plans(methods, seeds, budget, []))
    if full and "pmc" in methods and 0 in seeds:
        full.pop()  # one of the retain weights is the chosen one
    training = sum(plan.budget for plan in short + full)
    asked = evaluation * sum(len(plan.points) + 1 for plan in short + full)
    attacks = ATTACK_SECONDS * len(full)
    return (
        f"{len(short)} grid runs of {budget * GRID_SHARE:.0f} s and {len(full)} of {budget:.0f} s: {training / 60:.0f} min of "
        f"training, about {asked / 60:.0f} min of evaluations and {attacks / 60:.0f} min of attacks: "
        f"{(training + asked + attacks) / 60:.0f} min in all, less what has been measured"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of each run")
    parser.add_argument("--grid", action="store_true", help="only search the grids")
    parser.add_argument("--again", action="store_true", help="repeat runs that have been measured")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the plot")
    parser.add_argument("--json", type=Path, default=RESULT, help="where results are; the plot goes beside it")
    o = parser.parse_args(arguments)
    facts = {
        "grids": GRIDS, "rule": RULE, "points": POINTS, "attack": ATTACK | {"max_length": ATTACK_LENGTH},
        "forget_answers": "grad_diff and npo train on the true ones; pmc is given none",
    }  # fmt: skip
    fresh: list[Plan] = []

    def make(plan: Plan) -> None:
        if plan in fresh or (not o.again and plan.find(measured(o.json)) is not None):
            return
        fresh.append(plan)
        print(f"{plan.method} {plan.setting}, seed {plan.seed}, {plan.budget:.0f} s", flush=True)
        result = TimedRun(plan).run()
        gc.collect()  # a run refers to itself: its model would stay until memory is short
        results = measured(o.json)  # read now: another process may have added a run
        old = plan.find(results)
        harness.write(o.json, "compare_methods", [*(r for r in results if r is not old), result], facts=facts)

    if not o.report:
        make(BEFORE)
        before = BEFORE.find(measured(o.json))
        assert before is not None
        print(estimate(o.methods, o.seeds, o.budget, o.grid, before["curve"][-1]["evaluation_s"]), flush=True)
        for method in o.methods:
            for plan in grid_plans(method, o.budget):
                make(plan)
        if not o.grid:
            for plan in full_plans(o.methods, o.seeds, o.budget, measured(o.json)):
                make(plan)
    results = measured(o.json)
    print("\n\n".join(made(results) for made in (grid_table, table, retain_weight_table)))
    draw(results, o.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
