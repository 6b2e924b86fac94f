"""Which forget questions need no unlearning: samples of the untouched model never say what is to be forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import UnlearnConfig
from ..data import Question, Row, load_rows
from ..errors import PMCError
from ..evaluation import degenerate_share, encode_candidates, known_forgotten, sampling_attack
from ..pmc.reward import choose_scorer
from ..utils.words import says_nothing
from .evaluator import Evaluator


@dataclass(slots=True)
class KnownForgotten:
    """Which questions of a forget set need no unlearning: row numbers, no text."""

    rows: list[int]  # from 1: to be left out
    questions: int
    unjudged: int  # neither truth nor paraphrase to compare with: never left out
    samples: int  # of a question
    criterion: str
    degenerate: float | None  # share of the left out questions' samples under 3 words: no answer is no evidence
    seconds: float = 0.0  # of the rollout


def read_paraphrases(config: UnlearnConfig, forget: Sequence[Row]) -> list[Question | None]:
    """Return each forget question in other words, where a truth is missing and the run has paraphrases.

    Raises
    ------
    PMCError
        Paraphrases of another number of questions; no row has anything to be judged by.
    """
    if all(row.answer for row in forget):
        return [None] * len(forget)
    how = config.reading("paraphrased")
    rows = load_rows(config.paraphrased, paraphrased=True, **how) if config.paraphrased else []
    if rows and len(rows) != len(forget):
        raise PMCError(
            f"filter known_forgotten: {config.forget} has {len(forget)} rows and {config.paraphrased} {len(rows)}: "
            "where answers are missing, row by row the same questions in other words are needed"
        )
    if not rows and not any(row.answer for row in forget):
        raise PMCError(
            f"filter known_forgotten: {config.forget} has no answers to compare samples with: give answers or "
            "--paraphrased, or leave it out"
        )
    if not rows:
        return [None] * len(forget)
    return [r.question if r.question != row.question else None for r, row in zip(rows, forget, strict=True)]


def judge(
    evaluator: Evaluator,
    config: UnlearnConfig,
    forget: Sequence[Row],
    paraphrases: Sequence[Question | None],
    *,
    truths: Sequence[str] = (),
) -> KnownForgotten:
    """Sample every question once, as the run would, and find those that need no unlearning.

    Parameters
    ----------
    evaluator : Evaluator
        Of the untouched model.
    config : UnlearnConfig
        The run's num_samples, temperature, top_k, top_p and seed are used.
    forget : sequence of Row
    paraphrases : sequence of Question or None
        `read_paraphrases`.
    truths : sequence of str, optional
        Everything that the run compares answers with, for the choice of its reward.

    Notes
    -----
    With a truth: no sample's ROUGE-L recall of it is above ``skip_threshold``. Without: the model's greedy answer is
    not more likely (mean log-prob of its tokens) than under the paraphrase, and no sample repeats it to
    ``leak_threshold``. The second half is this package's: a model that knows a fact well finds it as likely under
    any wording, so the first half alone would leave it out; but such a model also repeats the fact in its samples.
    A question without a truth to which the model says nothing can't be judged, and is not left out.
    """
    c = config
    without = [i for i, row in enumerate(forget) if not row.answer]
    said = evaluator.answers([forget[i].question for i in without])
    initial = dict(zip(without, said, strict=True))
    rows = [Row(row.question, row.answer or initial[i]) for i, row in enumerate(forget)]
    scorer = choose_scorer(c.reward, [*truths, *(row.answer or "" for row in rows)])
    reward = scorer.name
    how: dict[str, Any] = {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p, "seed": c.seed}
    asked = [i for i, row in enumerate(rows) if not (i in initial and says_nothing(initial[i]))]
    scorer.require_words(f"filter known_forgotten: {c.forget}", ((i + 1, rows[i].answer or "") for i in asked))
    scores = np.full((len(rows), c.num_samples), np.nan)
    texts: dict[int, list[str]] = {}
    seconds = 0.0
    if asked:
        result = sampling_attack(
            evaluator.engine,
            evaluator.encoder,
            [rows[i] for i in asked],
            num_samples=c.num_samples,
            reward=reward,
            **how,
        )
        sampled = [asked[n] for n in result.rows]
        scores[sampled] = result.scores
        texts, seconds = dict(zip(sampled, result.samples, strict=True)), result.seconds
    of_truth = scores.copy()
    of_truth[without] = np.nan
    skipped = {*known_forgotten(of_truth, c.skip_threshold)}
    # NaN is never below a threshold
    candidates = {i: q for i in without if (q := paraphrases[i]) is not None and (scores[i] < c.leak_threshold).all()}
    skipped |= _no_more_likely(evaluator, c, {i: (forget[i].question, q, initial[i]) for i, q in candidates.items()})
    unjudged = {i for i in without if paraphrases[i] is None} | {*np.flatnonzero(np.isnan(scores).any(axis=1))}
    return KnownForgotten(
        rows=[i + 1 for i in sorted(skipped)],
        questions=len(forget),
        unjudged=len(unjudged),
        samples=c.num_samples,
        criterion=_criterion(c, reward, len(without), len(forget)),
        degenerate=degenerate_share([t for i in skipped for t in texts[i]], reward) if skipped else None,
        seconds=seconds,
    )


def _no_more_likely(
    evaluator: Evaluator, config: UnlearnConfig, asked: dict[int, tuple[Question, Question, str]]
) -> set[int]:
    """Of questions with a paraphrase and an answer, return those whose answer is not more likely than under it."""
    if not asked:
        return set()
    pairs = [(q, [answer]) for *wordings, answer in asked.values() for q in wordings]
    groups = encode_candidates(evaluator.encoder, config.forget, pairs)
    own, other = np.array(evaluator.mean_nlls(groups, config.max_tokens)).reshape(-1, 2).T
    return {i for i, no_more in zip(asked, own >= other, strict=True) if no_more}


def _criterion(config: UnlearnConfig, reward: str, without: int, count: int) -> str:
    lines = []
    if without < count:
        lines.append(f"every sample's recall of the truth ({reward}) is at most {config.skip_threshold:g}")
    if without:
        lines.append(
            f"without a truth: the greedy answer is not more likely than under the paraphrase, and every sample's "
            f"recall of it is below {config.leak_threshold:g}"
        )
    return "; ".join(lines)
