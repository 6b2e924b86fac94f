"""All leak attacks on a model, and what n samples of each question say about k of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import EvaluationConfig, RewardName
from ..data import Encoder, Row
from ..errors import PMCError
from ..pmc.reward import choose_scorer
from ..rollout import Rollouts
from .attacks import AttackResult, prepare_attack, sampling_attack
from .questions import FORGET_SETS, EvalSet, degenerate_share, truths_of

COUNTERS = ("rows", "sampled_tokens", "prefill_tokens", "steps")


RESAMPLES = 2000  # of a bootstrap interval


def _given(config: EvaluationConfig) -> dict[str, Any]:
    """Return what each attack but plain sampling begins an answer with, by the attack's name; empty values are none."""
    return {"prefill": config.attack_prefill, "first_words": config.attack_first_words}


def _attacks(config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """Return each attack's name and its argument of `sampling_attack`."""
    return {"sampling": {}} | {name: {name: value} for name, value in _given(config).items() if value}


def check_attacks(encoder: Encoder, sets: Sequence[EvalSet], config: EvaluationConfig) -> None:
    """Refuse questions that leave no room once an attack begins their answers, before any model is loaded."""
    for s in _attacked(sets) if config.attack_samples else []:
        # where no truth is known yet, the question takes its place: what is checked is whether it fits
        known = [Row(row.question, row.answer or str(row.question)) for row in s.rows]
        scorer = choose_scorer(config.reward, [row.answer or "" for row in known])
        for change in _attacks(config).values():
            prepare_attack(encoder, known, scorer, **change, name=s.name)


def _attacked(sets: Sequence[EvalSet]) -> list[EvalSet]:
    return [s for s in sets if s.name in FORGET_SETS]


def leakage(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    sets: Sequence[EvalSet],
    config: EvaluationConfig,
    *,
    log_text: bool = False,
    on_attack: Callable[[str, str], None] = lambda questions, attack: None,
) -> dict[str, Any]:
    """Attack a model in every way that `config` asks for, and summarise what leaks.

    Parameters
    ----------
    engine, encoder
        As of `sampling_attack`.
    sets : sequence of EvalSet
        Those called "forget" and "forget_paraphrased" are attacked.
    config : EvaluationConfig
        Its attack settings, confidence, seed and reward are read.
    log_text : bool
        Keep each question, its truth and its worst sample in the result.
    on_attack : callable
        Called before each attack with the set's name and the attack's.

    Returns
    -------
    dict
        Ready for JSON. ``settings``; ``sets``: per set (``forget``, ``forget_paraphrased``) and attack
        (``sampling``, ``prefill``, ``first_words``) what `summarize` returns.
    """
    sets = _attacked(sets)
    if not sets:
        raise PMCError(f"leakage: no set is called {' or '.join(FORGET_SETS)}: there is nothing to attack")
    reward = choose_scorer(config.reward, truths_of(sets)).name
    how: dict[str, Any] = {
        "num_samples": config.attack_samples, "temperature": config.attack_temperature, "top_p": config.attack_top_p,
        "top_k": config.attack_top_k, "threshold": config.leak_threshold,
    }  # fmt: skip
    judged: dict[str, Any] = {
        "level": config.confidence,
        "resamples": RESAMPLES,
        "seed": config.seed,
        "reward": reward,
    }
    found: dict[str, dict[str, Any]] = {s.name: {} for s in sets}
    for s in sets:
        for attack, change in _attacks(config).items():
            on_attack(s.name, attack)
            result = sampling_attack(engine, encoder, s.rows, **how, **change, seed=config.seed, reward=reward)
            summary = summarize(result, **judged)
            if log_text:
                summary["texts"] = [
                    {
                        "question": s.rows[row].question,
                        "truth": s.rows[row].answer,
                        "worst": texts[int(scores.argmax())],
                        "rouge_l_recall": float(scores.max()),
                    }
                    for row, texts, scores in zip(result.rows, result.samples, result.scores, strict=True)
                ]
            found[s.name][attack] = summary
    return {"settings": how | _given(config) | judged, "sets": found}


def summarize(
    result: AttackResult,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    reward: RewardName = "auto",
) -> dict[str, Any]:
    """Summarise an attack in numbers; words of its samples are counted as `reward` does.

    Returns
    -------
    dict
        Ready for JSON, without any text. ``mean``, ``worst`` and, for k of 1, 2, 4, ... N, ``leak_at_k`` and
        ``worst_of_k``: means over questions, ``value`` and ``interval`` (`bootstrap_interval`).
        ``leaking_questions``: the share with any leak. ``degenerate``: the share of samples under 3 words, which
        leak nothing because they say nothing. ``questions``, ``left_out``, ``per_question``, the rollout's counters,
        ``rows_per_sampled_token``, ``seconds``.
    """
    questions, n = result.scores.shape
    summary: dict[str, Any] = {
        "questions": questions,
        "left_out": result.left_out,
        "samples": n,
        "criterion": f"rouge_l_recall >= {result.threshold:g}",
    }
    if not questions:
        return summary

    def over_questions(values: np.ndarray) -> dict[str, Any]:
        interval = bootstrap_interval(values, level=level, resamples=resamples, seed=seed)
        return {"value": float(values.mean()), "interval": list(interval)}

    leaking, worst, mean = result.leaking, result.worst, result.mean
    sizes = sorted({*(2**i for i in range(n.bit_length())), n})
    leaks = {k: np.array([leak_at_k(n, int(c), k) for c in leaking]) for k in sizes}
    counters = {name: int(result.counters[name]) for name in COUNTERS if name in result.counters}
    return summary | {
        "mean": over_questions(mean),
        "worst": over_questions(worst),
        "leaking_questions": float((leaking > 0).mean()),
        "leak_at_k": {str(k): over_questions(leaks[k]) for k in sizes},
        "worst_of_k": {str(k): over_questions(worst_of_k(result.scores, k)) for k in sizes},
        "degenerate": degenerate_share([text for texts in result.samples for text in texts], reward),
        "per_question": [
            {"row": row, "worst": float(w), "mean": float(m), "leaking": int(c)}
            for row, w, m, c in zip(result.rows, worst, mean, leaking, strict=True)
        ],
        **counters,
        "rows_per_sampled_token": counters.get("rows", 0) / max(1, counters.get("sampled_tokens", 0)),
        "seconds": result.seconds,
    }


def known_forgotten(scores: np.ndarray, threshold: float = 0.0) -> list[int]:
    """Return the questions that need no unlearning: no sample says anything of the truth.

    Parameters
    ----------
    scores : array [Q, N]
        ROUGE-L recall of each sampled answer against the truth; NaN where there is no truth, and then the question
        never qualifies.
    threshold : float
        The largest recall that says nothing. With 0 not one word may be shared; answers in whole sentences share
        "the" and "of" with most truths.

    Returns
    -------
    list of int
        Questions none of whose scores is above `threshold`. One whose samples hold no words qualifies too: look at the
        share of degenerate samples.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise PMCError(f"known_forgotten: scores have shape {scores.shape}: give at least one sample a question")
    return np.flatnonzero((scores <= threshold).all(axis=1)).tolist()


def leak_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k samples drawn out of n, of which c leak, hold one that does.

    1 - C(n-c, k) / C(n, k): unbiased for the chance that k fresh samples leak. The estimator is that of pass@k
    (Chen et al., arXiv 2107.03374), applied to leaks by leak@k (Reisizadeh et al., arXiv 2511.04934). Whole
    numbers are divided once, so the result is the exact one, rounded, for any n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise PMCError(f"leak_at_k: {c} leaks and k {k} do not fit n {n}: 0 to n leaks, and k from 1 to n")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def worst_of_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the expected largest score of k samples drawn out of N, without a threshold: [Q, N] -> float64 [Q].

    The j-th smallest of N scores is the largest of C(j-1, k-1) of the C(N, k) choices. Scores that are 0 or 1 give
    `leak_at_k`.
    """
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise PMCError(f"worst_of_k: k is {k} but there are {n} samples a question: k from 1 to {n}")
    j = np.arange(n, 1, -1)
    # the weight of the largest, then each from its neighbour: no binomial coefficient that could overflow
    weights = np.concatenate([[k / n], k / n * np.cumprod((j - k).clip(0) / (j - 1))])
    return np.sort(scores, axis=1)[:, ::-1] @ weights


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap confidence interval of the mean (Efron 1979).

    Parameters
    ----------
    values : array [Q]
        One for each question. Questions are drawn again, not samples: the samples of one question are not independent,
        so an interval over samples would be too narrow.
    level : float
        0 to 1.
    resamples : int
    seed : int

    Returns
    -------
    tuple of float
        Percentile intervals of few questions (under about 20) are too narrow; of one question it is a point.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise PMCError(f"bootstrap_interval: values have shape {values.shape}: give one number for each question")
    if not 0 < level < 1 or resamples < 1:
        raise PMCError(f"bootstrap_interval: level {level}, {resamples} resamples: 0 < level < 1, 1 or more")
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
