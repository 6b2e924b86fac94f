"""The pairs that a run keeps beside those it was given, written by its untouched model."""

from ..pmc.rehearsal import rehearsal_rows
from ..trainer.base import BaseTrainer
from .evaluator import Evaluator
from .methods import trains_on_pairs
from .plan import Plan
from .progress import Stages

STAGE = "rehearsal pairs"


def rehearse(plan: Plan, trainer: BaseTrainer, evaluator: Evaluator, stages: Stages) -> float:
    """Give a trainer the pairs that the untouched model writes, as many as the plan's settings ask for.

    Parameters
    ----------
    plan : Plan
        It gets a warning where the model writes fewer.
    trainer : BaseTrainer
    evaluator : Evaluator
        Of the untouched model; it may know its answers to the forget questions already.
    stages : Stages

    Returns
    -------
    float
        Seconds.
    """
    c = plan.config
    if not c.rehearsal_pairs or not trains_on_pairs(c):
        return 0.0
    with stages(STAGE):
        questions = [row.question for row in plan.forget]
        forget = list(zip(questions, evaluator.answers(questions), strict=True))
        if plan.method is not None and plan.method.told:
            forget += [(row.question, row.answer or "") for row in plan.forget]
        rows = rehearsal_rows(
            evaluator.engine, plan.encoder, c.rehearsal_pairs, forget=forget, retain=plan.retain, seed=c.seed
        )
        if rows:
            trainer.add_rehearsal(rows)
    if len(rows) < c.rehearsal_pairs:
        plan.warn(
            [
                f"rehearsal_pairs is {c.rehearsal_pairs} and the model wrote {len(rows)}: what it wrote else did not end, was too short or "
                f"too long, or may tell what is to be forgotten (words of it that {c.retain} does not have), or {c.retain} has no question"
            ],
            stages.monitor,
        )
    return stages.seconds[STAGE]
