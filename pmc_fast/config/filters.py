"""Which filter leaves forget questions out of training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .parts import require

KNOWN_FORGOTTEN, UPCORE = "known_forgotten", "upcore"
CHOICES = f"{KNOWN_FORGOTTEN}, or {UPCORE}:SHARE with a share of the forget questions above 0 and below 1"


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter by its name, with its share where it has one; by default none."""

    name: str = ""
    share: float = 0.0  # of the forget questions, of upcore

    @property
    def samples(self) -> bool:
        """Whether it samples the untouched model's answers, as PMC does."""
        return self.name == KNOWN_FORGOTTEN


def parse_filter(text: str) -> Filter:
    """Return the filter that a setting names, an empty one none."""
    name, _, value = text.partition(":")
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    good = text in ("", KNOWN_FORGOTTEN) or (name == UPCORE and 0 < share < 1)
    require(good, "filter", text, CHOICES)
    return Filter(name, share if name == UPCORE else 0.0)


def filter_of(settings: Mapping[str, Any]) -> Filter:
    """Return the filter of settings by their names, some of which may be unset; `skip_known_forgotten` is one, too."""
    if settings.get("skip_known_forgotten"):
        return Filter(KNOWN_FORGOTTEN)
    return parse_filter(str(settings.get("filter") or ""))
