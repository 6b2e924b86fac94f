"""The plots of reports, each as a self-contained SVG text."""

import io
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal

import numpy as np

WIDTH = 4.8  # inches; keeps the text of plots legible on phones
COLORS = {"before": "0.62", "after": "C0"}
BINS = np.linspace(0, 1, 11)


def plots(made: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """Return the plots that a result has numbers for, by caption.

    Parameters
    ----------
    made : dict
        What report.json holds, or `evaluate_model` returns.
    rows : sequence of dict
        Every question's numbers, with ``model`` "before" or "after".
    """
    found: dict[str, str] = {}
    scores = {when: made[when] for when in COLORS if when in made}
    if scores:
        found["Recall of greedy answers"] = _sets(scores)
    if scores and all("unlearn_quality" in s and "utility" in s for s in scores.values()):
        found["Quality against utility (better: up, right)"] = _pareto(scores)
    for caption, key in (
        ("Forget questions by their greedy answer", None),
        ("Forget questions by their worst sample", "sampling"),
    ):
        values = {when: _recalls(rows, when, key) for when in scores}
        if any(values.values()):
            found[caption] = _histogram(values)
    leaks = {when: s["leakage"]["sets"]["forget"]["sampling"] for when, s in scores.items() if "leakage" in s}
    leaks = {when: summary for when, summary in leaks.items() if summary["questions"]}
    if leaks:
        found["Share of questions that leak in k samples"] = _leak_at_k(leaks)
    history = made.get("history")
    if history:
        if "mean_score" in history[0]:
            found["Best answers against the initial ones"] = _scores(history)
        found["Training losses"] = _losses(history)
    return found


def _recalls(rows: Sequence[dict[str, Any]], when: str, attack: str | None) -> list[float]:
    of = [row for row in rows if row["model"] == when and row["set"] == "forget"]
    if attack is None:
        return [row["rouge_l_recall"] for row in of]
    return [row["attacks"][attack]["worst"] for row in of if attack in row.get("attacks", {})]


def new_figure(height: float = 3.2, grid: Literal["both", "x", "y"] = "y") -> tuple[Any, Any]:
    """Return a figure and its axes."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Any) -> str:
    """Return a figure as text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))


def legend(figure: Any, handles: Sequence[Any] | None = None) -> None:
    """Add a legend above the axes."""
    how: dict[str, Any] = {} if handles is None else {"handles": handles}
    figure.legend(frameon=False, ncols=3, loc="outside upper center", **how)


def _label(name: str) -> str:
    """Return a set's name, which is a user's file's, as a label: no mathematics in it, and not long."""
    words = textwrap.shorten(name.replace("_", " "), 60, placeholder=" ...")
    return textwrap.fill(words, 20).replace("$", r"\$")


def _sets(scores: dict[str, dict[str, Any]]) -> str:
    sets = scores["after"]["sets"]
    figure, axes = new_figure(1.2 + 0.62 * len(sets), grid="x")
    height = 0.8 / len(scores)
    for i, (when, s) in enumerate(scores.items()):
        values = [s["sets"][name]["rouge_l_recall"] for name in sets]
        places = [n + (i - (len(scores) - 1) / 2) * height for n in range(len(sets))]
        bars = axes.barh(places, values, height * 0.92, color=COLORS[when], label=when)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_yticks(range(len(sets)), [f"{_label(name)}\n({s['role']})" for name, s in sets.items()])
    axes.set(xlabel="mean ROUGE-L recall", xlim=(0, 1.1))
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    if len(scores) > 1:
        legend(figure)
    return svg(figure)


def _pareto(scores: dict[str, dict[str, Any]]) -> str:
    figure, axes = new_figure(grid="both")
    points = {when: (s["utility"], s["unlearn_quality"]) for when, s in scores.items()}
    if len(points) == 2:
        arrow = {"arrowstyle": "->", "color": "0.45", "shrinkA": 7, "shrinkB": 7}
        axes.annotate("", points["after"], points["before"], arrowprops=arrow)
    for when, (x, y) in points.items():
        axes.scatter([x], [y], s=70, color=COLORS[when], label=f"{when}: {y:.1f}, {x:.1f}", zorder=3)
    axes.set(xlabel="utility (0 to 100)", ylabel="unlearn quality (0 to 100)", xlim=(0, 104), ylim=(0, 104))
    legend(figure)
    return svg(figure)


