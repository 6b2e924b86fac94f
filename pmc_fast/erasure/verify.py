"""Asking earlier requests' questions again: is the forgotten still forgotten, and the rest still there?"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..config import UnlearnConfig, VerifyConfig
from ..data import (
    Encoder,
    Question,
    Row,
    load_rows,
)
from ..errors import PMCError
from ..evaluation import (
    EvalSet,
    evaluate,
    greedy_answers,
    load_sets,
    sampling_attack,
    summarize,
)
from ..jobs.earlier_runs import FORGET_SETS, rows_hash
from ..jobs.progress import Monitor, Silent, Stages
from ..models import loading
from ..models.loading import LoadedModel
from ..report.environment import machine, versions
from ..rollout import RolloutEngine
from .record import CLAIM, read_private
from .stack import (
    PRIVATE,
    ErasureRequest,
    Stack,
    as_recorded,
)


@dataclass(slots=True)
class _Asked:
    """A request whose questions are here again."""

    request: ErasureRequest
    sets: dict[str, list[Row]] = field(default_factory=dict)


def verify(config: VerifyConfig, monitor: Monitor | None = None) -> dict[str, Any]:
    """Check a stack's requests against their records, with all of them in the model's weights.

    Parameters
    ----------
    config : VerifyConfig
        Stack is required, and the requests' forget files unless they were kept private.
    monitor : Monitor, optional
        Is told of stages and of requests whose questions are not here.

    Returns
    -------
    dict
        Ready for JSON, without a text: ``requests`` by name, each with its scores and bound; ``keep``, the scores of
        what was to be kept, and its bound; ``not_verified``; ``weights``, the hash of the effective weights, computed;
        ``failed_gates``.

    Raises
    ------
    PMCError
        Bad input, found before a model is loaded: a file that is no request's or was changed, a damaged stack.
    """
    monitor = monitor or Silent()
    stages = Stages(monitor)
    with stages("checking"):
        stack = Stack(config.stack)
        stack.require_requests()
        asked = _asked(stack, config.requests)
        missing = [r.name for r in stack.requests if r.name not in {a.request.name for a in asked}]
        if not asked:
            raise PMCError(
                "requests is not given: name forget files of this stack's requests (none was kept private)"
            )
        kept = _kept(stack.requests[-1], config)
        with stack.model(config.model) as source:
            tokenizer = loading.load_tokenizer(source)
    for name in missing:
        monitor.warn(f"request {name} is not verified: its forget file is not among --requests and was not kept")
    with stages("loading the model"):
        loaded = loading.load_model(source, device=loading.resolve_device(config.device))

    def answer_before(request: ErasureRequest) -> None:
        """Where a request came without answers, its truth is what the model said before it."""
        for a in asked:
            rows = a.sets.get("forget", [])
            if a.request is request and not all(row.answer for row in rows):
                said = _answers(loaded, _encoder(tokenizer, request, loaded), [row.question for row in rows])
                a.sets["forget"] = [Row(row.question, row.answer or y) for row, y in zip(rows, said, strict=True)]

    with stages("stacking"):
        weights = stack.apply(loaded.model, answer_before)
    engine = RolloutEngine(loaded.model, autocast_dtype=loaded.autocast_dtype)
    result: dict[str, Any] = {"claim": CLAIM, "weights": weights, "requests": {}, "not_verified": missing}
    failed: list[str] = []
    for a in asked:
        with stages(f"request {a.request.name}"):
            encoder = _encoder(tokenizer, a.request, loaded)
            result["requests"][a.request.name] = _forgotten(a, config, engine, encoder, failed)
    with stages("what was to be kept"):
        encoder = _encoder(tokenizer, stack.requests[-1], loaded)
        result["keep"] = _still_known(stack.requests[-1], kept, config, engine, encoder, failed)
    return {
        "settings": dataclasses.asdict(config),
        **result,
        "failed_gates": failed,
        "versions": versions(),
        "machine": machine(),
        "stage_seconds": stages.seconds,
    }


def _asked(stack: Stack, files: Sequence[str]) -> list[_Asked]:
    """Match files, and what was kept private, with the records' hashes."""
    found = {request.name: _Asked(request) for request in stack.requests}
    for file in files:
        versions_of = {"forget": load_rows(file), "forget_paraphrased": load_rows(file, paraphrased=True)}
        matched = False
        for request in stack.requests:
            for name, rows in versions_of.items():
                if _is(rows, name, request):
                    found[request.name].sets[name] = rows
                    matched = True
        if not matched:
            raise PMCError(
                f"requests file {file} is that of no request in {stack.directory}: its questions and answers, or their "
                "order, are not what the records hash; was it changed?"
            )
    for request in stack.requests:
        private = request.directory / PRIVATE
        if private.exists():
            for name, rows in read_private(private).items():
                if not _is(rows, name, request):
                    raise PMCError(
                        f"{private} was changed: its {name} rows are not what {request.name}'s record hashes"
                    )
                found[request.name].sets.setdefault(name, rows)
    return [a for a in found.values() if "forget" in a.sets]


def _is(rows: Sequence[Row], name: str, request: ErasureRequest) -> bool:
    data = request.record["data"]
    return name in data and data[name]["sha256"] == rows_hash(rows, data["salt"])


