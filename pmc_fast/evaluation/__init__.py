"""How well a model forgot and what it kept."""

from .answers import greedy_answers
from .likelihood import encode_candidates, mean_nlls
from .metrics import degenerate_share, mean_words, unlearn_quality, utility
from .suite import EvalSet, evaluate, load_sets, with_initial_answers
from .tofu import TofuRow, TofuSet, evaluate_tofu, load_tofu, read_retain_log, tofu_questions

__all__ = [
    "EvalSet",
    "TofuRow",
    "TofuSet",
    "degenerate_share",
    "encode_candidates",
    "evaluate",
    "evaluate_tofu",
    "greedy_answers",
    "load_sets",
    "load_tofu",
    "mean_nlls",
    "mean_words",
    "read_retain_log",
    "tofu_questions",
    "unlearn_quality",
    "utility",
    "with_initial_answers",
]
