"""The method of a run, made from its settings, and what is said of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..config import PARAMETERS, UnlearnConfig
from ..data import Row
from ..errors import PMCError
from ..methods import METHODS, Method
from ..methods.unlearner import check_retain_loss, check_rows
from ..report.render import PMC


def method_of(config: UnlearnConfig) -> Method | None:
    """Return the method with the parameters that were given; None: PMC, which is no `Method`.

    Raises
    ------
    PMCError
        It does not have one of them.
    """
    if config.method == "pmc":
        return None
    made = METHODS[config.method]
    own = [f.name for f in dataclasses.fields(made)]
    given = {name: getattr(config, name) for name in PARAMETERS if getattr(config, name) not in (None, "")}
    for name, value in given.items():
        if name not in own:
            raise PMCError(
                f"{name} is {value!r}: method {config.method} has no such parameter, only {', '.join(own)}"
            )
    return made(**given)


def checked_method(config: UnlearnConfig, forget: Sequence[Row], processes: int) -> tuple[Method | None, list[str]]:
    """Return a run's method, and warnings; refuse data and processes that it can't train with."""
    method = method_of(config)
    if processes > 1 and (method is not None or config.max_seconds):
        what = f"method {config.method}" if method is not None else "max_seconds"
        raise PMCError(f"WORLD_SIZE is {processes}: {what} runs on one process")
    if method is None:
        return None, []
    check_rows(method, forget, config.forget)
    check_retain_loss(method, config)
    warnings = [f"method {config.method} trains on the answers to be forgotten"] if method.told else []
    if not method.needs_retain:
        warnings.append(f"retain_weight is 0, as method {config.method} has it: {config.retain} is only evaluated")
    return method, warnings


def facts(config: UnlearnConfig) -> dict[str, Any]:
    """Return what a report says of its run's method."""
    method = method_of(config)
    if method is None:
        return PMC
    return {
        "name": config.method,
        "title": type(method).__name__,
        "told": method.told,
        "parameters": dataclasses.asdict(method),
    }
