"""Partial Model Collapse unlearning (arXiv 2507.04219), fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PMCConfig
    from .data import Row, collate, encode_pair, load_rows
    from .errors import PMCError
    from .evaluation import evaluate
    from .models.packed_forward import PackedPass
    from .ops import gather_logps, weighted_nll
    from .pmc.algorithm import PMC
    from .pmc.reward import rouge_l_recall
    from .rollout import RolloutEngine
    from .trainer.arguments import PMCArguments
    from .trainer.trainer import PMCTrainer
    from .trainer.unlearn import UnlearnTrainer

    __version__: str

__all__ = [
    "PMC", "PMCArguments", "PMCConfig", "PMCError", "PMCTrainer", "PackedPass", "RolloutEngine", "Row",
    "UnlearnTrainer", "collate", "encode_pair", "evaluate", "gather_logps", "load_rows", "rouge_l_recall", "weighted_nll",
]  # fmt: skip
_MODULES = {
    "config": ["PMCConfig"],
    "data": ["Row", "collate", "encode_pair", "load_rows"],
    "errors": ["PMCError"],
    "evaluation": ["evaluate"],
    "models.packed_forward": ["PackedPass"],
    "ops": ["gather_logps", "weighted_nll"],
    "pmc.algorithm": ["PMC"],
    "pmc.reward": ["rouge_l_recall"],
    "rollout": ["RolloutEngine"],
    "trainer.arguments": ["PMCArguments"],
    "trainer.trainer": ["PMCTrainer"],
    "trainer.unlearn": ["UnlearnTrainer"],
}


def __getattr__(name: str) -> Any:  # on demand: torch and transformers take seconds, which `pmc-fast --help` must not
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("pmc_fast")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
