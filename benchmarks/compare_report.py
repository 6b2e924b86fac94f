"""Tables and plots of `benchmarks.compare_methods`, from its JSON alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pmc_fast.evaluation import bootstrap_interval

TUNING = 240.0  # seconds of one core: every method is tuned with runs so long, some with longer ones as well
MAX_DEGENERATE = 0.05  # share of the forget questions' answers that may say nothing
LABELS = {
    "pmc_fast": "PMC with extensions",
    "pmc": "PMC as published",
    "npo": "NPO (told)",
    "simnpo": "SimNPO (told)",
    "grad_diff": "GradDiff (told)",
    "idk": "IDK",
    "retain_only": "retain pairs only",
    "flat": "FLAT (told)",
    "mollm": "MOLLM (told)",
    "icu": "ICU (told)",
    "eul": "EUL (told)",
}
METHOD_ALONE = ("alpha", "beta", "gamma")  # parameters of a method that are no settings of a run
TUNED = {"learning_rate", "retain_weight", *METHOD_ALONE}
EXTENDED = "pmc_fast"  # what others may have tuned is one of its extensions, which are left out one by one
Result = dict[str, Any]


def harmonic(result: Result) -> float:
    """Return the harmonic mean of a run's last unlearn quality and utility."""
    q, u = (max(0.0, result["curve"][-1][key]) for key in ("unlearn_quality", "utility"))
    return 2 * q * u / (q + u) if q + u else 0.0


def sound(runs: Sequence[Result]) -> list[Result]:
    return [r for r in runs if not r["diverged"]]


def says_nothing(result: Result) -> float:
    return result["curve"][-1]["sets"]["forget"]["says_nothing"]


