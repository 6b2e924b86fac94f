"""An evaluation: check everything, then load and measure one model or two."""

import dataclasses
import math
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..config import EvaluateConfig
from ..data import Encoder, load_rows
from ..distributed import launched
from ..errors import PMCError
from ..evaluation import (
    UnrelatedText,
    check_attacks,
    check_sets,
    check_texts,
    check_truths,
    encode_candidates,
    load_sets,
    load_tofu,
    read_retain_log,
    tofu_questions,
    truths_of,
)
from ..models import loading
from ..models.packed_forward import PackedPass
from ..pmc.reward import choose_scorer
from ..report import gates
from ..report.environment import machine, versions
from ..rollout import RolloutEngine
from . import earlier_runs
from .evaluator import Evaluator, Results, Suite
from .progress import Monitor, Silent, Stages

SIGNIFICANT = 0.05  # a p-value under this says that two models differ


@dataclass(slots=True)
class _Candidate:
    """A model to be evaluated; its weights are not loaded yet."""

    source: str
    encoder: Encoder
    suite: Suite
    warnings: list[str]


def evaluate_model(
    config: EvaluateConfig, monitor: Monitor | None = None, rows: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Score a model, and `config.before` ahead of it where that is given.

    Parameters
    ----------
    config : EvaluateConfig
        Model is required, and what its suite asks.
    monitor : Monitor, optional
        Shows the stages.
    rows : list, optional
        Extended by every question's numbers, with ``model`` "before" or "after", and under ``attacks`` the results of
        each leak attack on it.

    Returns
    -------
    dict
        ``after``: the model's scores, with ``leakage`` and ``perplexity`` if `config` asks for them; ``before``: those
        of the other one; ``side_effects`` between the two; ``failed_gates`` of the model. No numbers of single
        questions.

    Raises
    ------
    PMCError
        Bad input, found before any model is loaded where that can be.
    """
    if launched()[1] > 1:
        raise PMCError(f"WORLD_SIZE is {launched()[1]}: an evaluation runs on one process")
    stages = Stages(monitor or Silent())
    with stages("checking"):
        candidates, warnings = _check(config)
        for text in warnings:
            stages.monitor.warn(text)
    results, models = _measure(candidates, stages)
    if rows is not None:
        rows += results.rows
    suite, salt = candidates["after"].suite, secrets.token_hex(16)
    judged = gates.judge(suite.config, results.scores["after"], results.scores.get("before"))
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": models,
        "data": {"salt": salt, **earlier_runs.hashes_of({s.name: s.rows for s in suite.sets}, salt)},
        "settings": dataclasses.asdict(suite.config),
        "versions": versions(),
        "machine": machine(),
        **results.report(),
        "gates": judged,
        "failed_gates": gates.missed(judged),
        "warnings": warnings,
        "stage_seconds": stages.seconds,
    }


def _measure(candidates: dict[str, _Candidate], stages: Stages) -> tuple[Results, dict[str, dict[str, str]]]:
    """Load the models one after the other; return what was measured, and each one's source and hash."""
    results, models = Results(), {}
    two = len(candidates) == 2
    if two:
        with stages("checking the model's weights"):  # before the other one is evaluated
            _load(candidates["after"])
    for when, candidate in candidates.items():
        title = f" {when}" if two else ""
        with stages(f"loading the model{title}"):
            loaded = _load(candidate)
        models[when] = {"source": candidate.source, "sha256": loading.weights_hash(loaded.model)}
        how: dict[str, Any] = {"autocast_dtype": loaded.autocast_dtype}
        engine = RolloutEngine(loaded.model, cuda_graphs=candidate.suite.config.cuda_graphs, **how)
        packed = PackedPass(loaded.model, **how)
        evaluator = Evaluator(engine, candidate.encoder, packed, stages.monitor)
        evaluator.measure(when, candidate.suite, results, stages, title)
        del loaded, engine, packed, evaluator  # before the next one comes
    return results, models


def _check(config: EvaluateConfig) -> tuple[dict[str, _Candidate], list[str]]:
    """Read the data and check the models' files; return the models in the order of their evaluation, and warnings."""
    suite = _read(config)
    scorer = choose_scorer(config.reward, truths_of(suite.sets))
    check_truths(scorer, suite.sets)
    suite.config = config = dataclasses.replace(config, reward=scorer.name)
    if config.min_utility is not None and not any(s.role == "keep" for s in suite.sets):
        raise PMCError("min_utility needs --retain or --general to measure utility on")
    sources = ({"before": config.before} if config.before else {}) | {"after": config.model}
    candidates = {when: _candidate(source, config, suite) for when, source in sources.items()}
    # nothing is trained, so overlapping sets are only warned of
    warnings = check_sets(suite.sets, allow_overlap=True) + check_texts(config, suite.sets)
    warnings += _few_rows(config, len(suite.sets[0].rows))
    warnings += dict.fromkeys(text for c in candidates.values() for text in c.warnings)
    before, after = candidates.get("before"), candidates["after"]
    if before and before.encoder.format != after.encoder.format:
        raise PMCError(
            f"prompt_format auto is {before.encoder.format} for {config.before} and {after.encoder.format} for "
            f"{config.model}: give --prompt-format, so that both are asked alike"
        )
    if before and before.suite.text and after.suite.text:
        before.suite.text.require_same(after.suite.text)
    for candidate in candidates.values():
        candidate.suite.config = dataclasses.replace(config, prompt_format=after.encoder.format)
    return candidates, warnings


def _read(config: EvaluateConfig) -> Suite:
    if config.suite == "tofu":
        tofu = load_tofu(config.tofu, config.split, config.tofu_rows)
        log = config.retain_log
        ratios = read_retain_log(log, len(tofu[0].rows), config.truth_ratio) if log else None
        return Suite(config, tofu_questions(tofu), tofu, ratios)
    forget = load_rows(config.forget, answers=True, **config.reading("forget"))
    retain = load_rows(config.retain, answers=True, **config.reading("retain")) if config.retain else []
    return Suite(config, load_sets(config, forget, retain))


def _few_rows(config: EvaluateConfig, rows: int) -> list[str]:
    """Warn of what a shortened benchmark can't show."""
    if not config.tofu_rows:
        return []
    warnings = [f"tofu_rows is {config.tofu_rows}: all metrics are of no more than the first {rows} rows of each set"]
    # of a two-sample Kolmogorov-Smirnov test, where all of one sample are below all of the other
    least = 2 / math.comb(2 * rows, rows)
    if config.retain_log and least > SIGNIFICANT:
        warnings.append(
            f"forget quality of {rows} rows is at least {least:.2g}, whatever the model knows: it needs more"
        )
    return warnings


def _candidate(source: str, config: EvaluateConfig, suite: Suite) -> _Candidate:
    """Check a model's files against what it will be asked, and encode what depends on its tokenizer."""
    tokenizer = loading.load_tokenizer(source)
    loading.check_source(source, config.device)
    warnings = loading.check_config(source, tokenizer, config.max_length)
    encoder = Encoder(tokenizer, config, None if config.accidents else loading.load_generation_config(source))
    warnings += encoder.warnings
    warnings += earlier_runs.check_prompts(source, dataclasses.replace(config, prompt_format=encoder.format))
    for s in suite.sets:
        if cut := encoder.check_lengths(s.name, s.pairs):
            warnings.append(encoder.cut_warning(s.name, cut, len(s.rows)))
    check_attacks(encoder, suite.sets, config)
    suite = dataclasses.replace(suite)
    suite.candidates = {
        s.name: encode_candidates(encoder, s.name, [(r.question, r.candidates) for r in s.rows]) for s in suite.tofu
    }
    if config.side_effects_text:
        sources = [source for source in (config.model, config.before) if source]
        positions = [n for n in map(loading.max_positions, sources) if n]  # one window for both
        suite.text = UnrelatedText.read(config.side_effects_text, tokenizer, min(positions, default=None))
        suite.tokens = suite.text.answer_tokens(suite.sets)
    return _Candidate(source, encoder, suite, warnings)


def _load(candidate: _Candidate) -> loading.LoadedModel:
    config = candidate.suite.config
    loaded = loading.load_model(candidate.source, device=loading.resolve_device(config.device), dtype=config.dtype)
    loading.check_fit(loaded.model, candidate.encoder.tokenizer, candidate.source)
    return loaded
