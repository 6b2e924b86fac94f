"""The evaluation's job: check everything, then load, ask and score one model or two."""

import dataclasses
import math
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from ..config import EvaluateConfig, PromptFormat
from ..data import Encoded, Encoder, load_rows
from ..distributed import launched
from ..errors import PMCError
from ..evaluation import (
    EvalSet,
    SideEffects,
    TofuSet,
    TokenMass,
    attack,
    check_attacks,
    check_sets,
    check_truths,
    encode_candidates,
    evaluate,
    evaluate_tofu,
    greedy_answers,
    leakage_settings,
    load_sets,
    load_tofu,
    mean_nlls,
    read_retain_log,
    tofu_questions,
    truths_of,
    with_side_effects,
)
from ..models import loading
from ..models.packed_forward import PackedPass
from ..pmc.reward import choose_scorer
from ..report import gates
from ..report.environment import machine, versions
from ..rollout import RolloutEngine
from . import earlier_runs
from .progress import Monitor, Silent, Stages

SIGNIFICANT = 0.05  # a p-value under this says that two models differ


@dataclass(slots=True)
class _Asked:
    """What a suite asks, read and checked."""

    sets: list[EvalSet]
    tofu: list[TofuSet]  # none: suite questions
    retain_ratios: np.ndarray | None = None