def trials(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    return [r for r in results if (r["task"], r["method"], r["budget_s"], r["seed"]) == ("demo", method, budget, 0)]


def tuning_runs(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    """Return the runs of a method's grid at a budget: those that set nothing else."""
    tuned = TUNED if method == EXTENDED else TUNED | {"retain_loss"}
    return [r for r in trials(results, method, budget) if set(r["setting"]) <= tuned]


def chosen(results: Sequence[Result], method: str, budget: float) -> dict[str, Any] | None:
    """Return the setting of a method's best tuning run at a budget, or at TUNING; None where there is neither.

    Runs that diverged are out. Those whose answers say nothing come last: as few as possible, where all do.
    """
    for at in (budget, TUNING):
        if runs := sound(tuning_runs(results, method, at)):
            return max(runs, key=lambda r: (-max(MAX_DEGENERATE, says_nothing(r)), harmonic(r)))["setting"]
    return None


def final_runs(results: Sequence[Result], method: str, budget: float) -> list[Result]:
    """Return the chosen setting's runs on the held-out questions, seed by seed; all where none was tuned in these results."""
    best = chosen(results, method, budget)
    own = ("heldout", method, budget)
    runs = [r for r in results if (r["task"], r["method"], r["budget_s"]) == own and best in (None, r["setting"])]
    if any(r["setting"] != runs[0]["setting"] for r in runs):
        raise SystemExit(f"{method}, {budget:.0f} s: runs with several settings, and none was chosen in this file")
    return sorted(runs, key=lambda r: r["seed"])


def budgets(results: Sequence[Result], task: str = "heldout") -> list[float]:
    return sorted({r["budget_s"] for r in results if r["task"] == task and r["budget_s"]})


def before(results: Sequence[Result], task: str) -> list[Result]:
    return [r for r in results if r["task"] == task and not r["budget_s"]]


# --- tables


def of_recalls(points: Sequence[Result]) -> np.ndarray:
    """Return each forget question's unlearn quality, the mean over runs: [Q]."""
    recalls = [[p["sets"][name]["recalls"] for name in ("forget", "forget_paraphrased")] for p in points]
    return 100 * (1 - np.mean(recalls, axis=(0, 1)))


def of_attack(name: str) -> Callable[[Sequence[Result]], np.ndarray]:
    """Return each forget question's worst sample, the mean over runs: [Q]."""
    return lambda points: np.mean([[q["worst"] for q in p["attacks"][name]["per_question"]] for p in points], axis=0)


COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "unlearn quality": (lambda p: p["unlearn_quality"], ".1f"),
    "utility": (lambda p: p["utility"], ".1f"),
    "R(retain)": (lambda p: p["sets"]["retain"]["rouge_l_recall"], ".3f"),
    "worst of 20": (lambda p: p["attacks"]["sampling"]["worst"]["value"], ".3f"),
    "leak": (lambda p: 100 * p["attacks"]["sampling"]["leaking_questions"], ".0f"),
    "leak, prefilled": (lambda p: 100 * p["attacks"]["prefill"]["leaking_questions"], ".0f"),
    "say nothing": (lambda p: 100 * p["sets"]["forget"]["says_nothing"], ".0f"),
    "repeated words": (lambda p: 100 * p["sets"]["forget"]["repeated"], ".0f"),
    "words": (lambda p: p["sets"]["forget"]["mean_words"], ".1f"),
    "perplexity": (lambda p: p["perplexity"], ".1f"),
}
PERCENT = ("leak", "leak, prefilled", "say nothing", "repeated words")
INTERVALS: dict[str, Callable[[Sequence[Result]], np.ndarray]] = {
    "unlearn quality": of_recalls,
    "worst of 20": of_attack("sampling"),
}
IN_TUNING = ("unlearn quality", "utility", "R(retain)", "say nothing", "repeated words", "perplexity")


def cell(name: str, points: Sequence[Result]) -> str:
    """Return a column's mean over runs, and its range."""
    value, form = COLUMNS[name]
    numbers = [value(p) for p in points]
    unit = " %" if name in PERCENT else ""
    text = f"{sum(numbers) / len(numbers):{form}}{unit}"
    low, high = (f"{n:{form}}" for n in (min(numbers), max(numbers)))
    return text if low == high else f"{text} ({low} - {high})"


def interval(name: str, points: Sequence[Result]) -> str:
    """Return a column's mean over runs, and its 95 % bootstrap interval over the questions."""
    low, high = bootstrap_interval(INTERVALS[name](points))
    form = COLUMNS[name][1]
    return f"{low:{form}} - {high:{form}}"


def final_table(results: Sequence[Result]) -> str:
    """Return the chosen settings' ends on the held-out questions: means over the seeds, with the range in brackets."""
    made = budgets(results)
    lines = []
    for budget in made:
        lines += [
            f"| {budget:.0f} s of one core | seeds | steps | {' | '.join(COLUMNS)} |",
            "|---|---|---:|" + "---:|" * len(COLUMNS),
        ]
        for label, runs in (
            ("before", before(results, "heldout")),
            *((label, final_runs(results, method, budget)) for method, label in LABELS.items()),
        ):
            if kept := sound(runs):
                lost = f", {len(runs) - len(kept)} diverged" if len(kept) < len(runs) else ""
                seeds = ", ".join(str(r["seed"]) for r in kept) + lost if kept[0]["budget_s"] else ""
                steps = sum(r["steps"] for r in kept) / len(kept)
                ends = [r["curve"][-1] for r in kept]
                lines.append(f"| {label} | {seeds} | {steps:.0f} | {' | '.join(cell(n, ends) for n in COLUMNS)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def interval_table(results: Sequence[Result]) -> str:
    """Return 95 % bootstrap intervals over the questions."""
    lines = [
        f"| 95 % intervals over the questions | {' | '.join(f'{n}, {b:.0f} s' for b in budgets(results) for n in INTERVALS)} |",
        "|---|" + "---:|" * (len(budgets(results)) * len(INTERVALS)),
    ]
    for method, label in LABELS.items():
        cells = []
        for budget in budgets(results):
            ends = [r["curve"][-1] for r in sound(final_runs(results, method, budget))]
            cells += [interval(n, ends) if ends else "" for n in INTERVALS]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tuning_table(results: Sequence[Result]) -> str:
    """Return every setting's end, the chosen ones in bold."""
    lines = [
        f"| seconds of one core | method | setting | steps | {' | '.join(IN_TUNING)} |",
        "|---:|---|---|---:|" + "---:|" * len(IN_TUNING),
    ]
    lines += [
        f"| 0 | before | | | {' | '.join(cell(n, [r['curve'][-1]]) for n in IN_TUNING)} |"
        for r in before(results, "demo")
    ]
    for budget in budgets(results, "demo"):
        for method, label in LABELS.items():
            best = chosen(results, method, budget)
            for r in tuning_runs(results, method, budget):
                how = words(r["setting"])
                lines.append(
                    f"| {budget:.0f} | {label} | {f'**{how}**' if r['setting'] == best else how} | {ends_of(r)} |"
                )
    return "\n".join(lines)


def ablation_table(results: Sequence[Result]) -> str:
    """Return PMC with its extensions as chosen, and without one each."""
    best = chosen(results, "pmc_fast", TUNING) or {}
    lines = [f"| | steps | {' | '.join(IN_TUNING)} |", "|---|---:|" + "---:|" * len(IN_TUNING)]
    for r in trials(results, "pmc_fast", TUNING):
        change = {name: value for name, value in r["setting"].items() if best.get(name) != value}
        if not change or set(change) - set(best):
            label = words(change) if change else "all, as chosen"
            lines.append(f"| {label} | {ends_of(r)} |")
    return "\n".join(lines)


def ends_of(result: Result) -> str:
    end = [] if result["diverged"] else [result["curve"][-1]]
    return " | ".join([str(result["steps"]), *(cell(n, end) if end else "diverged" for n in IN_TUNING)])


def words(setting: dict[str, Any]) -> str:
    short = {"learning_rate": "lr", "retain_weight": "lambda", "num_samples": "N", "temperature": "T"}
    named = ((short.get(name, name), value) for name, value in setting.items())
    return ", ".join(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}" for name, value in named)


TABLES = {"final": final_table, "intervals": interval_table, "tuning": tuning_table, "ablation": ablation_table}


# --- plot

COLORS = {
    "pmc_fast": "C0", "pmc": "C9", "npo": "C2", "simnpo": "C8", "grad_diff": "C1", "idk": "C4", "retain_only": "C7",
    "flat": "C3", "mollm": "C5", "icu": "C6", "eul": "black",
}  # fmt: skip
BEFORE: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": ":"}


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw means of quality and utility against the budget; and for each budget utility and leakage against quality."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made = budgets(results)
    figure = Figure(figsize=(9, 3.5 * (1 + len(made))), layout="constrained")
    curves, *panels = figure.subplots(1 + len(made), 2, squeeze=False)
    draw_curves(results, curves)
    for (useful, leaks), budget in zip(panels, made, strict=True):
        for p in (r["curve"][-1] for r in before(results, "heldout")):
            useful.axhline(p["utility"], **BEFORE)
        for method in LABELS:
            for run in sound(final_runs(results, method, budget)):
                end, color = run["curve"][-1], COLORS[method]
                marker = "x" if says_nothing(run) > MAX_DEGENERATE else "o"
                useful.scatter(end["unlearn_quality"], end["utility"], marker=marker, color=color)
                leaks.scatter(end["unlearn_quality"], COLUMNS["worst of 20"][0](end), marker=marker, color=color)
        useful.set(title=f"{budget:.0f} s of one core", xlabel="unlearn quality (0-100)", ylabel="utility (0-100)")
        leaks.set(title=f"{budget:.0f} s of one core", xlabel="unlearn quality (0-100)")
        leaks.set_ylabel("worst of 20 samples: mean recall")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = curves[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside upper center", fontsize=9)
    with rc_context({"svg.hashsalt": "pmc_fast"}):  # the same picture, the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_curves(results: Sequence[Result], curves: Sequence[Any]) -> None:
    """Draw each method's mean over seeds of quality and of utility against the budget, with the range."""
    made = budgets(results)
    for axes, name in zip(curves, ("unlearn quality", "utility"), strict=True):
        value = COLUMNS[name][0]
        for r in before(results, "heldout"):
            axes.axhline(value(r["curve"][-1]), label="before", **BEFORE)
        for method, label in LABELS.items():
            ends = {
                budget: [value(r["curve"][-1]) for r in runs]
                for budget in made
                if (runs := sound(final_runs(results, method, budget)))
            }
            if ends:
                # equal values may have a mean that rounding puts beside them
                means = [sum(of) / len(of) for of in ends.values()]
                below = [max(0.0, mean - min(of)) for mean, of in zip(means, ends.values(), strict=True)]
                above = [max(0.0, max(of) - mean) for mean, of in zip(means, ends.values(), strict=True)]
                axes.errorbar(
                    list(ends), means, [below, above], marker="o", capsize=2, color=COLORS[method], label=label
                )
        axes.set(xlabel="seconds of one core", ylabel=f"{name} (0-100)", xscale="log")
        axes.set_xticks(made, labels=[f"{b:.0f}" for b in made])
        axes.minorticks_off()
