"""Methods compared: one unlearning run for each and each seed, for the same time or steps, with the same evaluation."""

import dataclasses
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import CompareConfig, UnlearnConfig
from ..errors import DivergedError, PMCError
from ..report import comparison, render
from ..report.environment import machine, versions
from ..utils.files import claimed, write_file
from . import earlier_runs, methods, unlearn
from .held import Held
from .outputs import ReportsAlone, WholeModel
from .plan import Plan, make_plan, require_inputs
from .progress import Monitor, Silent

REPORT, DIVERGED = "report.json", ".diverged.json"
RESULT, PAGE = "compare.json", "compare.html"
RESOLVED = ("reward", "output")  # settings that a run's report has otherwise


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison: what it would do, and its result if it is finished."""

    config: UnlearnConfig
    plan: Plan
    found: dict[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.config.method}, seed {self.config.seed}"


def check(config: CompareConfig, runs: Sequence[UnlearnConfig]) -> list[ComparedRun]:
    """Check all runs before any work, and read the results of those that are finished."""
    render.check_importable()
    checked, held = [], Held()  # one tokenizer for all
    for c in runs:
        require_inputs(c)
        target = _target(config, c)
        plan = make_plan(c, target.earlier(), held)
        found = _finished(c, plan)
        if found is None:
            target.check()
            target.check_room(plan.parameters, plan.dtype)
        checked.append(ComparedRun(c, plan, found))
    return checked


def compare(config: CompareConfig, runs: Sequence[UnlearnConfig], monitor: Monitor | None = None) -> dict[str, Any]:
    """Make the runs that are not finished, and write their table and page into `config.output`.

    Parameters
    ----------
    config : CompareConfig
    runs : sequence of UnlearnConfig
        `config.runs(...)`.
    monitor : Monitor, optional
        Shows the runs, their stages and steps.

    Returns
    -------
    dict
        What compare.json holds: ``before``, the untouched model's scores, and an entry in ``runs`` for each run, in which
        ``diverged`` says why there are no scores.

    Raises
    ------
    PMCError
        Bad input, before any work; a finished run of other settings or data.
    """
    monitor = monitor or Silent()
    monitor.stage("checking")
    checked = check(config, runs)
    for text in dict.fromkeys(text for run in checked for text in run.plan.warnings):
        monitor.warn(text)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    with claimed(f"{config.output}/{RESULT}"):
        for number, run in enumerate(checked, start=1):
            title = f"run {number} of {len(checked)}: {run.name}"
            monitor.stage(f"{title} is finished" if run.found else title)
            if run.found is None:
                run.found = _make(config, run, monitor)
                gc.collect()  # a trainer refers to itself: its model would stay until memory is short
                _require_same_weights(config, checked)
        made = _result(config, checked)
        for name, text in ((RESULT, render.summary(made)), (PAGE, comparison.html(made))):
            write_file(Path(config.output) / name, text)  # in place of one of fewer runs
    return made


def _target(config: CompareConfig, c: UnlearnConfig) -> WholeModel:
    return WholeModel(c) if config.keep_models else ReportsAlone(c)


def _make(config: CompareConfig, run: ComparedRun, monitor: Monitor) -> dict[str, Any]:
    c, held = run.config, Held()
    try:
        made = unlearn.unlearn(c, monitor, _target(config, c), held)
        if "history" not in made:
            raise PMCError(
                f"filter {made['left_out']['filter']} leaves none of {c.forget}'s questions to method {c.method} with seed "
                f"{c.seed}: there is nothing to compare"
            )
        return made
    except DivergedError as error:  # gradient ascent may end there: that is a result too
        found = {
            "settings": dataclasses.asdict(run.plan.config), "method": methods.facts(c), "diverged": str(error),
            "models": {"before": {"source": c.model, "sha256": held.weights}}, "data": earlier_runs.data_of(run.plan.rows),
        }  # fmt: skip
        write_file(c.output + DIVERGED, json.dumps(found, indent=1))
        monitor.warn(f"method {c.method}: {error}")
        return found


def _finished(c: UnlearnConfig, plan: Plan) -> dict[str, Any] | None:
    """Return the report of a run that is finished; refuse one of other settings or data."""
    for path in (Path(c.output) / REPORT, Path(c.output + DIVERGED)):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            settings, data = found["settings"], found.get("data")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PMCError(f"{path} can't be read as a run's report: move it away") from error
        ours = dataclasses.asdict(plan.config if data else c)
        for name, value in ours.items():
            theirs = settings.get(name, getattr(UnlearnConfig, name, None))  # the default, if the setting is newer
            if name not in RESOLVED and theirs != value:
                raise PMCError(
                    f"{path} is of another run: its {name} is {theirs!r}, not {value!r}; choose another output"
                )
        if data and any(
            name in data and data[name]["sha256"] != earlier_runs.rows_hash(rows, data["salt"])
            for name, rows in plan.rows.items()
        ):
            raise PMCError(f"{path} is of other data: choose another output")
        return found
    return None


def _require_same_weights(config: CompareConfig, runs: Sequence[ComparedRun]) -> None:
    if len({f["models"]["before"]["sha256"] for run in runs if "models" in (f := run.found or {})}) > 1:
        raise PMCError(
            f"{config.output} has runs of different weights of {runs[0].config.model}: choose another output"
        )


def _result(config: CompareConfig, runs: Sequence[ComparedRun]) -> dict[str, Any]:
    _require_same_weights(config, runs)
    found = [run.found or {} for run in runs]
    before = next((f["before"] for f in found if "before" in f), None)
    return {
        "settings": dataclasses.asdict(config),
        "model": runs[0].config.model,
        "questions": len(runs[0].plan.forget),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "before": before,
        "runs": [
            {
                "method": f["method"],
                "seed": run.config.seed,
                "learning_rate": run.config.learning_rate,
                "steps": len(f.get("history", [])),
                "seconds": f.get("training_seconds"),
                "diverged": f.get("diverged"),
                "left_out": f.get("left_out"),
                "after": f.get("after"),
            }
            for run, f in zip(runs, found, strict=True)
        ],
        "versions": versions(),
        "machine": machine(),
    }
