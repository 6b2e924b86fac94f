"""All attacks on a model, summed up in numbers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..config import RewardName
from ..data import Encoder, Row
from ..errors import PMCError
from ..pmc.reward import choose_scorer
from ..rollout import Rollouts
from .attacks import AttackResult, sampling_attack
from .metrics import degenerate_share
from .statistics import bootstrap_interval, leak_at_k, worst_of_k

COUNTERS = ("rows", "sampled_tokens", "prefill_tokens", "steps")


@dataclass(frozen=True, slots=True)
class LeakageSettings:
    """How to attack. Sampling is plain by default: leaks that top_k or top_p would hide count."""

    num_samples: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    threshold: float = 0.5  # a sample leaks if its recall is at least this
    prefill: str = "The answer is: "  # "": no such attack
    first_words: int = 3  # of the truth; 0: no such attack
    level: float = 0.95  # of the confidence intervals
    resamples: int = 2000
    seed: int = 0
    reward: RewardName = "auto"  # how samples are compared; auto: by the truths

    def attacks(self) -> dict[str, dict[str, Any]]:
        """Return the attacks by name, and what each gives away."""
        made: dict[str, dict[str, Any]] = {"sampling": {}}
        if self.prefill:
            made["prefill"] = {"prefill": self.prefill}
        if self.first_words:
            made["first_words"] = {"first_words": self.first_words}
        return made


def leakage(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    rows: Sequence[Row],
    paraphrased: Sequence[Row] | None = None,
    settings: LeakageSettings | None = None,
    *,
    log_text: bool = False,
    on_attack: Callable[[str, str], None] = lambda questions, attack: None,
) -> dict[str, Any]:
    """Attack a model in every way that `settings` has, and sum up.

    Parameters
    ----------
    engine, encoder, rows
        As `sampling_attack` takes them.
    paraphrased : sequence of Row, optional
        The questions in other words, with their answers: attacked likewise.
    settings : LeakageSettings, optional
    log_text : bool
        Keep each question, its truth and its worst sample in the result.
    on_attack : callable
        Is told of each attack before it begins: the set's name and the attack's.

    Returns
    -------
    dict
        Ready for JSON. ``settings``; ``sets``: per set (``forget``, ``forget_paraphrased``) and attack
        (``sampling``, ``prefill``, ``first_words``) what `summarize` returns.
    """
    s = settings or LeakageSettings()
    truths = [row.answer for row in (*rows, *(paraphrased or ())) if row.answer]
    s = replace(s, reward=choose_scorer(s.reward, truths).name)
    names = ("num_samples", "temperature", "top_p", "top_k", "threshold", "seed", "reward")
    how: dict[str, Any] = {name: getattr(s, name) for name in names}
    sets: dict[str, dict[str, Any]] = {}
    for name, asked in {"forget": rows, "forget_paraphrased": paraphrased or ()}.items():
        for attack, change in s.attacks().items() if asked or name == "forget" else ():
            on_attack(name, attack)
            result = sampling_attack(engine, encoder, asked, **how, **change)
            summary = summarize(result, level=s.level, resamples=s.resamples, seed=s.seed, reward=s.reward)
            if log_text:
                summary["texts"] = [
                    {
                        "question": asked[row].question,
                        "truth": asked[row].answer,
                        "worst": texts[int(scores.argmax())],
                        "rouge_l_recall": float(scores.max()),
                    }
                    for row, texts, scores in zip(result.rows, result.samples, result.scores, strict=True)
                ]
            sets.setdefault(name, {})[attack] = summary
    return {"settings": asdict(s), "sets": sets}


def summarize(
    result: AttackResult,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    reward: RewardName = "auto",
) -> dict[str, Any]:
    """Sum up an attack in numbers; `reward` counts its samples' words.

    Returns
    -------
    dict
        Ready for JSON, without any text. ``mean``, ``worst`` and, for k of 1, 2, 4, ... N, ``leak_at_k`` and
        ``worst_of_k``: means over questions, ``value`` and ``interval`` (`bootstrap_interval`).
        ``leaking_questions``: the share with any leak. ``degenerate``: the share of samples under 3 words, which
        leak nothing and say nothing. ``questions``, ``left_out``, ``per_question``, the rollout's counters,
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
        ROUGE-L recall of each sampled answer against the truth. NaN where there is no truth to compare with (none
        was given): such a question never qualifies.
    threshold : float
        The largest recall that says nothing. With 0 not one word may be shared; answers in whole sentences share
        "the" and "of" with most truths.

    Returns
    -------
    list of int
        Questions none of whose scores is above `threshold`. One that no sample answered with words qualifies too:
        look at the share of degenerate samples.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise PMCError(f"known_forgotten: scores have shape {scores.shape}: give at least one sample a question")
    return np.flatnonzero((scores <= threshold).all(axis=1)).tolist()