def _histogram(values: dict[str, list[float]]) -> str:
    figure, axes = new_figure()
    shown = {when: of for when, of in values.items() if of}
    width = 0.085 / len(shown)
    centres = (BINS[:-1] + BINS[1:]) / 2
    for i, (when, of) in enumerate(shown.items()):
        counts = np.histogram(np.clip(of, 0, 1), BINS)[0]
        places = centres + (i - (len(shown) - 1) / 2) * width
        axes.bar(places, counts, width, color=COLORS[when], label=f"{when} (mean {np.mean(of):.2f})")
    axes.set(xlabel="ROUGE-L recall of the truth", ylabel="questions", xlim=(0, 1))
    axes.set_xticks(BINS)
    _whole_numbers(axes.yaxis)
    legend(figure)
    return svg(figure)


def _leak_at_k(leaks: dict[str, dict[str, Any]]) -> str:
    figure, axes = new_figure(grid="both")
    for when, summary in leaks.items():
        ks = [int(k) for k in summary["leak_at_k"]]
        values = [of["value"] for of in summary["leak_at_k"].values()]
        low, high = zip(*(of["interval"] for of in summary["leak_at_k"].values()), strict=True)
        axes.plot(ks, values, marker="o", color=COLORS[when], label=when)
        axes.fill_between(ks, low, high, color=COLORS[when], alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = ks if len(ks) < 2 or ks[-1] / ks[-2] > 1.5 else [*ks[:-2], ks[-1]]  # or neighbouring labels would overlap
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set(xlabel="k samples of a question", ylabel="leak@k", ylim=(0, 1.04))
    if len(leaks) > 1:
        legend(figure)
    return svg(figure)


def _scores(history: list[dict[str, Any]]) -> str:
    figure, axes = new_figure()
    steps = [r["step"] for r in history]
    marker = "o" if len(steps) == 1 else None  # a line of one point is invisible
    (score,) = axes.plot(
        steps, [r["mean_score"] for r in history], color="C0", marker=marker, label="mean best score"
    )
    axes.set(xlabel="optimizer step", ylabel="mean best score", ylim=(0, 1))
    _whole_numbers(axes.xaxis)
    right = axes.twinx()
    right.spines[["top"]].set_visible(False)
    (pending,) = right.plot(
        steps, [r["pending"] for r in history], color="C1", linestyle="--", marker=marker, label="questions pending"
    )
    right.set(ylabel="questions pending", ylim=(0, 1.05 * max(1, *(r["pending"] for r in history))))
    _whole_numbers(right.yaxis)
    seconds = list(accumulate(r["rollout_seconds"] + r["train_seconds"] for r in history))
    # ticks evenly spaced in steps: labels would overlap where the first steps take most of the time
    places = np.linspace(steps[0], steps[-1], min(5, len(steps)))
    above = axes.secondary_xaxis("top")
    form = ".0f" if seconds[-1] >= 10 else ".1f"
    above.set_xticks(places, [format(t, form) for t in np.interp(places, steps, seconds)])
    above.set_xlabel("seconds of rollouts and training")
    legend(figure, [score, pending])
    return svg(figure)


def _losses(history: list[dict[str, Any]]) -> str:
    figure, axes = new_figure()
    steps = [r["step"] for r in history]
    for key, label in (
        ("collapse_loss", "collapse"),
        ("retain_loss", "retain"),
        ("forget_loss", "forget (tracked)"),
    ):
        if key in history[0]:
            axes.plot(steps, [r[key] for r in history], marker="o" if len(steps) == 1 else None, label=label)
    if "retain_loss" in history[0]:
        axes.set(ylabel="loss (nats/token)", ylim=(0, None))
    else:  # of another method, whose objective is its own
        axes.plot(steps, [r["loss"] for r in history], marker="o" if len(steps) == 1 else None, label="loss")
    axes.set(xlabel="optimizer step")
    _whole_numbers(axes.xaxis)
    legend(figure)
    return svg(figure)
