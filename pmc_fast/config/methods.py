"""Which unlearning method a run uses, its parameters, and the settings that are PMC's alone."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .filters import Filter, filter_of
from .parts import (
    OptionalPositive,
    OptionalShare,
    PMCConfig,
    Range,
    SamplingConfig,
    Settings,
    SharedConfig,
    option,
    require,
)

MethodName = Literal[
    "pmc", "ga", "grad_diff", "idk", "dpo", "npo", "simnpo", "flat", "mollm", "icu", "eul", "retain_only"
]  # fmt: skip
OptionalNotNegative = Annotated[float | None, Range("0 or more", lambda x: x >= 0)]

# what a run does with its retain pairs, whatever the method
OF_RETAIN = ("allow_overlap", "retain_loss", "retain_order", "retain_per_question")
# settings of PMC that no other method has
PMC_ALONE = tuple(
    f.name
    for f in dataclasses.fields(PMCConfig)
    if f.name not in {"retain_weight", *OF_RETAIN, *(shared.name for shared in dataclasses.fields(SharedConfig))}
)
SAMPLING = tuple(f.name for f in dataclasses.fields(SamplingConfig))


@dataclass(kw_only=True)
class MethodConfig(Settings):
    """The method and its parameters; those that are unset are its paper's."""

    method: MethodName = option(
        "pmc", "unlearning method; all but pmc, idk and retain_only train on the answers to be forgotten"
    )
    alpha: OptionalShare = option(None, "parameter of eul, its share of the pairs to keep (unset: the paper's)")
    beta: OptionalPositive = option(None, "parameter of dpo, npo, simnpo and icu (unset: the paper's)")
    gamma: OptionalNotNegative = option(None, "parameter of simnpo, its margin, and of eul (unset: the paper's)")
    divergence: str = option("", "parameter of flat: kl, total_variation, jensen_shannon or pearson (unset: kl)")


PARAMETERS = ("retain_weight", *(f.name for f in dataclasses.fields(MethodConfig) if f.name != "method"))


def require_without_pmc(config: PMCConfig, names: Iterable[str], method: str, remedy: str = "left out") -> None:
    """Refuse settings of PMC that have other values than their defaults, with another method."""
    defaults = {f.name: f.default for f in dataclasses.fields(PMCConfig)}
    for name in names:
        value = getattr(config, name)
        require(value == defaults[name], name, value, f"{remedy} with {method}: it is a setting of PMC")


def of_pmc(chosen: Filter) -> tuple[str, ...]:
    """Return the settings that only PMC reads: a filter may sample questions, too."""
    return tuple(name for name in PMC_ALONE if not (chosen.samples and name in SAMPLING))


def without_pmc(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's settings for another method than PMC; refuse settings of PMC that were given beside it."""
    method, unread = given["method"], of_pmc(filter_of(given))
    for name in unread:
        require(name not in given, name, given.get(name), f"left out with method {method}: it is a setting of PMC")
    return {name: value for name, value in preset.items() if name not in (*unread, "retain_weight", "retain_loss")}