@dataclass(slots=True)
class _Candidate:
    """A model to be evaluated; its weights are not loaded yet."""

    source: str
    tokenizer: Any
    format: PromptFormat
    groups: dict[str, list[list[Encoded]]]  # the candidate answers of each of TOFU's sets
    text: SideEffects | None
    tokens: list[int]  # those that are followed in the text
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
        Is told of stages.
    rows : list, optional
        Is given every question's numbers, with ``model`` "before" or "after", and under ``attacks`` what each leak
        attack got out of it.

    Returns
    -------
    dict
        ``after``: the model's scores, with ``leakage`` and ``perplexity`` if they were asked for; ``before``: those of
        the other one; ``side_effects`` between the two; ``failed_gates`` of the model. No numbers of single questions.

    Raises
    ------
    PMCError
        Bad input, found before any model is loaded where that can be.
    """
    if launched()[1] > 1:
        raise PMCError(f"WORLD_SIZE is {launched()[1]}: an evaluation runs on one process")
    stages = Stages(monitor or Silent())
    sources = ({"before": config.before} if config.before else {}) | {"after": config.model}
    with stages("checking"):
        asked = _read(config)
        scorer = choose_scorer(config.reward, truths_of(asked.sets))
        check_truths(scorer, asked.sets)
        config = dataclasses.replace(config, reward=scorer.name)
        if config.min_utility is not None and not any(s.role == "keep" for s in asked.sets):
            raise PMCError("min_utility needs --retain or --general to measure utility on")
        candidates = {when: _check(source, config, asked) for when, source in sources.items()}
        # nothing is trained, so sets may overlap: the scores are to be read with care
        warnings = check_sets(asked.sets, allow_overlap=True) + _few_rows(config, len(asked.sets[0].rows))
        warnings += dict.fromkeys(text for c in candidates.values() for text in c.warnings)
        for text in warnings:
            stages.monitor.warn(text)
        formats = {when: c.format for when, c in candidates.items()}
        if len(set(formats.values())) > 1:
            raise PMCError(
                f"prompt_format auto is {formats['before']} for {config.before} and {formats['after']} for "
                f"{config.model}: give --prompt-format, so that both are asked alike"
            )
        before, after = candidates.get("before"), candidates["after"]
        if before and before.text and after.text:
            before.text.require_same(after.text)
        config = dataclasses.replace(config, prompt_format=after.format)
    if before:
        with stages("checking the model's weights"):  # those of the other one are, once it is loaded
            _load(after, config)
    scores: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, str]] = {}
    salt = secrets.token_hex(16)
    masses: dict[str, TokenMass] = {}
    for when, candidate in candidates.items():
        numbers: list[dict[str, Any]] = []
        title = f" {when}" if before else ""
        with stages(f"loading the model{title}"):
            loaded = _load(candidate, config)
        found[when] = {"source": candidate.source, "sha256": loading.weights_hash(loaded.model)}
        scores[when] = _score(candidate, loaded, config, asked, stages, title, numbers)
        if candidate.text:
            with stages(f"side effects{title}"):
                masses[when] = candidate.text.measure(loaded.model, candidate.tokens, loaded.autocast_dtype)
        del loaded  # before the next one comes
        if rows is not None:
            rows += [{"model": when, **row} for row in numbers]
    judged = gates.judge(config, scores["after"], scores.get("before"))
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": found,
        "data": {"salt": salt, **earlier_runs.hashes_of({s.name: s.rows for s in asked.sets}, salt)},
        "settings": dataclasses.asdict(config),
        "versions": versions(),
        "machine": machine(),
        **scores,
        **with_side_effects(scores, masses),
        "gates": judged,
        "failed_gates": gates.missed(judged),
        "warnings": warnings,
        "stage_seconds": stages.seconds,
    }


def _read(config: EvaluateConfig) -> _Asked:
    if config.suite == "tofu":
        tofu = load_tofu(config.tofu, config.split, config.tofu_rows)
        log = config.retain_log
        ratios = read_retain_log(log, len(tofu[0].rows), config.truth_ratio) if log else None
        return _Asked(tofu_questions(tofu), tofu, ratios)
    forget = load_rows(config.forget, answers=True)
    retain = load_rows(config.retain, answers=True) if config.retain else []
    return _Asked(load_sets(config, forget, retain), [])


def _few_rows(config: EvaluateConfig, rows: int) -> list[str]:
    """Say what a shortened benchmark is not."""
    if not config.tofu_rows:
        return []
    said = [f"tofu_rows is {config.tofu_rows}: all metrics are of no more than the first {rows} rows of each set"]
    # of a two-sample Kolmogorov-Smirnov test, where all of one sample are below all of the other
    least = 2 / math.comb(2 * rows, rows)
    if config.retain_log and least > SIGNIFICANT:
        said.append(f"forget quality of {rows} rows is at least {least:.2g}, whatever the model knows: it needs more")
    return said


def _check(source: str, config: EvaluateConfig, asked: _Asked) -> _Candidate:
    tokenizer = loading.load_tokenizer(source)
    loading.check_source(source, config.device)
    warnings = loading.check_config(source, tokenizer, config.max_length)
    encoder = Encoder(tokenizer, config, None if config.accidents else loading.load_generation_config(source))
    warnings += encoder.warnings
    warnings += earlier_runs.check_prompts(source, dataclasses.replace(config, prompt_format=encoder.format))
    for s in asked.sets:
        if cut := encoder.check_lengths(s.name, s.pairs):
            warnings.append(encoder.cut_warning(s.name, cut, len(s.rows)))
    check_attacks(encoder, asked.sets, leakage_settings(config))
    groups = {
        s.name: encode_candidates(encoder, s.name, [(r.question, r.candidates) for r in s.rows]) for s in asked.tofu
    }
    text, tokens = None, []
    if config.side_effects_text:
        sources = [source for source in (config.model, config.before) if source]
        positions = [n for n in map(loading.max_positions, sources) if n]  # one window for both
        text = SideEffects.read(config.side_effects_text, tokenizer, min(positions, default=None))
        tokens = text.tokens(asked.sets)
    return _Candidate(source, tokenizer, encoder.format, groups, text, tokens, warnings)


def _load(candidate: _Candidate, config: EvaluateConfig) -> loading.LoadedModel:
    loaded = loading.load_model(candidate.source, device=loading.resolve_device(config.device), dtype=config.dtype)
    loading.check_fit(loaded.model, candidate.tokenizer, candidate.source)
    return loaded


def _score(
    candidate: _Candidate,
    loaded: loading.LoadedModel,
    config: EvaluateConfig,
    asked: _Asked,
    stages: Stages,
    title: str,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    engine = RolloutEngine(loaded.model, autocast_dtype=loaded.autocast_dtype, cuda_graphs=config.cuda_graphs)
    generation_config = None if config.accidents else loaded.model.generation_config
    encoder = Encoder(candidate.tokenizer, config, generation_config)
    with stages(f"evaluation{title}"):
        scores = _answers(engine, encoder, candidate, loaded, config, asked, stages, rows)
    settings = leakage_settings(config)
    if settings:
        with stages(f"leak attacks{title}"):
            how: dict[str, Any] = {"rows": rows, "log_text": config.log_text, "on_attack": stages.on_attack}
            scores["leakage"] = attack(engine, encoder, asked.sets, settings, **how)
    return scores


def _answers(
    engine: RolloutEngine,
    encoder: Encoder,
    candidate: _Candidate,
    loaded: loading.LoadedModel,
    config: EvaluateConfig,
    asked: _Asked,
    stages: Stages,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    how: dict[str, Any] = {
        "reward": config.reward,
        "log_text": config.log_text,
        "on_set": stages.on_set,
        "rows": rows,
    }
    if not asked.tofu:
        return evaluate(lambda questions: greedy_answers(engine, encoder, questions), asked.sets, **how)
    packed = PackedPass(loaded.model)
    packed.check(loaded.autocast_dtype)

    def nlls(s: TofuSet) -> list[list[float]]:
        groups = candidate.groups[s.name]
        stages.monitor.stage(f"  {s.name}: likelihood of {sum(map(len, groups))} answers")
        return mean_nlls(packed, groups, max_tokens=config.max_tokens, autocast_dtype=loaded.autocast_dtype)

    return evaluate_tofu(
        lambda questions: greedy_answers(engine, encoder, questions),
        nlls,
        asked.tofu,
        variant=config.truth_ratio,
        retain_ratios=asked.retain_ratios,
        **how,
    )
