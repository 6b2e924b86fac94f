"""Which forget questions a run's filter leaves out of training, the same ones when it is resumed; all are evaluated."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import UPCORE, Filter, UnlearnConfig
from ..distributed import Ranks
from ..evaluation import truths_of
from ..methods import upcore
from ..utils.files import digest, one_error, write_file
from ..utils.text import row_numbers
from . import known_forgotten
from .evaluator import Evaluator
from .plan import Plan
from .progress import Stages

FILE = "left_out.json"


@dataclass(slots=True)
class LeftOut:
    """What a filter found: row numbers, no text."""

    filter: str
    rows: list[int]  # from 1: not trained on
    questions: int
    criterion: str
    known_forgotten: dict[str, Any] | None = None  # a `KnownForgotten`, of that filter

    @property
    def kept(self) -> list[int]:
        """The questions to be unlearned, from 0."""
        out = set(self.rows)
        return [i for i in range(self.questions) if i + 1 not in out]

    def report(self) -> dict[str, Any]:
        """Return what report.json holds."""
        facts = asdict(self)
        known = facts.pop("known_forgotten")
        return {"left_out": facts} | ({"known_forgotten": known} if known else {})


def leave_out(
    plan: Plan, evaluator: Evaluator, model: Any, weights: str, checkpoints: Path, stages: Stages
) -> LeftOut | None:
    """Leave out of a plan what its filter finds, or what an earlier start of the same run found.

    Parameters
    ----------
    plan : Plan
        All its questions are kept where the filter would keep none.
    evaluator : Evaluator
        Of the untouched model.
    model : transformers.PreTrainedModel or peft.PeftModel
        The same; untouched.
    weights : str
        Its hash.
    checkpoints : Path
        The run's directory of checkpoints.
    stages : Stages

    Returns
    -------
    LeftOut or None
        None: the run has no filter.
    """
    c, ranks, chosen = plan.config, Ranks(), plan.config.chosen_filter
    if not chosen.name:
        return None
    key = _digest(plan, weights)
    with stages(f"filter {chosen.name}"):
        directory = checkpoints if c.resume in ("", "auto") else Path(c.resume).parent
        found = _remembered(directory, key) if c.resume else None
        found = ranks.gather(found)[0]  # the first process's files count
        if found is None:
            found = _upcore(plan, model, chosen) if chosen.name == UPCORE else _known_forgotten(plan, evaluator)
        found = ranks.gather(found)[0]  # one list, however other processes round
        if c.checkpoint_steps and found.kept and ranks.rank == 0:
            _remember(checkpoints, found, key)
    which = f" ({row_numbers(found.rows)})" if found.rows else ""
    stages.monitor.stage(f"  {len(found.rows)} of {found.questions} questions are left out{which}")
    if found.kept:
        plan.keep(found.kept, stages.monitor)
    return found


def _upcore(plan: Plan, model: Any, chosen: Filter) -> LeftOut:
    c, count = plan.config, len(plan.forget)
    kept = upcore(model, plan.tokenizer, c, plan.forget, pruned=chosen.share, seed=c.seed)
    rows = [i + 1 for i in sorted({*range(count)} - {*kept})]
    criterion = f"outliers of the hidden states (UPCORE, arXiv 2502.15082), a share of {chosen.share:g}"
    return LeftOut(c.filter, rows, count, criterion)


def _known_forgotten(plan: Plan, evaluator: Evaluator) -> LeftOut:
    found = known_forgotten.judge(evaluator, plan.config, plan.forget, plan.paraphrases, truths=truths_of(plan.sets))
    return LeftOut("known_forgotten", found.rows, found.questions, found.criterion, asdict(found))


def settings_of(config: UnlearnConfig) -> list[Any]:
    """Return all that a filter's choice depends on beside data and weights, JSON-ready; empty without a filter."""
    chosen = config.chosen_filter
    if not chosen.name:
        return []
    sampling = [config.algorithm(), config.skip_threshold, config.leak_threshold] if chosen.samples else []
    return [asdict(chosen), config.seed, sampling]


def _digest(plan: Plan, weights: str) -> str:
    rows = [[row.question, row.answer, other] for row, other in zip(plan.forget, plan.paraphrases, strict=True)]
    return digest([rows, settings_of(plan.config), weights])


def _remembered(directory: Path, key: str) -> LeftOut | None:
    try:
        content = json.loads((directory / FILE).read_text(encoding="utf-8"))
        return LeftOut(**content["found"]) if content["of"] == key else None
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: found again
        return None


def _remember(directory: Path, found: LeftOut, key: str) -> None:
    """Keep what was found beside the run's checkpoints: row numbers and a hash."""
    with one_error(str(directory / FILE)):
        directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / FILE, json.dumps({"of": key, "found": asdict(found)}), private=True)
