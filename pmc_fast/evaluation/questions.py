"""Greedy answers to the forget and the kept questions, scored as the paper does."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import EvaluationConfig, RewardName
from ..data import (
    Question,
    Row,
    check_answers,
    check_overlap,
    check_repeats,
    load_rows,
    same_rows,
)
from ..errors import PMCError
from ..pmc.reward import Scorer, choose_scorer
from ..utils.text import printable, row_numbers
from .metrics import (
    degenerate_share,
    is_no_answer,
    mean_words,
    unlearn_quality,
    utility,
)

RETAIN_ROWS = 400
ANSWERED = 0.5  # recall: half of the truth's words, in order


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Questions with their true answers, to be forgotten or to be kept."""

    name: str
    role: Literal["forget", "keep"]
    rows: list[Row]
    numbers: Sequence[int] | None = None  # of the rows in their file, from 1, where they are not 1, 2, ...

    @property
    def pairs(self) -> list[tuple[Question, str | None]]:
        """Each question with its answer."""
        return [(row.question, row.answer) for row in self.rows]


def load_sets(config: EvaluationConfig, forget: Sequence[Row], retain: Sequence[Row]) -> list[EvalSet]:
    """Return what `config` has evaluated, reading the files that only the evaluation needs.

    Of a long retain set 400 rows are drawn with replacement, the draw of the published evaluation.
    """
    sets = [EvalSet("forget", "forget", list(forget))]
    if config.paraphrased:
        rows = load_rows(config.paraphrased, answers=True, paraphrased=True)
        sets.append(EvalSet("forget_paraphrased", "forget", rows))
    if retain:
        chosen = list(range(len(retain)))
        if len(retain) > RETAIN_ROWS:
            chosen = np.random.default_rng(12345).integers(0, len(retain), RETAIN_ROWS).tolist()
        sets.append(EvalSet("retain", "keep", [retain[i] for i in chosen], [i + 1 for i in chosen]))
    for source in config.general:
        name = printable(Path(source).stem)
        if name in {s.name for s in sets}:
            raise PMCError(f"general data {source}: there is a set called {name!r} already: rename the file")
        sets.append(EvalSet(name, "keep", load_rows(source, answers=True)))
    return sets


def check_sets(sets: Sequence[EvalSet], *, allow_overlap: bool) -> list[str]:
    """Refuse questions to be kept that are to be forgotten (or warn of them), and return what else to say.

    That is: questions that are nearly the same, forget sets that ask the same, which then counts twice, questions that
    stand twice in a set, answers to be kept that are to be forgotten, and those that only a part of a forget set has.
    """
    forget, keep = (
        {s.name: [row.question for row in s.rows] for s in sets if s.role == role} for role in ("forget", "keep")
    )
    warnings = check_overlap(forget, keep, allow=allow_overlap)
    first, *others = forget.items()
    for name, questions in others:
        if rows := same_rows(questions, first[1]):
            warnings.append(
                f"{name}, {row_numbers(rows)}: the questions are those of {first[0]}, in the same words: they tell nothing "
                "of other words, and count twice"
            )
    truths = [{s.name: [row.answer for row in s.rows] for s in sets if s.role == role} for role in ("forget", "keep")]
    warnings += check_answers(*truths)
    for s in sets:
        if s.numbers is None:  # else drawn with replacement
            warnings += check_repeats(s.name, s.pairs)
        without = [number for number, row in enumerate(s.rows, start=1) if not row.answer]
        if s.role == "forget" and 0 < len(without) < len(s.rows):
            warnings.append(
                f"{s.name}, {row_numbers(without)}: no answer is given, unlike in other rows: the model's own first answer "
                "is the truth there"
            )
    return warnings


def with_initial_answers(sets: Sequence[EvalSet], initial: Sequence[str]) -> list[EvalSet]:
    """Give forget questions that came without an answer the model's initial one for a truth."""
    forget, *others = sets
    rows = [Row(r.question, r.answer or y) for r, y in zip(forget.rows, initial, strict=True)]
    return [replace(forget, rows=rows), *others]