def _kept(last: ErasureRequest, config: VerifyConfig) -> list[EvalSet]:
    """Read what the last request's utility was measured on, and check that it is the same."""
    settings = last.record["settings"]
    if "after" not in last.record["metrics"]:
        return []
    retain, general = config.retain or settings["retain"], config.general or settings["general"]
    with nullcontext() if config.retain else as_recorded(last, "the retain set", retain, "--retain"):
        rows = load_rows(retain, answers=True)
    with nullcontext() if config.general else as_recorded(last, "general data", ", ".join(general), "--general"):
        sets = [s for s in load_sets(UnlearnConfig(general=list(general)), [], rows) if s.role == "keep"]
    for name, of in {"retain": rows, **{s.name: s.rows for s in sets if s.name != "retain"}}.items():
        if not _is(of, name, last):
            raise PMCError(
                f"{name} data differ from those of request {last.name}: utility can't be compared; name the same data "
                "with --retain and --general"
            )
    missing = set(last.record["metrics"]["after"]["sets"]) - {s.name for s in sets} - set(FORGET_SETS)
    if missing:
        raise PMCError(f"{', '.join(sorted(missing))} data are not given: name them with --general")
    return sets


def _settings(request: ErasureRequest) -> UnlearnConfig:
    known = {f.name for f in dataclasses.fields(UnlearnConfig)}
    return UnlearnConfig(**{n: v for n, v in request.record["settings"].items() if n in known})


def _encoder(tokenizer: Any, request: ErasureRequest, loaded: LoadedModel) -> Encoder:
    """Return the encoder that a request was measured with."""
    config = _settings(request)
    return Encoder(tokenizer, config, None if config.accidents else loaded.model.generation_config)


def _answers(loaded: LoadedModel, encoder: Encoder, questions: Sequence[Question]) -> list[str]:
    return greedy_answers(RolloutEngine(loaded.model, autocast_dtype=loaded.autocast_dtype), encoder, questions)


def _forgotten(
    a: _Asked, config: VerifyConfig, engine: RolloutEngine, encoder: Encoder, failed: list[str]
) -> dict[str, Any]:
    own = _settings(a.request)
    sets = [EvalSet(name, "forget", rows) for name, rows in a.sets.items()]
    made = evaluate(lambda questions: greedy_answers(engine, encoder, questions), sets, reward=own.reward)
    then = a.request.record["metrics"].get("after", {}).get("sets", {})
    recorded = None
    if all(name in then for name in a.sets):  # of the same sets, which may be fewer than the request's
        recorded = 100 - 100 * sum(then[name]["rouge_l_recall"] for name in a.sets) / len(a.sets)
    made["recorded_unlearn_quality"] = recorded
    made["bound"] = _bound(config.min_quality, a.request, "min_quality", recorded, config.slack)
    _gate(failed, f"request {a.request.name}: unlearn quality", made["unlearn_quality"], made["bound"])
    if config.attack_samples:
        made["sampling"] = _leaks(a, config, engine, encoder, failed)
    return made


def _leaks(
    a: _Asked, config: VerifyConfig, engine: RolloutEngine, encoder: Encoder, failed: list[str]
) -> dict[str, Any]:
    """Sample as the request's own leak attack does."""
    own = _settings(a.request)
    how: dict[str, Any] = {
        "temperature": own.attack_temperature,
        "top_k": own.attack_top_k,
        "top_p": own.attack_top_p,
    }
    how |= {"threshold": own.leak_threshold, "seed": own.seed, "num_samples": config.attack_samples}
    how["reward"] = own.reward
    result = sampling_attack(engine, encoder, a.sets["forget"], **how)
    made = summarize(result, level=own.confidence, reward=own.reward)
    share = made.get("leaking_questions", 0.0)
    if config.max_leak is not None and share > config.max_leak:
        failed.append(
            f"request {a.request.name}: {share:.2f} of its questions leak in {config.attack_samples} samples, above "
            f"{config.max_leak:g}"
        )
    return made


def _still_known(
    last: ErasureRequest,
    sets: list[EvalSet],
    config: VerifyConfig,
    engine: RolloutEngine,
    encoder: Encoder,
    failed: list[str],
) -> dict[str, Any]:
    if not sets:
        if config.min_utility is not None:
            raise PMCError(f"min_utility is given but request {last.name} was made without an evaluation")
        return {}
    reward = _settings(last).reward
    made = evaluate(lambda questions: greedy_answers(engine, encoder, questions), sets, reward=reward)
    recorded = last.record["metrics"]["after"]["utility"]
    made["recorded_utility"] = recorded
    made["bound"] = _bound(config.min_utility, last, "min_utility", recorded, config.slack)
    _gate(failed, "utility", made["utility"], made["bound"])
    return made


def _bound(
    given: float | None, request: ErasureRequest, gate: str, recorded: float | None, slack: float
) -> float | None:
    if given is not None:
        return given
    own = request.record["gates"].get(gate)
    if own is not None:
        return own
    return None if recorded is None else max(0.0, recorded - slack)


def _gate(failed: list[str], name: str, value: float, bound: float | None) -> None:
    if bound is not None and value < bound:
        failed.append(f"{name} is {value:.1f}, below {bound:g}")
