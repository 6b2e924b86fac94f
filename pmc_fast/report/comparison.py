"""A comparison of methods as a table and a page with a Pareto plot: means over seeds, with their ranges."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import MAX_DEGENERATE
from .plots import legend, new_figure, svg
from .render import template

Run = Mapping[str, Any]


def _recall(role: str) -> Callable[[Run], float]:
    return lambda scores: _mean([s["rouge_l_recall"] for s in scores["sets"].values() if s["role"] == role])


def _silent(scores: Run) -> float:
    return max(s["says_nothing"] for s in scores["sets"].values() if s["role"] == "forget")


COLUMNS: dict[str, tuple[Callable[[Run], float], str]] = {
    "unlearn quality": (lambda scores: scores["unlearn_quality"], ".1f"),
    "utility": (lambda scores: scores["utility"], ".1f"),
    "recall of forget": (_recall("forget"), ".3f"),
    "recall of keep": (_recall("keep"), ".3f"),
    "say nothing": (_silent, ".0%"),
}


def rows(made: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table: a row for the untouched model and one for each method, as texts."""
    table = []
    if made["before"]:
        cells = {name: format(value(made["before"]), form) for name, (value, form) in COLUMNS.items()}
        table.append({"method": "before", "told": "", "runs": "", "steps": "", "seconds": ""} | cells)
    for name, runs in by_method(made).items():
        sound = [run for run in runs if not run["diverged"]]
        lost = f" of {len(runs)}" if len(sound) < len(runs) else ""  # diverged
        cells = {column: _cell([value(r["after"]) for r in sound], form) for column, (value, form) in COLUMNS.items()}
        table.append(
            {
                "method": name,
                "told": "yes" if runs[0]["method"]["told"] else "no",
                "runs": f"{len(sound)}{lost}",
                "steps": _cell([r["steps"] for r in sound], ".0f"),
                "seconds": _cell([r["seconds"] for r in sound], ".1f"),
                **cells,
            }
        )
    return table


def by_method(made: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Return the runs of each method, in the order of the first ones."""
    found: dict[str, list[Run]] = {}
    for run in made["runs"]:
        found.setdefault(run["method"]["name"], []).append(run)
    return found


def html(made: Mapping[str, Any]) -> str:
    """Return a self-contained page."""
    sound = [run for run in made["runs"] if not run["diverged"]]
    plot = _pareto(made) if sound else ""
    parameters = {name: runs[0]["method"].get("parameters", {}) for name, runs in by_method(made).items()}
    rates = {name: runs[0]["learning_rate"] for name, runs in by_method(made).items()}
    return template(
        "compare.html.jinja",
        made=made,
        rows=rows(made),
        columns=list(COLUMNS),
        max_silent=MAX_DEGENERATE,
        plot=plot,
        parameters=parameters,
        rates=rates,
    )


def _pareto(made: Mapping[str, Any]) -> str:
    figure, axes = new_figure(4.2, grid="both")
    if made["before"]:
        point = made["before"]["utility"], made["before"]["unlearn_quality"]
        axes.scatter(*point, s=60, color="0.62", label="before", zorder=3)
    for i, (name, runs) in enumerate(by_method(made).items()):
        sound = [run["after"] for run in runs if not run["diverged"]]
        for marker, points in (
            ("o", [s for s in sound if _silent(s) <= MAX_DEGENERATE]),
            ("x", [s for s in sound if _silent(s) > MAX_DEGENERATE]),
        ):
            if points:
                x, y = [s["utility"] for s in points], [s["unlearn_quality"] for s in points]
                told = " (told)" if runs[0]["method"]["told"] else ""
                crossed = ", says nothing" if marker == "x" else ""
                axes.scatter(x, y, s=45, color=f"C{i}", marker=marker, label=f"{name}{told}{crossed}", zorder=3)
    axes.set(xlabel="utility (0 to 100)", ylabel="unlearn quality (0 to 100)", xlim=(0, 104), ylim=(0, 104))
    legend(figure)
    return svg(figure)


def _cell(values: Sequence[float], form: str) -> str:
    """Return a mean over runs, and its range where there is one."""
    if not values:
        return "-"
    mean, low, high = (format(x, form) for x in (_mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} - {high})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
