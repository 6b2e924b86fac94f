"""What n samples a question say about k of them, and how sure a mean over questions is."""

import math
from collections.abc import Callable

import numpy as np

from ..errors import PMCError


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
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a percentile bootstrap confidence interval (Efron 1979).

    Parameters
    ----------
    values : array [Q]
        One for each question. Questions are what is drawn again: the samples of one question are no independent
        evidence, so an interval over samples would be too narrow.
    statistic : callable
        Values [Q] -> number.
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
    rng = np.random.default_rng(seed)
    found = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
