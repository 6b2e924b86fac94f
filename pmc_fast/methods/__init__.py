"""Other unlearning methods, on PMC's packed pass: what a method is, those there are, and what computes their gradients."""

from .coreset import upcore
from .eul import EUL
from .extrapolation import Memorize, extrapolate
from .icu import ICU
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
    "icu": ICU,
    "eul": EUL,
    "retain_only": RetainOnly,
}

__all__ = [
    "DPO", "EUL", "FLAT", "ICU", "IDK", "METHODS", "MOLLM", "NPO", "REFUSALS", "Batch", "GradDiff", "GradientAscent", "Memorize",
    "Method", "RetainOnly", "SimNPO", "Unlearner", "extrapolate", "upcore",
]  # fmt: skip
