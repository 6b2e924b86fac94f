"""A benchmark's numbers as rows of a table, and how times and sizes are written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .measure import ROUNDS

OURS = "pmc_fast"  # the contestant that others are compared with


@dataclass(frozen=True, slots=True)
class Line:
    """One measured quantity: who has which value; `title` begins a contest."""

    name: str
    values: Mapping[str, str]  # by contestant; of a title the baseline's name, and who was left out
    ratio: str = ""  # how many times better than the baseline
    title: bool = False


def times(ratio: float) -> str:
    return f"{ratio:.2f} x" if ratio < 2 else f"{ratio:.1f} x"


def duration(value: float) -> str:
    """Return a time with about three digits."""
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def size(value: float) -> str:
    """Return a number of bytes."""
    return f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def ranged(median: float, values: Sequence[float], show: Callable[[float], str]) -> str:
    """Return a median with the range of its rounds."""
    middle, low, high = map(show, (median, min(values), max(values)))
    return middle if low == high else f"{middle} ({low} - {high})"


def few_rounds(count: int) -> str:
    """Return how many rounds there were, if they are fewer than a median needs."""
    return f"{count} rounds" if 0 < count < ROUNDS else ""


QUANTITIES: tuple[tuple[str, str, str, Callable[[float], str], bool], ...] = (
    # name, of which entry the median, of which the rounds, how it is written, whether more is better
    ("tokens/s", "tokens_per_s", "rounds_tokens_per_s", lambda n: f"{n:,.0f}", True),
    ("seconds", "median_s", "rounds_s", duration, False),
    ("tokens sampled", "tokens", "", lambda n: f"{n:,.0f}", False),
    ("rows a token", "rows_per_token", "", lambda n: f"{n:.2f}", False),
    ("steps", "steps", "", lambda n: f"{n:,.0f}", False),
    ("tokens computed", "computed_tokens", "", lambda n: f"{n:,.0f}", False),
    ("peak memory", "peak_bytes", "", size, False),
)
NOT_COMPARED = ("tokens sampled",)  # draws differ


def lines(result: Mapping[str, Any]) -> list[Line]:
    """Return the lines of one contest of a result file."""
    found, left_out = result["contestants"], result["facts"].get("left_out", {})
    names = [OURS, *(n for n in [*found, *left_out] if n != OURS)]
    baseline = next((n for n in names if n != OURS), "")
    heads = {n: f"{n}: left out, {left_out[n]}" if n in left_out else n for n in names if n in left_out or n != OURS}
    made = [Line(result["name"], heads, title=True)]
    for name, key, of_rounds, show, more in QUANTITIES:
        numbers = {n: c[key] for n, c in found.items() if c.get(key) is not None}
        if not numbers:
            continue
        values = {n: ranged(v, found[n][of_rounds] if of_rounds else [v], show) for n, v in numbers.items()}
        ratio = ""
        if name not in NOT_COMPARED and all(numbers.get(n) for n in (OURS, baseline)):
            ours, theirs = numbers[OURS], numbers[baseline]
            ratio = times(ours / theirs if more else theirs / ours)
        made.append(Line(name, values, ratio))
    return made


def beside(documents: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return lines of results beside each other: names of contest, quantity and contestant, and a cell of each result.

    Contests are found by what is measured: the number of a head's rows, which depends on the draws, is left out.
    """
    by_line: dict[str, list[str]] = {}
    for i, document in enumerate(documents):
        for result in document["results"]:
            contest = result["name"].split(",")[0]
            for line in lines(result):
                for who, value in line.values.items():
                    if line.title and value == who:
                        continue
                    name = f"{contest}: {who}" if line.title else f"{contest}, {line.name}: {who}"
                    by_line.setdefault(name, ["-"] * len(documents))[i] = value
    return list(by_line.items())
