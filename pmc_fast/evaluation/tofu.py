"""The TOFU benchmark (arXiv 2401.06121): reading its four sets and scoring a model on them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import RewardName
from ..data import Question, Row, read_records, rows_of
from ..data.loading import SUFFIXES, json_lines, read_text
from ..errors import PMCError
from .questions import EvalSet, evaluate
from .tofu_metrics import (
    Variant,
    forget_quality,
    forget_truth_ratio,
    kept_truth_ratio,
    kolmogorov_smirnov,
    model_utility,
    option_probability,
    probability,
    truth_ratio,
)

SAME = 1e-3  # truth ratios as near as this, in every row, are one model's: machines round differently
OF_UTILITY = ("probability", "rouge_l_recall", "truth_ratio")  # of the three kept sets: nine numbers


@dataclass(frozen=True, slots=True)
class TofuRow:
    """A question with its true answer and with answers that are alike but wrong."""

    question: Question
    answer: str
    perturbed: list[str]
    paraphrase: Row | None = None  # question and true answer in other words; real authors and world facts have none

    @property
    def candidates(self) -> list[str]:
        """The answers whose likelihood is measured: the true one, its paraphrase if there is one, the wrong ones."""
        return [self.answer, *([] if self.paraphrase is None else [self.paraphrase.answer or ""]), *self.perturbed]


@dataclass(frozen=True, slots=True)
class TofuSet:
    """One of forget, retain, real_authors and world_facts."""

    name: str
    role: Literal["forget", "keep"]
    rows: list[TofuRow]


def load_tofu(source: str, split: str, limit: int = 0) -> list[TofuSet]:
    """Read TOFU's four sets.

    Parameters
    ----------
    source : str
        A directory with SPLIT_perturbed, retain_perturbed, real_authors_perturbed and world_facts_perturbed
        (in any format that `load_rows` reads), or the hub id locuslab/TOFU. SPLIT's own file holds the same pairs.
    split : str
        forget01, forget05 or forget10.
    limit : int
        Rows of each set; 0: all, as OpenUnlearning evaluates. TOFU's own code takes 300.

    Raises
    ------
    PMCError
        A file is missing, or a row lacks a column; the error names the row, not its text.
    """
    return [
        TofuSet("forget", "forget", _load(source, f"{split}_perturbed", limit, paraphrases=True)),
        TofuSet("retain", "keep", _load(source, "retain_perturbed", limit, paraphrases=True)),
        TofuSet("real_authors", "keep", _load(source, "real_authors_perturbed", limit)),
        TofuSet("world_facts", "keep", _load(source, "world_facts_perturbed", limit)),
    ]


def _load(source: str, name: str, limit: int, *, paraphrases: bool = False) -> list[TofuRow]:
    file = _file(source, name)
    records = list(read_records(file))[: limit or None]
    if not records:
        raise PMCError(f"{file} has no rows")
    plain = rows_of(records, file, answers=True)
    others: list[Row | None] = [None] * len(records)
    if paraphrases:
        for number, record in enumerate(records, start=1):
            if not (record.get("paraphrased_question") and record.get("paraphrased_answer")):
                raise PMCError(
                    f"{file}, row {number} has no paraphrased_question and paraphrased_answer: take TOFU's"
                )
        others = [*rows_of(records, file, answers=True, paraphrased=True)]
    rows = []
    for number, (record, row, other) in enumerate(zip(records, plain, others, strict=True), start=1):
        wrong = record.get("perturbed_answer")
        if not isinstance(wrong, list) or not wrong or not all(isinstance(a, str) and a.strip() for a in wrong):
            raise PMCError(f"{file}, row {number}: perturbed_answer must be a list of answers that are wrong")
        rows.append(TofuRow(row.question, row.answer or "", wrong, other))
    return rows


def _file(source: str, name: str) -> str:
    directory = Path(source)
    if not directory.is_dir():
        if directory.is_absolute() or source.startswith(".") or source.count("/") > 1:
            raise PMCError(f"tofu directory {source} does not exist")
        return f"{source}:{name}"
    files = [f for suffix in SUFFIXES if (f := directory / f"{name}{suffix}").is_file()]
    if not files:
        raise PMCError(f"tofu {source} has no {name}{', '.join(SUFFIXES)}: give a directory of TOFU's files")
    return str(files[0])


def tofu_questions(sets: Sequence[TofuSet]) -> list[EvalSet]:
    """Return the four sets, and the paraphrased forget questions for PMC's unlearn quality, as sets to evaluate."""
    asked = []
    for s in sets:
        asked.append(EvalSet(s.name, s.role, [Row(r.question, r.answer) for r in s.rows]))
        if s.role == "forget":
            paraphrases = [r.paraphrase for r in s.rows if r.paraphrase is not None]
            asked.append(EvalSet(f"{s.name}_paraphrased", s.role, paraphrases))
    return asked


