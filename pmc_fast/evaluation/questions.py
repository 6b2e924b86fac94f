"""Greedy answers to the forget and the kept questions, and the paper's two numbers (arXiv 2507.04219, section 5)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import EvaluationConfig, RewardName
from ..data import Encoder, Question, Row, check_answers, check_overlap, check_repeats, is_text, load_rows, same_rows
from ..errors import PMCError
from ..pmc.reward import Scorer, choose_scorer
from ..rollout import Rollouts
from ..utils import words
from ..utils.text import printable, row_numbers

FORGET_SETS = ("forget", "forget_paraphrased")  # the forget questions, and the same in other words
RETAIN_ROWS = 400
ANSWERED = 0.5  # recall: half of the truth's words, in order
SHORT_ANSWER = 3  # words: a shorter answer says nothing
LONG_ANSWER, DISTINCT = 12, 0.25  # nor does one of at least so many words of which so few are distinct


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
    """Return the sets that `config` evaluates, reading the files that only the evaluation needs.

    From a longer retain set 400 rows are drawn with replacement, the same as in the published evaluation.
    """
    name, paraphrased = FORGET_SETS
    sets = [EvalSet(name, "forget", list(forget))]
    if config.paraphrased:
        rows = load_rows(config.paraphrased, answers=True, paraphrased=True, **config.reading("paraphrased"))
        sets.append(EvalSet(paraphrased, "forget", rows))
    if retain:
        chosen = list(range(len(retain)))
        if len(retain) > RETAIN_ROWS:
            chosen = np.random.default_rng(12345).integers(0, len(retain), RETAIN_ROWS).tolist()
        sets.append(EvalSet("retain", "keep", [retain[i] for i in chosen], [i + 1 for i in chosen]))
    for source in config.general:
        name = printable(Path(source).stem)
        if name in {s.name for s in sets}:
            raise PMCError(f"general data {source}: there is a set called {name!r} already: rename the file")
        sets.append(EvalSet(name, "keep", load_rows(source, answers=True, **config.reading("general"))))
    return sets


def check_sets(sets: Sequence[EvalSet], *, allow_overlap: bool) -> list[str]:
    """Refuse questions that are both to be kept and to be forgotten (with `allow_overlap` warn), and return warnings.

    Warnings are of nearly equal questions, of forget sets that ask the same questions, which then count twice, of
    questions that a set repeats, of answers both to be kept and to be forgotten, and of forget sets with answers in some
    rows only.
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


def check_texts(config: EvaluationConfig, sets: Sequence[EvalSet]) -> list[str]:
    """Return a warning if texts were to be cut and there are none."""
    if not config.prompt_words or any(is_text(row.question) for s in sets for row in s.rows):
        return []
    return [f"prompt_words is {config.prompt_words} but no row is a text to be continued: it changed nothing"]


def with_initial_answers(sets: Sequence[EvalSet], initial: Sequence[str]) -> list[EvalSet]:
    """Take the model's initial answer for the truth of forget questions that came without one."""
    forget, *others = sets
    rows = [Row(r.question, r.answer or y) for r, y in zip(forget.rows, initial, strict=True)]
    return [replace(forget, rows=rows), *others]


def truths_of(sets: Sequence[EvalSet]) -> list[str]:
    """Return the true answers of all rows that have one."""
    return [row.answer for s in sets for row in s.rows if row.answer]


