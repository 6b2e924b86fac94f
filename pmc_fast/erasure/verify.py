"""Verifying a stack: asking earlier requests' questions again, and those of what was to be kept."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from ..config import UnlearnConfig, VerifyConfig
from ..data import Encoder, Row, load_rows
from ..errors import PMCError
from ..evaluation import FORGET_SETS, EvalSet, load_sets
from ..jobs.earlier_runs import rows_hash
from ..jobs.evaluator import Evaluator, Suite
from ..jobs.held import Held
from ..jobs.memory import Choice
from ..jobs.progress import Monitor, Silent, Stages
from ..report.environment import machine, versions
from ..utils.text import listed
from .record import CLAIM, read_private
from .stack import PRIVATE, ErasureRequest, Stack, as_recorded
from .stacked import StackedModel


@dataclass(slots=True)
class _Asked:
    """A request whose questions are known again."""

    request: ErasureRequest
    sets: dict[str, list[Row]] = field(default_factory=dict)


def verify(
    config: VerifyConfig, monitor: Monitor | None = None, stacked: StackedModel | None = None
) -> dict[str, Any]:
    """Check a stack's requests against their records, with all of them in the model's weights.

    Parameters
    ----------
    config : VerifyConfig
        Stack is required, and the requests' forget files unless they were kept private.
    monitor : Monitor, optional
        Shows the stages and warns of requests whose questions are not known.
    stacked : StackedModel, optional
        The model, where somebody keeps it. It is loaded again if it is not at the stack's state, or if a request came
        without answers: these are the model's before it.

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
    stages, stacked = Stages(monitor), stacked or StackedModel(Held(hashed=False))
    with stages("checking"):
        stack = Stack(config.stack, stacked.hashes)
        stack.require_requests()
        last = stack.requests[-1]
        asked = _asked(stack, config.requests)
        kept = _kept(last, config)
        with stack.model(config.model) as source:
            tokenizer = stacked.held.read(source, config.device).tokenizer
    missing = [r.name for r in stack.requests if r.name not in {a.request.name for a in asked}]
    if missing:
        monitor.warn(
            f"not verified, since its forget file is not among --requests and was not kept: {listed('request', missing)}"
        )
    own = last.record["settings"]
    precision = own["dtype"], own.get("param_dtype", "float32")
    stacked.require(stack, *precision)
    if not all(row.answer for a in asked for row in a.sets["forget"]):
        stacked.drop()
    stacked.held.load(source, config.device, *precision, stages)
    evaluators = _evaluators([*(a.request for a in asked), last], config, stacked.held, tokenizer)
    with stages("stacking"):
        weights = stacked.follow(stack, source, lambda request: _answer_before(request, asked, evaluators))
    failed: list[str] = []
    requests = {}
    for a in asked:
        with stages(f"request {a.request.name}"):
            requests[a.request.name] = _forgotten(a, config, evaluators[a.request.name], failed)
    with stages("what was to be kept"):
        keep = _still_known(last, kept, config, evaluators[last.name], failed)
    return {
        "settings": dataclasses.asdict(config),
        "claim": CLAIM,
        "weights": weights,
        "requests": requests,
        "not_verified": missing,
        "keep": keep,
        "failed_gates": failed,
        "versions": versions(),
        "machine": machine(),
        "stage_seconds": stages.seconds,
    }


def _evaluators(
    requests: Sequence[ErasureRequest], config: VerifyConfig, held: Held, tokenizer: Any
) -> dict[str, Evaluator]:
    """Return by each request's name an evaluator with its prompts; all share one rollout engine."""
    loaded = held.loaded
    assert loaded is not None
    engine, _ = held.passes(Choice.of(_settings(requests[-1], config), loaded.model.device.type))
    evaluators = {}
    for request in requests:
        own = _settings(request, config)
        encoder = Encoder(tokenizer, own, None if own.accidents else loaded.model.generation_config)
        evaluators[request.name] = Evaluator(engine, encoder)
    return evaluators


def _answer_before(request: ErasureRequest, asked: list[_Asked], evaluators: dict[str, Evaluator]) -> None:
    """Where a request came without answers, take the model's answers before it for the truth."""
    for a in asked:
        rows = a.sets["forget"]
        if a.request is request and not all(row.answer for row in rows):
            evaluator = evaluators[request.name]
            answers = evaluator.answers([row.question for row in rows])
            a.sets["forget"] = [Row(row.question, row.answer or y) for row, y in zip(rows, answers, strict=True)]
            evaluator.weights_changed()  # with the adapter that comes next


