"""From the scores of N answers to the answers that are trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import PMCConfig


def argmin(scores: np.ndarray) -> np.ndarray:
    """Return the first index of each question's lowest score: scores [Q, N] -> int64 [Q].

    The published code's rule; in the paper's theory (arXiv 2507.04219, section 3) it is the
    Bradley-Terry choice as tau goes to 0.
    """
    return scores.argmin(axis=1)


def likeliest(scores: np.ndarray, nlls: np.ndarray, good: float) -> int:
    """Return the first index of the lowest nll among scores of at most `good`; if there is none, of the lowest score.

    Extension: where several samples are unlike enough, the one that the model itself would say moves it least.

    Parameters
    ----------
    scores, nlls : ndarray [N]
        A question's; nlls are means over a sample's tokens, in nats. Samples whose nll is inf are chosen only if all are.
    good : float
    """
    finite = np.isfinite(nlls)
    if not finite.any():
        return int(scores.argmin())
    enough = finite & (scores <= good)
    return int(np.where(enough, nlls, np.inf).argmin() if enough.any() else np.where(finite, scores, np.inf).argmin())


def bradley_terry(scores: np.ndarray, tau: float) -> np.ndarray:
    """Return the paper's P(i) = softmax_i((1 - s_i) / tau) (arXiv 2507.04219, section 3): float64 [Q, N]."""
    x = (1.0 - scores) / tau
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def draw(probabilities: np.ndarray, key: tuple[int, ...]) -> int:
    """Draw an index with the given probabilities [N]; the same one for the same key."""
    return int(np.random.default_rng(key).choice(len(probabilities), p=probabilities))


def select(
    config: PMCConfig, candidates: Sequence[Any], scores: np.ndarray, nlls: np.ndarray, key: tuple[int, ...]
) -> tuple[list[list[Any]], float]:
    """Return the answers to train on, each with its weight, and their score.

    Parameters
    ----------
    config : PMCConfig
        selection, tau and, for "likeliest", resample_above are read.
    candidates : sequence
        A question's N answers: texts, or lists of token ids.
    scores, nlls : ndarray [N]
        nlls, of which "likeliest" alone makes use, are means over a sample's tokens.
    key : tuple of int
        Of the draw, if `config.selection` draws.
    """
    if config.selection in ("argmin", "likeliest"):
        nearest = config.selection == "argmin"
        pick = int(argmin(scores[None])[0]) if nearest else likeliest(scores, nlls, config.resample_above)
        return [[candidates[pick], 1.0]], float(scores[pick])
    weights = bradley_terry(scores[None], config.tau)[0]
    if config.selection == "bradley_terry":
        pick = draw(weights, key)
        return [[candidates[pick], 1.0]], float(scores[pick])
    merged: dict[Any, list[Any]] = {}  # equal answers become one with the sum of their weights
    for candidate, weight in zip(candidates, weights, strict=True):
        name = candidate if isinstance(candidate, str) else tuple(candidate)
        merged.setdefault(name, [candidate, 0.0])[1] += float(weight)
    return list(merged.values()), float(np.clip(weights @ scores, 0, 1))
