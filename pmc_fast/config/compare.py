"""The settings of a comparison: methods and seeds, each an unlearning run with settings that all of them share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from ..errors import PMCError
from .commands import UnlearnConfig
from .methods import PARAMETERS, PMC_ALONE, MethodName
from .parts import Count, OptionalPositive, Path, Settings, option, require

METHODS = get_args(MethodName)
# settings of a run that are the comparison's, or a method's own: those are given with --set
OWN = {
    "method", "seed", "output", "max_steps", "max_seconds", "resume", "checkpoint_steps", "profile", "report_to", "save_dtype",
    "evaluate", "min_quality", "min_utility", "max_degenerate", "skip_known_forgotten", *PARAMETERS, *PMC_ALONE,
}  # fmt: skip
# settings that are the comparison's: without the same ones for all methods there is none
COMMON = {
    "method": "--methods", "seed": "--seeds", "output": "--output", "max_steps": "--steps", "max_seconds": "--seconds",
}  # fmt: skip
SAME = ("model", "forget", "retain", "paraphrased", "general", "evaluate")
SHARED = tuple(f.name for f in dataclasses.fields(UnlearnConfig) if f.name not in OWN)


@dataclass(kw_only=True)
class CompareConfig(Settings):
    """Which runs a comparison has, and how long each trains."""

    output: Path = option(
        "", "directory of the comparison: new, or an earlier one, whose finished runs are not repeated"
    )
    methods: str = option("pmc,npo,simnpo,idk", f"methods, separated by commas: {', '.join(METHODS)}")
    seeds: str = option("0,1,2", "seeds, separated by commas: a run for each method and seed")
    seconds: OptionalPositive = option(
        None, "seconds of training of each run, evaluations not counted; or STEPS (with neither, NUM_EPOCHS)"
    )
    steps: Count = option(0, "optimizer steps of each run (0: off)")
    settings: list[str] = option(
        [],
        "a setting of one method, such as npo.learning_rate=5e-5 or pmc.num_samples=5; may be repeated",
        aliases=["--set"],
    )
    keep_models: bool = option(False, "write each run's model, too; by default its reports alone")

    def validate(self) -> None:
        super().validate()
        require(bool(self.output), "output", self.output, "a directory")
        require(not (self.seconds and self.steps), "steps", self.steps, "left out with seconds")
        for name in self.method_names:
            require(name in METHODS, "methods", name, f"of {', '.join(METHODS)}")
        for name, given in (("methods", self.method_names), ("seeds", self.seed_numbers)):
            require(
                bool(given) and len(set(given)) == len(given), name, getattr(self, name), "a list without repetition"
            )

    @property
    def method_names(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",")]

    @property
    def seed_numbers(self) -> list[int]:
        try:
            return [int(text) for text in self.seeds.split(",")]
        except ValueError:
            raise PMCError(f"seeds is {self.seeds!r}: it must be numbers, separated by commas") from None

    def runs(self, preset: str | None, shared: Mapping[str, Any]) -> list[UnlearnConfig]:
        """Return each run's settings, seed by seed.

        Parameters
        ----------
        preset : str, optional
        shared : mapping
            Settings of `SHARED` that were given.
        """
        own = self._own()
        limits = {"max_seconds": self.seconds} if self.seconds else {"max_steps": self.steps} if self.steps else {}
        return [
            UnlearnConfig.merge(
                preset,
                shared,
                own.get(method, {}),
                limits | {"method": method, "seed": seed, "output": f"{self.output}/{method}-seed{seed}"},
            )
            for seed in self.seed_numbers
            for method in self.method_names
        ]

    def _own(self) -> dict[str, dict[str, Any]]:
        """Return the settings of single methods, by their names."""
        found: dict[str, dict[str, Any]] = {}
        for text in self.settings:
            name, _, value = text.partition("=")
            method, _, setting = name.partition(".")
            if method not in self.method_names or not setting or not value:
                raise PMCError(
                    f"settings has {text!r}: write METHOD.NAME=VALUE, METHOD being one of {', '.join(self.method_names)}"
                )
            if setting in found.setdefault(method, {}):
                raise PMCError(f"settings has {method}.{setting} twice: give it once")
            found[method][setting] = value
        by_field = {method: UnlearnConfig.by_field(given, method) for method, given in found.items()}
        for method, given in by_field.items():
            for name in given:
                if name in COMMON or name in SAME:
                    remedy = f"use {COMMON[name]}" if name in COMMON else "it must be the same for all methods"
                    raise PMCError(f"settings has {method}.{name}: {remedy}")
        return {
            method: {name: _typed(name, value) for name, value in given.items()} for method, given in by_field.items()
        }


def _typed(name: str, value: str) -> Any:
    """Return a setting's value in the type of its field; names that are unknown are refused later."""
    hint = get_type_hints(UnlearnConfig).get(name, str)
    kinds = [kind for kind in (bool, int, float) if kind is hint or kind in get_args(hint)]
    if not kinds:
        return value
    if kinds[0] is bool:
        require(value in ("true", "false"), name, value, "true or false")
        return value == "true"
    try:
        return kinds[0](value)
    except ValueError:
        raise PMCError(f"{name} is {value!r}: it must be a number") from None
