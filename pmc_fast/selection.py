"""How one of N scored answers is picked."""

import numpy as np


def argmin(scores: np.ndarray) -> np.ndarray:
    """Return the first index of each question's lowest score: scores [Q, N] -> int64 [Q].

    The published code's rule; in the paper's theory (arXiv 2507.04219, section 3) it is the
    Bradley-Terry choice P(i) = softmax_i((1 - s_i) / tau) as tau goes to 0.
    """
    return scores.argmin(axis=1)
