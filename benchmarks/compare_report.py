"""Tables and plot of `benchmarks.compare_methods`, from its JSON alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GRID_SHARE = 0.5  # of the budget
LABELS = {"pmc": "PMC", "grad_diff": "GradDiff", "npo": "NPO", "retain_only": "retain pairs only"}
Result = dict[str, Any]


def harmonic(result: Result) -> float:
    """Return the harmonic mean of a run's last unlearn quality and utility."""
    q, u = (max(0.0, result["curve"][-1][key]) for key in ("unlearn_quality", "utility"))
    return 2 * q * u / (q + u) if q + u else 0.0


def grid_runs(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    return [r for r in results if r["method"] == method and r["budget_s"] == budget * GRID_SHARE]


def chosen(results: Sequence[Result], method: str, budget: float) -> dict[str, float] | None:
    """Return the setting of a method's best grid run; None where the grid has not been run."""
    return max(grid_runs(results, method, budget), key=harmonic, default={"setting": None})["setting"]


def final_runs(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    """Return the chosen setting's runs, seed by seed."""
    setting = chosen(results, method, budget)
    runs = [r for r in results if (r["method"], r["setting"], r["budget_s"]) == (method, setting, budget)]
    return sorted(runs, key=lambda r: r["seed"])


def retain_weight_runs(results: Sequence[Result], budget: float) -> list[Result]:
    """Return PMC's runs of seed 0 that differ in nothing but the retain weight, by that weight."""
    rate = (chosen(results, "pmc", budget) or {}).get("learning_rate")
    runs = [
        r for r in results
        if (r["method"], r["seed"], r["budget_s"], r["setting"].get("learning_rate")) == ("pmc", 0, budget, rate)
    ]  # fmt: skip
    return sorted(runs, key=lambda r: r["setting"]["retain_weight"])


def full_budget(results: Sequence[Result]) -> float:
    return max((r["budget_s"] for r in results), default=0.0)


# --- tables

COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "unlearn quality": (lambda p: p["unlearn_quality"], ".1f"),
    "utility": (lambda p: p["utility"], ".1f"),
    "R(retain)": (lambda p: p["sets"]["retain"]["rouge_l_recall"], ".3f"),
    "worst of 100": (lambda p: p["leakage"]["worst"]["value"], ".3f"),
    "questions that leak": (lambda p: 100 * p["leakage"]["leaking_questions"], ".0f"),
    "words an answer": (lambda p: p["sets"]["forget"]["mean_words"], ".1f"),
    "under 3 words": (lambda p: 100 * p["sets"]["forget"]["degenerate"], ".0f"),
    "repeated words": (lambda p: 100 * p["sets"]["forget"]["repeated"], ".0f"),
}
PERCENT = ("questions that leak", "under 3 words", "repeated words")


def cell(name: str, points: Sequence[Result]) -> str:
    """Return a column's mean over runs, and its range."""
    value, form = COLUMNS[name]
    numbers = [value(p) for p in points]
    unit = " %" if name in PERCENT else ""
    text = f"{sum(numbers) / len(numbers):{form}}{unit}"
    low, high = (f"{n:{form}}" for n in (min(numbers), max(numbers)))
    return text if low == high else f"{text} ({low} - {high})"


def table(results: Sequence[Result]) -> str:
    """Return the chosen settings' ends: means over the seeds, with the range in brackets."""
    budget = full_budget(results)
    lines = [
        f"| {budget:.0f} s of | setting | steps | {' | '.join(COLUMNS)} |",
        "|---|---|---:|" + "---:|" * len(COLUMNS),
    ]

    def line(label: str, how: str, runs: Sequence[Result]) -> None:
        steps = sum(r["steps"] for r in runs) / len(runs)
        ends = [r["curve"][-1] for r in runs]
        lines.append(f"| {label} | {how} | {steps:.0f} | {' | '.join(cell(name, ends) for name in COLUMNS)} |")

    if untouched := [r for r in results if r["budget_s"] == 0]:
        line("before", "", untouched)
    for method, label in LABELS.items():
        if runs := final_runs(results, method, budget):
            line(label, words(runs[0]["setting"]), runs)
    return "\n".join(lines)


def grid_table(results: Sequence[Result]) -> str:
    """Return every setting's end, the chosen ones in bold."""
    budget = full_budget(results)
    names = ("unlearn quality", "utility", "R(retain)", "words an answer", "under 3 words", "repeated words")
    lines = [
        f"| {budget * GRID_SHARE:.0f} s of | setting | steps | {' | '.join(names)} |",
        "|---|---|---:|" + "---:|" * len(names),
    ]
    for method, label in LABELS.items():
        best = chosen(results, method, budget)
        for r in grid_runs(results, method, budget):
            how = words(r["setting"])
            cells = " | ".join(cell(name, [r["curve"][-1]]) for name in names)
            lines.append(f"| {label} | {f'**{how}**' if r['setting'] == best else how} | {r['steps']} | {cells} |")
    return "\n".join(lines)


def retain_weight_table(results: Sequence[Result]) -> str:
    """Return PMC's utility against its retain weight: the lowest on the way, and the end."""
    runs = retain_weight_runs(results, full_budget(results))
    start = next((r["curve"][-1]["utility"] for r in results if r["budget_s"] == 0), None)
    lines = [
        "| retain weight | utility before | lowest on the way | at | at the end | R(retain) | unlearn quality |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in runs:
        low, end = min(r["curve"], key=lambda p: p["utility"]), r["curve"][-1]
        before = "-" if start is None else f"{start:.1f}"
        lines.append(
            f"| {r['setting']['retain_weight']:g} | {before} | {low['utility']:.1f} | {low['seconds']:.0f} s "
            f"| {end['utility']:.1f} | {cell('R(retain)', [end])} | {end['unlearn_quality']:.1f} |"
        )
    return "\n".join(lines)


def words(setting: dict[str, float]) -> str:
    short = {"learning_rate": "lr", "retain_weight": "lambda", "beta": "beta"}
    return ", ".join(f"{short[name]} {value:g}" for name, value in setting.items())


# --- plot

COLORS = {"pmc": "C0", "grad_diff": "C1", "npo": "C2", "retain_only": "C7"}


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw quality and utility against time, utility against leakage, and the retain weight's effect."""
    from matplotlib.figure import Figure

    budget = full_budget(results)
    start = [r["curve"][-1] | {"seconds": 0.0} for r in results if r["budget_s"] == 0]
    figure = Figure(figsize=(9, 7), layout="constrained")
    (quality, useful), (pareto, weights) = figure.subplots(2, 2)

    def curve(axes: Any, run: Result, key: str, **how: Any) -> None:
        points = start + run["curve"]
        axes.plot([p["seconds"] for p in points], [p[key] for p in points], marker="o", markersize=2.5, **how)

    for method, color in COLORS.items():
        for i, run in enumerate(final_runs(results, method, budget)):
            how = {"color": color, "alpha": 0.4 if i else 1.0, "label": None if i else LABELS[method]}
            curve(quality, run, "unlearn_quality", **how)
            curve(useful, run, "utility", **how)
            end = run["curve"][-1]
            pareto.scatter(
                end["leakage"]["worst"]["value"], end["utility"], s=60 * end["unlearn_quality"] / 100, **how
            )
    for p in start:
        pareto.scatter(p["leakage"]["worst"]["value"], p["utility"], color="black", marker="x", label="before")
        for axes, key in ((quality, "unlearn_quality"), (useful, "utility"), (weights, "utility")):
            axes.axhline(p[key], color="black", linewidth=0.8, linestyle=":", label="before")
    for i, run in enumerate(retain_weight_runs(results, budget)):
        curve(weights, run, "utility", color=f"C{i + 3}", label=f"PMC, lambda {run['setting']['retain_weight']:g}")
    quality.set(xlabel="wall time (s)", ylabel="unlearn quality (0-100)")
    useful.set(xlabel="wall time (s)", ylabel="utility (0-100)")
    pareto.set(xlabel="leakage: mean over questions of the worst of 100 samples", ylabel="utility (0-100)")
    weights.set(xlabel="wall time (s)", ylabel="utility (0-100)")
    for axes in (quality, useful, pareto, weights):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
