"""PMC as a trainer of OpenUnlearning (https://github.com/locuslab/open-unlearning): `trainer=PMC`.

From the root of a checkout, `python -m pmc_fast.integrations.open_unlearning` takes the place of `python src/train.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handler import PMC

__all__ = ["PMC"]


def __getattr__(name: str) -> Any:  # on demand: its base class is found only once src/ is on sys.path
    if name == "PMC":
        from .handler import PMC

        return PMC
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
