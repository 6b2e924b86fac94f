"""Other unlearning methods, on PMC's packed pass: what a method is, those there are, and what computes their gradients."""

from .method import REFUSALS, Batch, Method
from .published import DPO, FLAT, IDK, NPO, GradDiff, GradientAscent, RetainOnly, SimNPO
from .unlearner import Unlearner

METHODS: dict[str, type[Method]] = {
    "ga": GradientAscent,
    "grad_diff": GradDiff,
    "idk": IDK,
    "dpo": DPO,
    "npo": NPO,
    "simnpo": SimNPO,
    "flat": FLAT,
    "retain_only": RetainOnly,
}

__all__ = [
    "DPO", "FLAT", "IDK", "METHODS", "NPO", "REFUSALS", "Batch", "GradDiff", "GradientAscent", "Method", "RetainOnly", "SimNPO",
    "Unlearner",
]  # fmt: skip
