"""How well a model forgot and what it kept."""

from .answers import greedy_answers
from .metrics import degenerate_share, mean_words, unlearn_quality, utility
from .suite import EvalSet, evaluate, load_sets, with_initial_answers

__all__ = [
    "EvalSet",
    "degenerate_share",
    "evaluate",
    "greedy_answers",
    "load_sets",
    "mean_words",
    "unlearn_quality",
    "utility",
    "with_initial_answers",
]