def check_truths(scorer: Scorer, sets: Iterable[EvalSet], *, known: bool = False) -> None:
    """Refuse truths without a word that the scorer sees, naming their rows; with `known` rows without a truth pass."""
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
        Questions -> the model's greedy answers. It is called once, with each question of all sets once: one long
        rollout keeps the engine busier than one per set.
    sets : sequence of EvalSet
        What to ask.
    reward : {"auto", "rouge", "unicode"}
        How answers are compared with truths (`choose_scorer`; auto: by the truths of all sets).
    log_text : bool
        Keep questions, truths and answers in the result and in `rows`.
    on_set : callable
        Called with each set before any question is asked.
    rows : list, optional
        Extended by every question's numbers: its set, its row there from 1, recall and words.

    Returns
    -------
    dict
        ``reward``: the one that was used; ``sets``: per set its role, rows, mean ROUGE-L recall against the truth,
        mean_words, the shares ``degenerate`` (under 3 words) and ``says_nothing`` (`is_no_answer`), and ``answered``, the
        number of rows with a recall of at least 0.5; ``unlearn_quality`` and ``utility`` (0 to 100) where there are sets
        to measure them on.

    Raises
    ------
    PMCError
        A truth without a word that the reward can compare; the error names its row.
    """
    scorer = choose_scorer(reward, truths_of(sets))
    check_truths(scorer, sets)
    for s in sets:
        on_set(s)
    questions = list(dict.fromkeys(row.question for s in sets for row in s.rows))
    answers = dict(zip(questions, answer(questions), strict=True))
    result: dict[str, Any] = {"reward": scorer.name, "sets": {}}
    for s in sets:
        scores, of_rows = _score(s, [answers[row.question] for row in s.rows], scorer, log_text)
        result["sets"][s.name] = scores
        if rows is not None:
            rows += of_rows
    for key, role, metric in (("unlearn_quality", "forget", unlearn_quality), ("utility", "keep", utility)):
        recalls = [s["rouge_l_recall"] for s in result["sets"].values() if s["role"] == role]
        if recalls:
            result[key] = metric(*recalls)
    return result


def _score(
    s: EvalSet, answers: list[str], scorer: Scorer, log_text: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the scores of one set and the numbers of its rows."""
    truths = [row.answer or "" for row in s.rows]
    recalls = scorer.recall(truths, [[a] for a in answers], 0)[:, 0]
    empty = sum(is_no_answer(a, truth, scorer) for a, truth in zip(answers, truths, strict=True))
    scores: dict[str, Any] = {
        "role": s.role,
        "rows": len(s.rows),
        "rouge_l_recall": float(recalls.mean()),
        "mean_words": mean_words(answers, scorer.name),
        "degenerate": degenerate_share(answers, scorer.name),
        "says_nothing": empty / len(answers),
        "answered": int((recalls >= ANSWERED).sum()),
    }
    texts: list[dict[str, Any]] = [{} for _ in answers]
    if log_text:
        asked = zip(s.rows, answers, strict=True)
        texts = [{"question": row.question, "truth": row.answer, "answer": a} for row, a in asked]
        scores["texts"] = [t | {"rouge_l_recall": float(r)} for t, r in zip(texts, recalls, strict=True)]
    rows = [
        {"set": s.name, "row": i, "rouge_l_recall": float(r), "words": scorer.count_words(a), **text}
        for i, (r, a, text) in enumerate(zip(recalls, answers, texts, strict=True), start=1)
    ]
    return scores, rows


def greedy_answers(engine: Callable[..., Rollouts], encoder: Encoder, questions: Sequence[Question]) -> list[str]:
    """Answer questions greedily, as `generate` would, with the encoder's prompts, stop tokens and max_length."""
    prompts = [encoder.prompt(question) for question in questions]
    rollouts = engine(
        prompts,
        num_samples=1,
        temperature=0,
        max_length=encoder.max_length,
        stop_ids=encoder.stops,
        as_generate=True,
    )
    return encoder.answers([tokens for [tokens] in rollouts.tokens], questions)


def unlearn_quality(*forget_recalls: float) -> float:
    """Return 0 to 100 from mean ROUGE-L recalls: 50 * (2 - R(forget) - R(paraphrased)).

    With one recall alone it is 100 * (1 - R(forget)).
    """
    return 100.0 * (1.0 - sum(forget_recalls) / len(forget_recalls))


def utility(*kept_recalls: float) -> float:
    """Return 0 to 100 from mean recalls: 100/3 * (R(retain) + R(world facts) + R(real authors)).

    With other sets than these three, the mean over what is given.
    """
    return 100.0 * sum(kept_recalls) / len(kept_recalls)


def mean_words(answers: Sequence[str], reward: RewardName = "auto") -> float:
    """Return the answers' mean number of words, as the reward counts them."""
    count = choose_scorer(reward, answers).count_words
    return sum(map(count, answers)) / len(answers)


def degenerate_share(answers: Sequence[str], reward: RewardName = "auto") -> float:
    """Return the share of answers of under 3 words: their recall is near 0, which looks like forgetting."""
    count = choose_scorer(reward, answers).count_words
    return sum(count(a) < SHORT_ANSWER for a in answers) / len(answers)


def is_no_answer(answer: str, truth: str, scorer: Scorer) -> bool:
    """Return whether an answer says nothing: under 3 words where the truth has more, or a few words repeated."""
    if scorer.count_words(answer) < SHORT_ANSWER <= scorer.count_words(truth):
        return True
    units = words.unicode_units(answer, False)
    return len(units) >= LONG_ANSWER and len(set(units)) < DISTINCT * len(units)
