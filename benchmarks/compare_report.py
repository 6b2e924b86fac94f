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
    """Return the setting of a method's best grid run that did not diverge; None where there is none."""
    runs = sound(grid_runs(results, method, budget))
    return max(runs, key=harmonic)["setting"] if runs else None


def final_runs(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    """Return the chosen setting's runs, seed by seed."""
    setting = chosen(results, method, budget)
    runs = [r for r in results if (r["method"], r["setting"], r["budget_s"]) == (method, setting, budget)]
    return sorted(runs, key=lambda r: r["seed"])


def sound(runs: Sequence[Result]) -> list[Result]:
    return [r for r in runs if not r["diverged"]]


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
    "worst of 20": (lambda p: p["leakage"]["worst"]["value"], ".3f"),
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
        f"| after {budget:.0f} s | setting | seeds | steps | {' | '.join(COLUMNS)} |",
        "|---|---|---|---:|" + "---:|" * len(COLUMNS),
    ]

    def line(label: str, how: str, seeds: str, runs: Sequence[Result]) -> None:
        steps = sum(r["steps"] for r in runs) / len(runs)
        ends = [r["curve"][-1] for r in runs]
        lines.append(f"| {label} | {how} | {seeds} | {steps:.0f} | {' | '.join(cell(n, ends) for n in COLUMNS)} |")

    if untouched := [r for r in results if r["budget_s"] == 0]:
        line("before", "", "", untouched)
    for method, label in LABELS.items():
        runs = final_runs(results, method, budget)
        if kept := sound(runs):
            lost = f", {len(runs) - len(kept)} diverged" if len(kept) < len(runs) else ""
            line(label, words(kept[0]["setting"]), ", ".join(str(r["seed"]) for r in kept) + lost, kept)
    return "\n".join(lines)


def grid_table(results: Sequence[Result]) -> str:
    """Return every setting's end, the chosen ones in bold."""
    budget = full_budget(results)
    names = ("unlearn quality", "utility", "R(retain)", "words an answer", "under 3 words", "repeated words")
    lines = [
        f"| after {budget * GRID_SHARE:.0f} s | setting | steps | {' | '.join(names)} |",
        "|---|---|---:|" + "---:|" * len(names),
    ]
    for method, label in LABELS.items():
        best = chosen(results, method, budget)
        for r in grid_runs(results, method, budget):
            how = words(r["setting"])
            cells = ["diverged"] * len(names) if r["diverged"] else [cell(n, [r["curve"][-1]]) for n in names]
            marked = f"**{how}**" if r["setting"] == best else how
            lines.append(f"| {label} | {marked} | {r['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def retain_weight_table(results: Sequence[Result]) -> str:
    """Return PMC's utility against its retain weight: the lowest on the way, and the end."""
    runs = sound(retain_weight_runs(results, full_budget(results)))
    start = next((f"{r['curve'][-1]['utility']:.1f}" for r in results if r["budget_s"] == 0), "-")
    lines = [
        "| retain weight | utility before | lowest on the way | at | at the end | R(retain) | unlearn quality |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in runs:
        low, end = min(r["curve"], key=lambda p: p["utility"]), r["curve"][-1]
        lines.append(
            f"| {r['setting']['retain_weight']:g} | {start} | {low['utility']:.1f} | {low['seconds']:.0f} s "
            f"| {end['utility']:.1f} | {cell('R(retain)', [end])} | {cell('unlearn quality', [end])} |"
        )
    return "\n".join(lines)


def words(setting: dict[str, float]) -> str:
    short = {"learning_rate": "lr", "retain_weight": "lambda", "beta": "beta"}
    return ", ".join(f"{short[name]} {value:g}" for name, value in setting.items())


# --- plot

COLORS = {"pmc": "C0", "grad_diff": "C1", "npo": "C2", "retain_only": "C7"}
SHADES = ("C9", "C0", "navy", "C4", "C5")  # of retain weights


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw quality and utility against time, utility against leakage, and the retain weight's effect."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    budget = full_budget(results)
    start = [r["curve"][-1] | {"seconds": 0.0} for r in results if r["budget_s"] == 0]
    figure = Figure(figsize=(9, 7), layout="constrained")
    (quality, useful), (leaks, weights) = figure.subplots(2, 2)

    def curve(axes: Any, run: Result, key: str, **how: Any) -> None:
        points = start + run["curve"]
        axes.plot([p["seconds"] for p in points], [p[key] for p in points], marker="o", markersize=3, **how)

    for p in start:
        leaks.scatter(p["leakage"]["worst"]["value"], p["utility"], color="black", marker="x", zorder=3)
        for axes, key in ((quality, "unlearn_quality"), (useful, "utility"), (weights, "utility")):
            axes.axhline(p[key], color="black", linewidth=1, linestyle=":", label="before")
    for method, color in COLORS.items():
        for i, run in enumerate(sound(final_runs(results, method, budget))):
            how = {"color": color, "alpha": 0.4 if i else 1.0, "label": None if i else LABELS[method]}
            curve(quality, run, "unlearn_quality", **how)
            curve(useful, run, "utility", **how)
            end = run["curve"][-1]
            leaks.scatter(end["leakage"]["worst"]["value"], end["utility"], s=36, **how)
    for shade, run in zip(SHADES, sound(retain_weight_runs(results, budget)), strict=False):
        curve(weights, run, "utility", color=shade, label=f"lambda {run['setting']['retain_weight']:g}")
    titles = (
        "unlearn quality (0-100)",
        "utility (0-100)",
        "utility against leakage",
        "PMC's utility by retain weight",
    )
    for axes, title in zip((quality, useful, leaks, weights), titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("wall time (s)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    leaks.set(xlabel="mean over questions of the worst of 20 samples", ylabel="utility (0-100)")
    weights.legend(frameon=False, fontsize=8)
    handles, labels = quality.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=5, loc="outside upper center", fontsize=9)
    with rc_context({"svg.hashsalt": "pmc_fast"}):  # the same picture, the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