def truths_of(sets: Sequence[EvalSet]) -> list[str]:
    """Return the true answers of sets, of the rows that have one."""
    return [row.answer for s in sets for row in s.rows if row.answer]


def check_truths(scorer: Scorer, sets: Iterable[EvalSet], *, known: bool = False) -> None:
    """Refuse truths that the scorer can't compare anything with, by their rows' numbers; with `known` those there are."""
    for s in sets:
        numbers = s.numbers or range(1, len(s.rows) + 1)
        truths = {n: row.answer or "" for n, row in zip(numbers, s.rows, strict=True) if row.answer or not known}
        scorer.require_words(s.name, sorted(truths.items()))


def evaluate(
    answer: Callable[[Sequence[Question]], list[str]],
    sets: Sequence[EvalSet],
    *,
    reward: RewardName = "auto",
    log_text: bool = False,
    on_set: Callable[[EvalSet], None] = lambda s: None,
    rows: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Score a model's greedy answers.

    Parameters
    ----------
    answer : callable
        Questions -> the model's greedy answers. It is called once, with each question of all sets once: an answer
        depends on the question alone, and one long call keeps the engine busier than one a set.
    sets : Sequence[EvalSet]
        What to ask.
    reward : {"auto", "rouge", "unicode"}
        How answers are compared with truths (`choose_scorer`; auto: by the truths of all sets).
    on_set : callable
        Is told of each set before they are asked.
    log_text : bool
        Keep questions, truths and answers in the result and in `rows`.
    rows : list, optional
        Is given every question's numbers: its set, its row there from 1, recall and words.

    Returns
    -------
    dict
        ``reward``: the one that was used; ``sets``: per set its role, rows, mean ROUGE-L recall against the truth,
        mean_words, the shares ``degenerate`` (under 3 words) and ``says_nothing`` (`metrics.is_no_answer`), and
        ``answered``, the number of rows with a recall of at least 0.5; ``unlearn_quality`` and ``utility`` (0 to 100) where a set speaks to them.

    Raises
    ------
    PMCError
        A truth that the reward sees nothing of; the error names its row.
    """
    scorer = choose_scorer(reward, truths_of(sets))
    check_truths(scorer, sets)
    result: dict[str, Any] = {"reward": scorer.name, "sets": {}}
    for s in sets:
        on_set(s)
    questions = list(dict.fromkeys(row.question for s in sets for row in s.rows))
    said = dict(zip(questions, answer(questions), strict=True))
    for s in sets:
        answers = [said[row.question] for row in s.rows]
        recalls = scorer.recall([row.answer or "" for row in s.rows], [[a] for a in answers], 0)[:, 0]
        scored: dict[str, Any] = {
            "role": s.role,
            "rows": len(s.rows),
            "rouge_l_recall": float(recalls.mean()),
            "mean_words": mean_words(answers, scorer.name),
            "degenerate": degenerate_share(answers, scorer.name),
            "says_nothing": sum(is_no_answer(a, r.answer or "", scorer) for a, r in zip(answers, s.rows, strict=True))
            / len(answers),
            "answered": int((recalls >= ANSWERED).sum()),
        }
        texts = [
            {"question": row.question, "truth": row.answer, "answer": a} if log_text else {}
            for row, a in zip(s.rows, answers, strict=True)
        ]
        numbers = [{"rouge_l_recall": float(r)} for r in recalls]
        if log_text:
            scored["texts"] = [text | number for text, number in zip(texts, numbers, strict=True)]
        if rows is not None:
            for i, (text, number, a) in enumerate(zip(texts, numbers, answers, strict=True), start=1):
                rows.append({"set": s.name, "row": i, **number, "words": scorer.count_words(a), **text})
        result["sets"][s.name] = scored
    for key, role, metric in (("unlearn_quality", "forget", unlearn_quality), ("utility", "keep", utility)):
        recalls_of_role = [s["rouge_l_recall"] for s in result["sets"].values() if s["role"] == role]
        if recalls_of_role:
            result[key] = metric(*recalls_of_role)
    return result
