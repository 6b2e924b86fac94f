"""Rewards: how much of the model's initial answer a sampled answer still holds."""

import itertools
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from nltk.stem.porter import PorterStemmer

from . import native
from .errors import PMCError

Reward = Callable[[Sequence[str], Sequence[Sequence[str]], int], np.ndarray]
"""Any callable (initial [Q], candidates [Q][N], min_len) -> float64 [Q, N] in [0, 1]; 0: fully unlike."""

_WORDS = re.compile("[a-z0-9]+")
_stem = lru_cache(maxsize=1 << 17)(PorterStemmer().stem)


@lru_cache(maxsize=1 << 12)
def _tokens(text: str) -> tuple[str, ...]:
    """Tokenise as rouge_score 0.1.2 with its stemmer does: words longer than 3 characters are stemmed."""
    words = [_stem(w) if len(w) > 3 else w for w in _WORDS.findall(text.lower())]
    return tuple(w for w in words if w)


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
    if len(initial) != len(candidates):
        raise PMCError(f"{len(initial)} initial answers but {len(candidates)} lists of candidates: give one each")
    counts = {len(texts) for texts in candidates}
    if len(counts) > 1:
        raise PMCError(f"lists of {min(counts)} and {max(counts)} candidates: every question needs the same number")
    ids: dict[str, int] = {}
    references = _encode(initial, ids)
    recall = native.cpu().rouge_l_recall(*references, *_encode(list(itertools.chain(*candidates)), ids))
    if min_len > 0:
        # one np.exp a length, as published: the vectorised exp may differ in the last bit
        penalty = [np.exp(-words) if words < min_len else 0.0 for words in range(min_len + 1)]
        words = np.array([[min(len(x.strip().split(" ")), min_len) for x in texts] for texts in candidates])
        extra = np.array(penalty)[words.astype(np.int64)].reshape(recall.shape)
        recall = np.where(extra > 0, np.minimum(recall + extra, 1.0), recall)
    return recall


def _encode(texts: Sequence[str], ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the texts' word ids, flat (int32), and where each text begins and ends (int64 [texts + 1])."""
    tokens = [_tokens(text) for text in texts]
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(t) for t in tokens], out=offsets[1:])
    flat = [ids.setdefault(word, len(ids)) for text in tokens for word in text]
    return np.array(flat, dtype=np.int32), offsets
