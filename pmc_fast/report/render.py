"""Output files of runs and evaluations: JSON, an HTML page with plots, the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import PMCError
from ..utils.text import markdown
from . import gates

TEMPLATES = Path(__file__).parent / "templates"
SUMMARY = (
    ("unlearn_quality", "unlearn quality (0-100)", ".1f"),
    ("utility", "utility (0-100)", ".1f"),
    ("forget_quality", "TOFU forget quality (p-value)", ".2g"),
    ("model_utility", "TOFU model utility (0-1)", ".3f"),
    ("perplexity", "unrelated text: perplexity", ".2f"),
    ("answer_token_mass", "unrelated text: probability of forget-answer tokens", ".2g"),
)
PMC = {"name": "pmc", "title": "Partial Model Collapse", "told": False}  # what a report says of the method
ATTACKS = {"sampling": "sampling", "prefill": "prefill", "first_words": "first words given"}
REWARDS = {
    "rouge": "ROUGE-L of rouge_score, which sees a to z and 0 to 9",
    "unicode": "words of any script; where one is written without spaces, its characters are counted as words",
}
OF_A_SET = (
    ("rouge_l_recall", "ROUGE-L recall", ".3f"),
    ("mean_words", "words an answer", ".1f"),
    ("degenerate", "answers under 3 words", ".0%"),
    ("says_nothing", "answers that say nothing", ".0%"),
    ("answered", "rows still answered (recall of 0.5 or more)", "d"),
    ("probability", "probability", ".3f"),
    ("truth_ratio", "truth ratio", ".3f"),
)


def render(made: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """Return all files of a run as {file name: text}, rendered before the weights are written: errors come first.

    Parameters
    ----------
    made : dict
        What report.json holds.
    rows : sequence of dict
        Every question's numbers, for rows.jsonl.
    """
    check_importable()
    files = {
        "report.json": json.dumps(made, indent=1),
        "report.html": html(made, rows),
        "README.md": model_card(made),
    }
    return files | ({"rows.jsonl": jsonl(rows)} if rows else {})


def summary(made: Mapping[str, Any]) -> str:
    """Return a result as JSON."""
    return json.dumps(made, indent=1, ensure_ascii=False)


def jsonl(rows: Sequence[dict[str, Any]]) -> str:
    """Return JSON lines, one for each question."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_importable() -> None:
    """Raise PMCError if a package that reports need is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PMCError(f"reports need {error.name}: pip install 'pmc_fast[cli]'") from error


def html(made: dict[str, Any], rows: Sequence[dict[str, Any]] = ()) -> str:
    """Return a self-contained page with the tables and plots of a run or an evaluation."""
    from .plots import plots

    values: dict[str, Any] = {"made": made, "plots": plots(made, rows), "rows": metric_rows(made)}
    values |= {"leaks": leak_rows(made), "texts": _texts(made), "rewards": REWARDS, "method": method_of(made)}
    return template("report.html.jinja", **values, verdict=verdict(made), hashes=_hashes(made))


def method_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's report says of its method; older reports are PMC's."""
    return made.get("method") or PMC


def verdict(made: dict[str, Any]) -> str:
    """Return a line on how many forget questions are still answered and whether the gates passed."""
    after = made.get("after")
    if not after:
        return "Not evaluated."
    forget = {name: s for name, s in after["sets"].items() if s["role"] == "forget" and "answered" in s}
    parts = [f"{s['answered']} of {s['rows']} questions of {name} still answered" for name, s in forget.items()]
    if made.get("failed_gates"):
        parts.append(
            f"{len(made['failed_gates'])} gates missed" if len(made["failed_gates"]) > 1 else "a gate was missed"
        )
    elif chosen := [gates.line(g) for g in made.get("gates", []) if g["name"] in gates.CHOSEN]:
        parts.append(f"all gates passed ({'; '.join(chosen)})")
    else:
        parts.append("no gate was set for quality or utility")
    return "; ".join(parts) + "."


def _hashes(made: dict[str, Any]) -> list[tuple[str, str]]:
    models = [(f"model {when}: {of['source']}", of["sha256"]) for when, of in made.get("models", {}).items()]
    sets = made.get("data", {}).items()
    data = [
        (f"{name}, {of['rows']} rows", of["sha256"]) for name, of in sets if isinstance(of, dict) and "sha256" in of
    ]
    return models + data


