"""How N scored answers become what is trained on."""

import numpy as np


def argmin(scores: np.ndarray) -> np.ndarray:
    """Return the first index of each question's lowest score: scores [Q, N] -> int64 [Q].

    The published code's rule; in the paper's theory (arXiv 2507.04219, section 3) it is the
    Bradley-Terry choice as tau goes to 0.
    """
    return scores.argmin(axis=1)


def bradley_terry(scores: np.ndarray, tau: float) -> np.ndarray:
    """Return the paper's P(i) = softmax_i((1 - s_i) / tau) (arXiv 2507.04219, section 3): float64 [Q, N]."""
    x = (1.0 - scores) / tau
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def draw(probabilities: np.ndarray, key: tuple[int, ...]) -> int:
    """Draw an index with the given probabilities [N]; the same one for the same key."""
    return int(np.random.default_rng(key).choice(len(probabilities), p=probabilities))
