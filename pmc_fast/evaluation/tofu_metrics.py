"""TOFU's metrics from mean token losses (arXiv 2401.06121, section 2.2): numpy alone, no model.

A loss is the mean negative log-likelihood of an answer's tokens, in nats. A truth ratio is kept as the TOFU paper
defines it, false over true: near 1 where a model doesn't know the answer from others, near 0 where it does.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import PMCError

Variant = Literal["geometric", "arithmetic"]


def probability(losses: Sequence[float]) -> np.ndarray:
    """Return exp(-loss) of each answer: its probability, to the power of one over its length."""
    return np.exp(-_checked(losses))


def option_probability(true: Sequence[float], false: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the true answer's probability among a question's options, for real authors and world facts.

    Parameters
    ----------
    true : sequence of R floats
        Loss of each question's true answer.
    false : sequence of R sequences of floats
        Losses of its false ones.
    """
    p = probability(true)
    return p / (p + _by_row(lambda losses: np.exp(-losses).sum(), false))


def truth_ratio(
    true: Sequence[float], false: Sequence[Sequence[float]], variant: Variant = "geometric"
) -> np.ndarray:
    """Return each question's truth ratio, false over true.

    Parameters
    ----------
    true : sequence of R floats
        Loss of the paraphrased true answer; of the true answer where the data has no paraphrase.
    false : sequence of R sequences of floats
        Losses of the perturbed answers.
    variant : {"geometric", "arithmetic"}
        The mean over the perturbed answers' probabilities. Geometric, exp of the mean loss, is OpenUnlearning's
        (``truth_ratio``) and what TOFU's leaderboard script computes (``aggregate_eval_stat.py``). Arithmetic is
        equation 1 of the TOFU paper and ``utils.get_model_utility`` of its code.

    Notes
    -----
    OpenUnlearning adds 1e-10 to its denominators, which is left out here: it matters for losses of 10 and more.
    """
    if variant == "geometric":
        mean_false = _by_row(np.mean, false)
    else:  # log of the mean probability, by its largest term: none of a broken model's underflows
        mean_false = _by_row(lambda losses: losses.min() - np.log(np.exp(losses.min() - losses).mean()), false)
    with np.errstate(over="ignore"):
        return np.exp(_checked(true) - mean_false)


def forget_truth_ratio(ratios: np.ndarray) -> float:
    """Return a forget set's truth ratio, the mean of min(r, 1/r): 1 where true and false are equally likely."""
    with np.errstate(divide="ignore"):
        return float(np.minimum(ratios, 1 / ratios).mean())


def kept_truth_ratio(ratios: np.ndarray) -> float:
    """Return a kept set's truth ratio, the mean of max(0, 1 - r): 1 where only the true answer is likely."""
    return float(np.maximum(0, 1 - ratios).mean())


def model_utility(values: Sequence[float]) -> float:
    """Return the harmonic mean of nine numbers: probability, ROUGE-L recall and truth ratio of the three kept sets.

    It is 0 where one of them is.
    """
    array = _checked(values)
    return float(len(array) / (1 / array).sum()) if (array > 0).all() else 0.0


def forget_quality(ratios: np.ndarray, retain_ratios: np.ndarray) -> float:
    """Return the p-value of a two-sample Kolmogorov-Smirnov test between two models' truth ratios on a forget set.

    The second is a model that never saw the set. Near 1 the two can't be told apart; near 0 the first still knows
    what the other doesn't, or shows that it was made to forget.
    """
    return float(kolmogorov_smirnov()(_checked(ratios), _checked(retain_ratios)).pvalue)


def kolmogorov_smirnov() -> Callable[..., Any]:
    """Return scipy's test, or refuse where scipy is missing."""
    try:
        from scipy.stats import ks_2samp
    except ImportError as error:
        raise PMCError("forget quality needs scipy: pip install 'pmc_fast[cli]'") from error
    return ks_2samp


def _by_row(function: Callable[[np.ndarray], Any], rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([function(_checked(row)) for row in rows])


def _checked(numbers: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(numbers, dtype=np.float64)
    if not len(array) or np.isnan(array).any():
        raise PMCError("a TOFU metric is asked of no numbers, or of NaN: give a finite loss for each answer")
    return array
