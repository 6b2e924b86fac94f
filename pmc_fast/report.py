"""What a run leaves beside the model: report.json, report.html and the model card."""

import io
import json
from pathlib import Path
from typing import Any

from .errors import PMCError

TEMPLATES = Path(__file__).parent
SUMMARY = (
    ("unlearn_quality", "unlearn quality (0-100)", ".1f"),
    ("utility", "utility (0-100)", ".1f"),
    ("forget_quality", "TOFU forget quality (p-value)", ".2g"),
    ("model_utility", "TOFU model utility (0-1)", ".3f"),
)
OF_A_SET = (
    ("rouge_l_recall", "ROUGE-L recall", ".3f"),
    ("mean_words", "words an answer", ".1f"),
    ("degenerate", "answers under 3 words", ".0%"),
    ("probability", "probability", ".3f"),
    ("truth_ratio", "truth ratio", ".3f"),
)


def render(made: dict[str, Any]) -> dict[str, str]:
    """Return all three as {file name: text}, so that nothing about them can fail once weights are written."""
    check_importable()
    return {"report.json": json.dumps(made, indent=1), "report.html": html(made), "README.md": model_card(made)}


def check_importable() -> None:
    """Refuse early where the packages that reports are made with are missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PMCError(f"reports need {error.name}: pip install 'pmc_fast[cli]'") from error


def html(made: dict[str, Any]) -> str:
    """Return a page that needs no other file: tables and plots of a run."""
    plots = {}
    if made["history"]:
        plots = {"scores": _scores_plot(made["history"]), "losses": _losses_plot(made["history"])}
    if "after" in made:
        plots["metrics"] = _metrics_plot(made)
    return _render("report.html.jinja", made=made, plots=plots, rows=metric_rows(made))


def model_card(made: dict[str, Any]) -> str:
    """Return the model's README.md with the hub's metadata."""
    model = made["settings"]["model"]
    base = None if Path(model).exists() else model  # the hub refuses a card that names a local path
    return _render("card.md.jinja", made=made, base=base, name=Path(model).name, rows=metric_rows(made))


def metric_rows(made: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (metric, before, after) as texts, the two summary numbers first."""
    before, after = made.get("before", {}), made.get("after", {})
    rows = [
        (label, _number(before.get(key), form), _number(after.get(key), form))
        for key, label, form in SUMMARY
        if key in after
    ]
    for name, scores in after.get("sets", {}).items():
        old = before.get("sets", {}).get(name, {})
        for key, label, form in OF_A_SET:
            if key in scores:
                rows.append((f"{name}: {label}", _number(old.get(key), form), _number(scores[key], form)))
    return rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def _figure(width: float = 5.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _scores_plot(history: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    steps = [r["step"] for r in history]
    (score,) = axes.plot(steps, [r["mean_score"] for r in history], color="C0", label="mean best score")
    axes.set(xlabel="optimizer step", ylabel="mean best score", ylim=(0, 1))
    right = axes.twinx()
    right.spines[["top"]].set_visible(False)
    (pending,) = right.plot(
        steps, [r["pending"] for r in history], color="C1", linestyle="--", label="questions pending"
    )
    right.set(ylabel="questions pending", ylim=(0, None))
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(handles=[score, pending], frameon=False, ncols=2, loc="outside upper center")
    return _svg(figure)


def _losses_plot(history: list[dict[str, Any]]) -> str:
    figure, axes = _figure()
    steps = [r["step"] for r in history]
    for key, label in (
        ("collapse_loss", "collapse"),
        ("retain_loss", "retain"),
        ("forget_loss", "forget (tracked)"),
    ):
        if key in history[0]:
            axes.plot(steps, [r[key] for r in history], label=label)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)", ylim=(0, None))
    axes.legend(frameon=False)
    return _svg(figure)


def _metrics_plot(made: dict[str, Any]) -> str:
    sets = made["after"]["sets"]
    figure, axes = _figure(8.0)
    width = 0.38
    for shift, when, color in ((-width / 2, "before", "0.7"), (width / 2, "after", "C0")):
        if when in made:
            values = [made[when]["sets"][name]["rouge_l_recall"] for name in sets]
            bars = axes.bar([i + shift for i in range(len(sets))], values, width, color=color, label=when)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
    labels = [f"{name.replace('_', ' ')}\n({scores['role']})" for name, scores in sets.items()]
    axes.set_xticks(range(len(sets)), labels)
    axes.set(ylabel="mean ROUGE-L recall", ylim=(0, 1.1))
    axes.legend(frameon=False)
    return _svg(figure)