def evaluate_tofu(
    answer: Callable[[Sequence[Question]], list[str]],
    nlls: Callable[[TofuSet], list[list[float]]],
    sets: Sequence[TofuSet],
    *,
    variant: Variant = "geometric",
    retain_ratios: np.ndarray | None = None,
    reward: RewardName = "auto",
    log_text: bool = False,
    on_set: Callable[[EvalSet], None] = lambda s: None,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Score a model as `evaluate` does, and by TOFU's own metrics.

    Parameters
    ----------
    answer : callable
        Questions -> the model's greedy answers.
    nlls : callable
        A set -> the mean token losses of each row's `TofuRow.candidates`.
    sets : sequence of TofuSet
        All four.
    variant : {"geometric", "arithmetic"}
        Of the truth ratio (`tofu_metrics.truth_ratio`).
    retain_ratios : array, optional
        Truth ratios on the forget set of another model that never saw it, for ``forget_quality``.
    reward, log_text, on_set, rows
        As in `evaluate`. A row of the four sets has also ``nll_answer``, ``nll_paraphrased`` (where there is one),
        ``nll_perturbed``, ``probability`` and ``truth_ratio`` (false over true).

    Returns
    -------
    dict
        What `evaluate` returns, with ``probability`` and ``truth_ratio`` of the four sets, ``model_utility`` and, if
        `retain_ratios` are given, ``forget_quality``.

    Notes
    -----
    Retain is retain_perturbed throughout, as in TOFU and OpenUnlearning; PMC's paper measures its utility on 400 rows
    drawn from the whole retain split, as `--suite questions` does.
    """
    losses: dict[str, list[dict[str, Any]]] = {}
    if retain_ratios is not None:
        for s in sets:
            if s.role == "forget":  # refused now: the answers take longer
                losses[s.name] = _named_losses(s, nlls(s))
                _require_another(_ratios(losses[s.name], variant), retain_ratios)
    all_rows: list[dict[str, Any]] = []
    result = evaluate(answer, tofu_questions(sets), reward=reward, log_text=log_text, on_set=on_set, rows=all_rows)
    for s in sets:
        of_set = losses.get(s.name) or _named_losses(s, nlls(s))
        ratios = _add_metrics(s, of_set, variant, result["sets"][s.name], [r for r in all_rows if r["set"] == s.name])
        if s.role == "forget" and retain_ratios is not None:
            result["forget_quality"] = forget_quality(ratios, retain_ratios)
    result["model_utility"] = model_utility(
        [result["sets"][s.name][key] for s in sets if s.role == "keep" for key in OF_UTILITY]
    )
    if rows is not None:
        rows.extend(all_rows)
    return result


def _named_losses(s: TofuSet, nlls: list[list[float]]) -> list[dict[str, Any]]:
    """Return the losses of each row's answers by what they are."""
    named = []
    for row, losses in zip(s.rows, nlls, strict=True):
        if row.paraphrase is None:
            named.append({"nll_answer": losses[0], "nll_perturbed": losses[1:]})
        else:
            named.append({"nll_answer": losses[0], "nll_paraphrased": losses[1], "nll_perturbed": losses[2:]})
    return named


def _add_metrics(
    s: TofuSet, losses: list[dict[str, Any]], variant: Variant, scores: dict[str, Any], rows: list[dict[str, Any]]
) -> np.ndarray:
    """Add TOFU's metrics to a set's scores and to its rows; return its truth ratios."""
    true = [of["nll_answer"] for of in losses]
    options = s.rows[0].paraphrase is None
    likely = option_probability(true, [of["nll_perturbed"] for of in losses]) if options else probability(true)
    ratios = _ratios(losses, variant)
    scores["probability"] = float(likely.mean())
    scores["truth_ratio"] = (forget_truth_ratio if s.role == "forget" else kept_truth_ratio)(ratios)
    for row, of, p, r in zip(rows, losses, likely, ratios, strict=True):
        row |= {**of, "probability": float(p), "truth_ratio": float(r)}
    return ratios


def _ratios(losses: Sequence[dict[str, Any]], variant: Variant) -> np.ndarray:
    true = [of.get("nll_paraphrased", of["nll_answer"]) for of in losses]
    return truth_ratio(true, [of["nll_perturbed"] for of in losses], variant)


def _require_another(ratios: np.ndarray, retain_ratios: np.ndarray) -> None:
    if np.allclose(ratios, retain_ratios, rtol=SAME, atol=0):
        raise PMCError(
            f"retain_log: its {len(ratios)} truth ratios are this model's own, so forget quality would be 1 whatever it "
            "knows: give the log of a model that never saw the forget set"
        )


def read_retain_log(file: str, count: int, variant: Variant) -> np.ndarray:
    """Return a retain model's truth ratios on the forget set.

    Parameters
    ----------
    file : str
        What ``evaluate --suite tofu --rows`` wrote for that model; or OpenUnlearning's TOFU_EVAL.json, whose truth
        ratios are geometric.
    count : int
        Rows of the forget set here: both models must have been asked the same.

    Raises
    ------
    PMCError
        The file holds no such numbers, or of another number of rows.
    """
    kolmogorov_smirnov()  # refuse now what could not be tested after hours
    try:
        text = read_text(Path(file))
        ratios = _open_unlearning_ratios(text, variant)
        if ratios is None:
            mine = [r for r in json_lines(text) if r.get("set") == "forget" and r.get("model", "after") == "after"]
            ratios = _ratios(mine, variant) if mine else np.zeros(0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PMCError(
            f"retain_log {file} holds no truth ratios ({type(error).__name__}): give what `evaluate --suite tofu --rows "
            f"FILE` wrote for a retain model, or with --truth-ratio geometric OpenUnlearning's TOFU_EVAL.json"
        ) from error
    if len(ratios) != count:
        raise PMCError(
            f"retain_log {file} has {len(ratios)} forget rows and this run {count}: evaluate the retain model with "
            "--suite tofu --rows FILE and the same --split and --tofu-rows"
        )
    return ratios


def _open_unlearning_ratios(text: str, variant: Variant) -> np.ndarray | None:
    try:
        of = json.loads(text)["forget_truth_ratio"]["value_by_index"]
    except (ValueError, KeyError, TypeError):
        return None
    if variant != "geometric":
        raise ValueError("OpenUnlearning's truth ratios are geometric")
    return np.array([float(row["score"]) for row in of.values()])
