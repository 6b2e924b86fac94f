"""Partial Model Collapse unlearning (arXiv 2507.04219), fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PMCConfig
    from .errors import PMCError
    from .pmc.algorithm import PMC
    from .trainer.arguments import PMCArguments
    from .trainer.trainer import PMCTrainer

__version__ = "0.1.0"
__all__ = ["PMC", "PMCArguments", "PMCConfig", "PMCError", "PMCTrainer"]

_HOMES = {
    "PMC": "pmc.algorithm",
    "PMCConfig": "config",
    "PMCError": "errors",
    "PMCArguments": "trainer.arguments",
    "PMCTrainer": "trainer.trainer",
}


def __getattr__(name: str) -> Any:  # on demand: torch and transformers take seconds that `pmc-fast --help` has not
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
