"""Other unlearning methods, on PMC's packed pass: what a method is, those there are, and what computes their gradients."""

from .method import REFUSALS, Batch, Method
from .mollm import MOLLM
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
    "mollm": MOLLM,
    "retain_only": RetainOnly,
}

__all__ = [
    "DPO", "FLAT", "IDK", "METHODS", "MOLLM", "NPO", "REFUSALS", "Batch", "GradDiff", "GradientAscent", "Method", "RetainOnly",
    "SimNPO", "Unlearner",
]  # fmt: skip