def _asked(stack: Stack, files: Sequence[str]) -> list[_Asked]:
    """Match files, and what was kept private, with the records' hashes."""
    found = {request.name: _Asked(request) for request in stack.requests}
    for file in files:
        matched = False
        read = _Readings(file)
        for request in stack.requests:
            for name, rows in read.as_of(request).items():
                if _is(rows, name, request):
                    found[request.name].sets[name] = rows
                    matched = True
        if not any(read.rows.values()):
            raise read.errors[0]
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
    asked = [a for a in found.values() if "forget" in a.sets]
    if not asked:
        raise PMCError("requests is not given: name forget files of this stack's requests (none was kept private)")
    return asked


class _Readings:
    """A file's rows, as requests with their columns would have read them."""

    def __init__(self, file: str) -> None:
        self.file, self.errors = file, list[PMCError]()
        self.rows: dict[str, list[Row]] = {}  # by the settings; none where the file can't be read so

    def as_of(self, request: ErasureRequest) -> dict[str, list[Row]]:
        own, found = _own(request), {}
        for name, setting in (("forget", "forget"), ("forget_paraphrased", "paraphrased")):
            how = {"paraphrased": setting == "paraphrased", **own.reading(setting)}
            if (key := repr(how)) not in self.rows:
                try:
                    self.rows[key] = load_rows(self.file, **how)
                except PMCError as error:
                    self.rows[key] = []
                    self.errors.append(error)
            found[name] = self.rows[key]
        return found


def _is(rows: Sequence[Row], name: str, request: ErasureRequest) -> bool:
    data = request.record["data"]
    return name in data and data[name]["sha256"] == rows_hash(rows, data["salt"])


def _kept(last: ErasureRequest, config: VerifyConfig) -> list[EvalSet]:
    """Read what the last request's utility was measured on, and check that it is the same."""
    settings = last.record["settings"]
    if "after" not in last.record["metrics"]:
        return []
    own, retain, general = _own(last), config.retain or settings["retain"], config.general or settings["general"]
    with nullcontext() if config.retain else as_recorded(last, "the retain set", retain, "--retain"):
        rows = load_rows(retain, answers=True, **own.reading("retain"))
    with nullcontext() if config.general else as_recorded(last, "general data", ", ".join(general), "--general"):
        general_alone = dataclasses.replace(own, paraphrased="", general=list(general))
        sets = [s for s in load_sets(general_alone, [], rows) if s.role == "keep"]
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


def _settings(request: ErasureRequest, config: VerifyConfig) -> UnlearnConfig:
    """Return the settings that a request was measured with, and of its leak attacks the sampling alone."""
    attack: dict[str, Any] = {"attack_samples": config.attack_samples, "attack_prefill": "", "attack_first_words": 0}
    return _own(request, **attack, evaluate=True, log_text=False)


def _own(request: ErasureRequest, **change: Any) -> UnlearnConfig:
    """Return a request's settings, with changes; a record of before a setting has its default."""
    known = {f.name for f in dataclasses.fields(UnlearnConfig)}
    return UnlearnConfig(**{n: value for n, value in request.record["settings"].items() if n in known} | change)


def _forgotten(a: _Asked, config: VerifyConfig, evaluator: Evaluator, failed: list[str]) -> dict[str, Any]:
    name, own = a.request.name, _settings(a.request, config)
    scores = evaluator.scores(Suite(own, [EvalSet(s, "forget", rows) for s, rows in a.sets.items()]))
    then = a.request.record["metrics"].get("after", {}).get("sets", {})
    recorded = None
    if all(s in then for s in a.sets):  # of the same sets, which may be fewer than the request's
        recorded = 100 - 100 * sum(then[s]["rouge_l_recall"] for s in a.sets) / len(a.sets)
    scores["recorded_unlearn_quality"] = recorded
    scores["bound"] = _bound(config.min_quality, a.request, "min_quality", recorded, config.slack)
    _gate(failed, f"request {name}: unlearn quality", scores["unlearn_quality"], scores["bound"])
    if config.attack_samples:
        found = evaluator.leakage(Suite(own, [EvalSet("forget", "forget", a.sets["forget"])]))
        scores["sampling"] = found["sets"]["forget"]["sampling"]
        share = scores["sampling"].get("leaking_questions", 0.0)
        if config.max_leak is not None and share > config.max_leak:
            failed.append(
                f"request {name}: {share:.2f} of its questions leak in {config.attack_samples} samples, above "
                f"{config.max_leak:g}"
            )
    return scores


def _still_known(
    last: ErasureRequest, sets: list[EvalSet], config: VerifyConfig, evaluator: Evaluator, failed: list[str]
) -> dict[str, Any]:
    if not sets:
        if config.min_utility is not None:
            raise PMCError(f"min_utility is given but request {last.name} was made without an evaluation")
        return {}
    scores = evaluator.scores(Suite(_settings(last, config), sets))
    recorded = last.record["metrics"]["after"]["utility"]
    scores["recorded_utility"] = recorded
    scores["bound"] = _bound(config.min_utility, last, "min_utility", recorded, config.slack)
    _gate(failed, "utility", scores["utility"], scores["bound"])
    return scores


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
