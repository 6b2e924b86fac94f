"""Erasure requests: an adapter and a record each, stacked on one frozen model."""

from importlib import import_module
from typing import Any

_MODULES = {"Worker": "worker", "Spool": "spool"}


def __getattr__(name: str) -> Any:  # on demand, as the package's own
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
