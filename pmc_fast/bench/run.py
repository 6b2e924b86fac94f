"""A benchmark of one model: check everything, load it, hold each contest."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import BenchConfig
from ..data import Encoder, Row, load_rows
from ..distributed import launched
from ..errors import PMCError
from ..jobs.progress import Monitor, Silent
from ..models import loading
from ..models.context import out_of_memory, release_memory
from . import questions, results
from .contests import CONTESTS, Contest, Way, Workload
from .measure import Contestant, peak_bytes, summarize, time_round

# what else can't be compared between result files
CONDITIONS = ("machine", "facts.settings", "facts.questions")
NOT_SETTINGS = ("model", "forget", "retain", "system_prompt")


@dataclass(slots=True)
class Plan:
    """A checked benchmark; no weight is loaded yet."""

    config: BenchConfig
    tokenizer: Any
    device: torch.device
    forget: list[Row]
    retain: list[Row]
    facts: dict[str, Any]  # settings and questions, for the result
    warnings: list[str]

    def conditions(self) -> dict[str, Any]:
        """Return a result without measurements, to compare with those of other results."""
        return results.document("bench", [], self.config.seed, self.facts)


def check(config: BenchConfig) -> Plan:
    """Read the data and check the model's files.

    Raises
    ------
    PMCError
        Bad input, found before any weight is loaded where that can be.
    """
    if launched()[1] > 1:
        raise PMCError(f"WORLD_SIZE is {launched()[1]}: a benchmark runs on one process")
    device = loading.resolve_device(config.device)
    tokenizer = loading.load_tokenizer(config.model)
    loading.check_source(config.model, config.device)
    warnings = loading.check_config(config.model, tokenizer, config.max_length)
    encoder = Encoder(tokenizer, config, None if config.accidents else loading.load_generation_config(config.model))
    warnings += encoder.warnings
    forget = _rows(config.forget, "forget", questions.FORGET, config.batch_size)
    retain = _rows(config.retain, "retain", questions.RETAIN, config.batch_size)
    encoder.check_lengths("forget", [(row.question, None) for row in forget])
    encoder.check_lengths("retain", [(row.question, row.answer) for row in retain])
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_SETTINGS}
    dtype = "bfloat16" if loading.low_precision(config.dtype, device) else "float32"
    settings |= {"device": device.type, "dtype": dtype, "prompt_format": encoder.format}
    asked = [encoder.prompt(row.question) for row in forget]
    pairs = [encoder.pair(row.question, row.answer or "") for row in retain]
    facts = {
        "settings": settings,
        "questions": {
            "forget": Path(config.forget).name or "built-in",
            "retain": Path(config.retain).name or "built-in",
            "prompt_tokens": sum(map(len, asked)),
            "retain_tokens": sum(len(p.input_ids) for p in pairs),
        },
    }
    return Plan(config, tokenizer, device, forget, retain, facts, warnings)


def _rows(source: str, name: str, own: Sequence[Row], count: int) -> list[Row]:
    """Return the first rows of a file, or of the built-in ones."""
    rows = list(load_rows(source, answers=name == "retain")) if source else list(own)
    if len(rows) < count:
        there = f"{source} has {len(rows)}" if source else f"there are {len(rows)} built-in ones: give --{name}"
        raise PMCError(f"batch_size is {count}: it needs as many rows of {name}, and {there}, or lower --batch-size")
    return rows[:count]


def measure(plan: Plan, monitor: Monitor | None = None) -> dict[str, Any]:
    """Measure rollouts, a training step and weighted_nll of a model, each beside its baseline.

    Parameters
    ----------
    plan : Plan
        Of `check`.
    monitor : Monitor, optional
        Shows the stages.

    Returns
    -------
    dict
        A result file's content (`results.document`): each contest with its seconds, tokens, rows and peak memory, and in its facts
        what was compared before, and contestants that were left out. It holds no text of the data.

    Raises
    ------
    PMCError
        Contestants that don't compute the same.
    """
    config, monitor = plan.config, monitor or Silent()
    for text in plan.warnings:
        monitor.warn(text)
    monitor.stage("loading the model")
    loaded = loading.load_model(config.model, device=plan.device, dtype=config.dtype, param_dtype="auto")
    loading.check_fit(loaded.model, plan.tokenizer, config.model)
    work = Workload(loaded, plan.tokenizer, config, plan.forget, plan.retain, monitor.warn)
    model = loaded.model
    plan.facts["model"] = {
        "name": Path(config.model).name or config.model,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_dtype": _name(next(model.parameters()).dtype),
        "compute_dtype": _name(work.dtype),
    }
    made = []
    for name, make in CONTESTS.items():
        monitor.stage(f"{name}: preparing")
        made.append(hold(make(work), config.rounds, plan.device, monitor))
        release_memory(plan.device)
    return results.document("bench", made, config.seed, plan.facts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hold(contest: Contest, rounds: int, device: torch.device, monitor: Monitor) -> dict[str, Any]:
    """Compare the contestants' outputs, then measure them; one that runs out of memory is left out by name.

    Returns
    -------
    dict
        A result of a result file.
    """
    monitor.stage(f"{contest.name}: comparing")
    outputs = _fitting({who: way.output for who, way in contest.ways.items()}, device)
    equal = "not compared"
    if len(outputs) == len(contest.ways):
        equal = contest.compare(*outputs.values())
    contest.before()
    monitor.stage(f"{contest.name}: warming up")
    warm_ups = 2 if device.type == "cuda" else 1  # a CUDA graph is captured when a size comes the second time
    calls = {who: partial(_repeat, contest.ways[who].run, warm_ups) for who in outputs}
    outputs.clear()
    peaks = _fitting({who: partial(peak_bytes, call, device) for who, call in calls.items()}, device)
    usable = {who: way for who, way in contest.ways.items() if who in peaks}
    left_out = dict.fromkeys(contest.ways.keys() - usable.keys(), "out of memory")
    for who, why in left_out.items():
        monitor.warn(f"{contest.name}: {who} is left out: {why}")
    measured = _rounds(contest.name, {who: way.run for who, way in usable.items()}, rounds, device, monitor)
    contestants = summarize(measured, peaks) if usable else {}
    for who, way in usable.items():
        contestants[who] |= _counted(way, measured, who)
    facts = contest.facts | {"equal": equal} | ({"left_out": left_out} if left_out else {})
    return {"name": contest.name, "facts": facts, "contestants": contestants}


def _repeat(run: Contestant, count: int) -> None:
    for _ in range(count):
        run()


def _fitting(calls: dict[str, Contestant], device: torch.device) -> dict[str, Any]:
    """Return the results of those calls that the device has memory for."""
    results = {}
    for who, call in calls.items():
        try:
            results[who] = call()
        except Exception as error:
            if not out_of_memory(error):
                raise
        if who not in results:
            release_memory(device)  # now that the error is gone, with the tensors that it held
    return results


def _rounds(
    name: str, runs: dict[str, Contestant], rounds: int, device: torch.device, monitor: Monitor
) -> list[dict[str, float]]:
    measured = []
    for number in range(rounds if runs else 0):
        monitor.stage(f"{name}: round {number + 1} of {rounds}")
        try:
            measured.append(time_round(runs, number, device))
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise PMCError(
                f"{name} ran out of memory in round {number + 1}, where it had not before: lower --batch-size"
            ) from error
    return measured


def _counted(way: Way, measured: Sequence[dict[str, float]], who: str) -> dict[str, Any]:
    """Return the medians of what a contestant counted in the measured rounds, and its tokens a second."""
    counted = way.counted[-len(measured) :] if way.counted else []
    found: dict[str, Any] = {}
    if counted:
        found = {name: statistics.median(c[name] for c in counted) for name in counted[0]}
    if "tokens" in found:
        rates = [c["tokens"] / m[who] for c, m in zip(counted, measured, strict=True)]
        found |= {"tokens_per_s": statistics.median(rates), "rounds_tokens_per_s": rates}
    return found
