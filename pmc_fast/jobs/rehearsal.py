"""The pairs that a run keeps beside those it was given, written by the untouched model; the same ones when it is resumed."""

from dataclasses import asdict
from pathlib import Path

from ..data import Row
from ..distributed import Ranks
from ..pmc.rehearsal import rehearsal_rows
from ..utils.files import digest
from .evaluator import Evaluator
from .plan import Plan
from .progress import Stages
from .remembered import directory_of, recall, remember

FILE = "rehearsal.json"
STAGE = "rehearsal pairs"


def rehearse(plan: Plan, evaluator: Evaluator, weights: str, checkpoints: Path, stages: Stages) -> None:
    """Let the untouched model write the plan's `rehearsal` pairs, as many as its settings ask for.

    Parameters
    ----------
    plan : Plan
        It gets a warning, too, where the model writes fewer.
    evaluator : Evaluator
        Of the untouched model.
    weights : str
        Its hash.
    checkpoints : Path
        The run's directory of checkpoints.
    stages : Stages
    """
    c, ranks = plan.config, Ranks()
    if not c.rehearsal_pairs:
        return
    settings = [c.rehearsal_pairs, c.seed, c.prompt_format, c.system_prompt, c.date_string, c.max_length]
    key = digest(
        [weights, settings, *([[r.question, r.answer] for r in rows] for rows in (plan.forget, plan.retain))]
    )
    with stages(STAGE):
        known = recall(directory_of(c, checkpoints) / FILE, key) if c.resume else None
        known = ranks.gather(known)[0]  # the first process's files count
        if known is None:
            questions = [row.question for row in plan.forget]
            forget = list(zip(questions, evaluator.answers(questions), strict=True))
            rows = rehearsal_rows(
                evaluator.engine, plan.encoder, c.rehearsal_pairs, forget=forget, retain=plan.retain, seed=c.seed
            )
            known = ranks.gather([asdict(row) for row in rows])[0]  # one list, however other processes round
        if c.checkpoint_steps and ranks.rank == 0:
            remember(checkpoints / FILE, key, known)
    if len(known) < c.rehearsal_pairs:
        plan.warn(
            [
                f"rehearsal_pairs is {c.rehearsal_pairs} and the model wrote {len(known)} that may be kept: the others did not end, or "
                f"share a word with what is to be forgotten that no pair of {c.retain} has"
            ],
            stages.monitor,
        )
    plan.rehearsal = [Row(**row) for row in known]
