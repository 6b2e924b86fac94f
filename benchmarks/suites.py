"""Result files by suite, and how their numbers are formatted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmc_fast.bench.table import duration, times
from pmc_fast.bench.table import few_rounds as few
from pmc_fast.bench.table import ranged as ranged_values

from . import harness

Documents = Mapping[str, dict[str, Any]]


class Missing(KeyError):
    """A result that a row needs is not there."""


class Suites:
    """Result files by suite."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents

    def results(self, suite: str) -> list[dict[str, Any]]:
        return self.documents[suite]["results"] if suite in self.documents else []

    def case(self, suite: str, name: str) -> dict[str, Any]:
        """Return the result whose name begins with `name`."""
        for result in self.results(suite):
            if result.get("name", "").startswith(name):
                return result
        raise Missing(f"{suite}: {name}")

    def value(self, suite: str, name: str, who: str, key: str = "median_s") -> float:
        found = self.case(suite, name)["contestants"].get(who, {}).get(key)
        if found is None:
            raise Missing(f"{suite}: {name}: {who}")
        return float(found)

    def best(self, suite: str, name: str, who: str) -> tuple[str, float]:
        """Return the fastest of the contestants whose names begin with `who`, and its seconds."""
        of = self.case(suite, name)["contestants"]
        found = {n: float(c["median_s"]) for n, c in of.items() if n.startswith(who)}
        if not found:
            raise Missing(f"{suite}: {name}: {who}")
        return min(found.items(), key=lambda item: item[1])


def less(ratio: float) -> str:
    return f"{times(ratio)} less"


def ranged(contestant: Mapping[str, Any]) -> str:
    """Return a median with the range of its rounds."""
    median = contestant["median_s"]
    return ranged_values(median, contestant.get("rounds_s") or [median], duration)


def few_rounds(contestant: Mapping[str, Any]) -> str:
    """Return how many rounds there were, if they are fewer than a median needs."""
    return few(len(contestant.get("rounds_s", ())))


def machines(documents: list[dict[str, Any]]) -> str:
    """Return what results were measured on, each machine once."""
    seen = []
    for d in documents:
        m, v = d["machine"], d["versions"]
        device = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
        form = "; short form" if d.get("facts", {}).get("short") else ""
        seen.append(f"{device}, torch {v['torch']}, transformers {v['transformers']}{form}")
    return "; ".join(dict.fromkeys(seen))


def load(directory: Path = harness.RESULTS) -> Suites:
    files = sorted(directory.glob("*.json"))
    return Suites({f.stem: json.loads(f.read_text(encoding="utf-8")) for f in files})
