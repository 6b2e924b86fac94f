"""Rewards: how much of the model's initial answer a sampled answer repeats."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import LCSseq

from ..config import RewardName
from ..errors import PMCError
from ..utils import words
from ..utils.text import row_numbers

Reward = Callable[[Sequence[str], Sequence[Sequence[str]], int], np.ndarray]
"""Any callable (initial [Q], candidates [Q][N], min_len) -> float64 [Q, N] in [0, 1]; 0: fully unlike."""

HIDDEN = 0.01  # auto uses ROUGE up to this share of letters that ROUGE ignores; names in English texts stay far below
HIDDEN_WORDS = 0.25  # and up to this share of one text's words: a TOFU text with three Cyrillic titles has 0.22


def rouge_l_recall(initial: Sequence[str], candidates: Sequence[Sequence[str]], min_len: int = 0) -> np.ndarray:
    """Score candidates by ROUGE-L recall against the initial answers.

    Parameters
    ----------
    initial : Sequence[str]
        Q texts: the targets, y_i of the paper.
    candidates : Sequence[Sequence[str]]
        Q sequences of N texts each: the predictions, x_ij.
    min_len : int
        Candidates of fewer than this many words (``len(x.strip().split(" "))``) get exp(-words)
        on top, capped at 1. 0 turns this off.

    Returns
    -------
    numpy.ndarray
        float64 [Q, N]: length of the longest common subsequence of stemmed words over the number
        of words in the initial answer; 0 where either is empty.

    Raises
    ------
    PMCError
        `candidates` does not give the same number of texts for each of the Q questions.

    Notes
    -----
    Equal bit for bit to rouge_score 0.1.2, ``RougeScorer(["rougeL"], use_stemmer=True)``, with the
    published PMC code's length penalty (arXiv 2507.04219, section 4).
    """
    recall = _recall(initial, candidates, lambda text, of: words.rouge_units(text))
    return _with_penalty(recall, candidates, min_len, lambda text: len(text.strip().split(" ")))


def judged(
    reward: Reward, initial: Sequence[str], candidates: Sequence[Sequence[str]], min_len: int = 0
) -> np.ndarray:
    """Call a reward, which may be a user's own, and refuse anything but scores [Q, N] in [0, 1]."""
    shape = (len(candidates), len(candidates[0]))
    made = reward(initial, candidates, min_len)
    try:
        scores = np.asarray(made, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PMCError(
            f"the reward returned a {type(made).__name__}: it must be an array {shape} of numbers"
        ) from error
    if scores.shape != shape:
        raise PMCError(
            f"the reward returned scores {scores.shape}: they must be {shape}, one of each sample of each question"
        )
    outside = ~((scores >= 0) & (scores <= 1))  # NaN too
    if outside.any():
        raise PMCError(f"the reward returned a score of {scores[outside][0]}: it must stay within 0 and 1")
    return scores


def unicode_recall(initial: Sequence[str], candidates: Sequence[Sequence[str]], min_len: int = 0) -> np.ndarray:
    """Score candidates as `rouge_l_recall` does, by the words of any script (`words.unicode_units`).

    Words are stemmed if the initial answer is English (`words.is_english`): between texts in ASCII the recall equals
    ROUGE's. Candidates of fewer than `min_len` words (`words.count_words`) get exp(-words) on top.
    """
    recall = _recall(initial, candidates, lambda text, of: words.unicode_units(text, words.is_english(of)))
    return _with_penalty(recall, candidates, min_len, words.count_words)


def _recall(
    initial: Sequence[str], candidates: Sequence[Sequence[str]], units: Callable[[str, str], Sequence[str]]
) -> np.ndarray:
    """Return LCS recalls; `units` takes a text and the initial answer that it is compared with."""
    if len(initial) != len(candidates):
        raise PMCError(f"{len(initial)} initial answers but {len(candidates)} lists of candidates: give one each")
    counts = {len(texts) for texts in candidates}
    if len(counts) > 1:
        raise PMCError(f"lists of {min(counts)} and {max(counts)} candidates: every question needs the same number")
    recall = np.zeros((len(initial), max(counts, default=0)))
    for row, y, texts in zip(recall, initial, candidates, strict=True):
        reference = units(y, y)
        if reference:
            row[:] = [LCSseq.similarity(reference, units(x, y)) / len(reference) for x in texts]
    return recall


def _with_penalty(
    recall: np.ndarray, candidates: Sequence[Sequence[str]], min_len: int, count: Callable[[str], int]
) -> np.ndarray:
    if min_len <= 0:
        return recall
    # one np.exp a length, as published: the vectorised exp may differ in the last bit
    penalty = [np.exp(-n) if n < min_len else 0.0 for n in range(min_len + 1)]
    counts = np.array([[min(count(x), min_len) for x in texts] for texts in candidates])
    extra = np.array(penalty)[counts.astype(np.int64)].reshape(recall.shape)
    return np.where(extra > 0, np.minimum(recall + extra, 1.0), recall)


@dataclass(frozen=True, slots=True)
class Scorer:
    """One way to compare texts, in training and in evaluation: `ROUGE` or `UNICODE`."""

    name: RewardName
    recall: Reward
    count_words: Callable[[str], int]
    end_of_words: Callable[[str, int], int]  # where a text's first so many words end
    has_words: Callable[[str], bool]
    refusal: str  # the error for a text that can't be compared

    def require_words(self, source: str, texts: Iterable[tuple[int, str]]) -> None:
        """Refuse texts in which the scorer sees too few letters: their recall would always be near 0.

        Parameters
        ----------
        source : str
            Names the texts in the error.
        texts : iterable of (int, str)
            Each with its row's number, from 1.
        """
        blind = [number for number, text in texts if not self.has_words(text)]
        if blind:
            raise PMCError(f"{source}, {row_numbers(blind)}: {self.refusal}")


def _seen_by_rouge(text: str) -> bool:
    hidden, count = words.hidden_from_rouge(text)
    return count > 0 and 2 * hidden <= count


ROUGE = Scorer(
    "rouge", rouge_l_recall, words.count_runs, words.end_of_runs, _seen_by_rouge,
    "the rouge reward sees under half of the answer's letters (it knows a to z and 0 to 9), so that nothing can be "
    "compared with it: use --reward unicode, or leave the row out where it has none",
)  # fmt: skip
UNICODE = Scorer(
    "unicode", unicode_recall, words.count_words, words.end_of_words, lambda text: bool(words.unicode_units(text)),
    "the answer has no letter or digit, so that nothing can be compared with it: leave the row out",
)  # fmt: skip
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (ROUGE, UNICODE)}


def choose_scorer(reward: RewardName, texts: Iterable[str]) -> Scorer:
    """Return the scorer that a `PMCConfig.reward` names.

    Parameters
    ----------
    reward : {"auto", "rouge", "unicode"}
        auto: rouge, unless it ignores over 1 % of all letters and digits of the texts or over half of one text's, or
        over a quarter of one text's words are mostly outside ASCII.
    texts : iterable of str
        The texts that others are compared with: truths and initial answers.
    """
    if reward != "auto":
        if reward not in SCORERS:
            raise PMCError(f"reward is {reward!r}: it must be one of auto, {', '.join(SCORERS)}")
        return SCORERS[reward]
    all_hidden = all_count = 0
    for text in texts:
        hidden, count = words.hidden_from_rouge(text)
        if 2 * hidden > count or words.share_beyond_ascii(text) > HIDDEN_WORDS:
            return UNICODE
        all_hidden, all_count = all_hidden + hidden, all_count + count
    return UNICODE if all_hidden > HIDDEN * all_count else ROUGE