def model_card(made: dict[str, Any]) -> str:
    """Return the model's README.md with the hub's metadata."""
    from huggingface_hub import ModelCardData

    model, lora = made["settings"]["model"], made["settings"].get("lora", False)
    local = Path(model).exists()  # the hub refuses a card that names a local path
    metadata = ModelCardData(
        base_model=None if local else model,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["pmc_fast", "unlearning"],
    )
    values: dict[str, Any] = {"made": made, "lora": lora, "name": Path(model).name if local else model}
    values |= {"metadata": metadata.to_yaml(), "rows": metric_rows(made), "verdict": verdict(made)}
    values["method"] = method_of(made)
    return template("card.md.jinja", **values)


def metric_rows(made: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (metric, before, after) as texts: summary numbers, leak attacks, then each set."""
    before, after = made.get("before", {}), made.get("after", {})
    rows = [
        (label, _number(before.get(key), form), _number(after.get(key), form))
        for key, label, form in SUMMARY
        if key in after
    ]
    if "forget_quality" in after:  # a p-value says little without the size of its sample
        count = str(after["sets"]["forget"]["rows"])
        rows.append(("TOFU forget quality: rows of each model", count, count))
    rows += [
        (
            f"{of['set']}, {of['attack']} attack: largest recall of {of['samples']}",
            of["before"]["worst"],
            of["after"]["worst"] if of["questions"] else f"- ({of['left_out']} rows with nothing left to find)",
        )
        for of in leak_rows(made)
    ]
    for name, scores in after.get("sets", {}).items():
        old = before.get("sets", {}).get(name, {})
        rows.append((f"{name}: rows", str(old.get("rows", "-")), str(scores["rows"])))
        for key, label, form in OF_A_SET:
            if key in scores:
                rows.append((f"{name}: {label}", _number(old.get(key), form), _number(scores[key], form)))
    return rows


def leak_rows(made: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each leak attack's numbers as texts: a dict with its set, attack, samples, before and after."""
    found = []
    for name, attacks in _leaks(made, "after").items():
        for kind, after in attacks.items():
            old = _leaks(made, "before").get(name, {}).get(kind)
            found.append(
                {"set": name, "attack": ATTACKS.get(kind, kind), "samples": after["samples"],
                 "questions": after["questions"], "left_out": after["left_out"],
                 "before": _leak_texts(old), "after": _leak_texts(after)}
            )  # fmt: skip
    return found


def _leaks(made: dict[str, Any], when: str) -> dict[str, Any]:
    return made.get(when, {}).get("leakage", {}).get("sets", {})


def _leak_texts(of: dict[str, Any] | None) -> dict[str, str]:
    if of is None or not of["questions"]:
        return dict.fromkeys(("worst", "leak_at_1", "leak_at_n", "degenerate"), "-")
    most = of["leak_at_k"][str(of["samples"])]
    return {
        "worst": _interval(of["worst"]),
        "leak_at_1": _interval(of["leak_at_k"]["1"]),
        "leak_at_n": _interval(most),
        "degenerate": f"{of['degenerate']:.0%}",
    }


def _interval(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['value']:.3f} ({low:.3f} to {high:.3f})"


def _texts(made: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return tables of texts by their titles, where log_text kept any: question, truth, before, after."""
    kept = {when: _kept_texts(made[when]) for when in ("before", "after") if when in made}
    tables = []
    for title, after in kept.get("after", {}).items():
        before = kept.get("before", {}).get(title, after)
        tables.append(
            (title, [
                {"question": new["question"], "truth": new["truth"], "before": _said(old), "after": _said(new)}
                for old, new in zip(before, after, strict=True)
            ])
        )  # fmt: skip
    return tables


def _kept_texts(scores: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found = {f"Answers: {name}": s.get("texts") for name, s in scores["sets"].items()}
    for name, attacks in scores.get("leakage", {}).get("sets", {}).items():
        for kind, of in attacks.items():
            found[f"Samples of the largest recall: {name}, {ATTACKS.get(kind, kind)}"] = of.get("texts")
    return {title: texts for title, texts in found.items() if texts}


def _said(row: dict[str, Any]) -> str:
    return row["answer"] if "answer" in row else row["worst"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def template(file: str, **values: Any) -> str:
    """Return a template of this package, filled in."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["markdown"] = markdown
    return environment.get_template(file).render(**values)
