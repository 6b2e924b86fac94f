"""Pairs to keep that the untouched model writes itself: pseudo-rehearsal (Robins, Connection Science 7(2), 1995)."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..data import Encoder, Question, Row, is_text
from ..data.overlap import LONG, near, normalized
from ..errors import PMCError
from ..rollout import Rollouts
from ..utils.words import count_words, end_of_words, neighbours, says_nothing

QUESTION_TOKENS, ANSWER_TOKENS = 32, 48  # at most, of what is written; what has not ended by then is left out
BEGINNINGS = 64  # at most, the most frequent ones
ROUNDS = 4  # of sampling, each of twice as many questions as are still missing
TOP_P = 0.95
TOLD = 0.5  # share of the words of an answer to be forgotten from which on another tells it


def rehearsal_rows(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    count: int,
    *,
    forget: Sequence[tuple[Question, str]],
    retain: Sequence[Row],
    seed: int = 0,
) -> list[Row]:
    """Return questions and answers that the untouched model writes, to be kept beside those of `retain`.

    Questions are sampled from a prompt that ends with the first word of a question of `retain`, as Magpie samples a chat's user
    turns (Xu et al., arXiv 2406.08464); answers are greedy. No further data is needed, and a retain loss on such pairs keeps what
    no pair of `retain` is about.

    Parameters
    ----------
    engine : RolloutEngine or SharedEngine
        Of the untouched model. Several processes call a SharedEngine together, with the same arguments.
    encoder : Encoder
    count : int
        Of the rows. Fewer are returned where the model writes too few that may be kept, and none where `retain` has only texts to
        be continued, which are no questions.
    forget : sequence of (question, str)
        What is to be forgotten: questions with the model's own answers. Rows are left out that have a word of them which no row of
        `retain` has, ask nearly the same, or tell half of such an answer.
    retain : sequence of Row
    seed : int
    """
    beginnings = _beginnings(retain)
    judge = _Judge(forget, retain)
    rows: list[Row] = []
    for turn in range(ROUNDS if beginnings else 0):
        if (missing := count - len(rows)) <= 0:
            break
        samples = math.ceil(2 * missing / len(beginnings))
        written = _questions(engine, encoder, beginnings, samples, seed * ROUNDS + turn)
        answered = _answered(engine, encoder, judge.new_questions(written))
        rows += [row for row in answered if judge.may_be_said(row.answer or "")][:missing]
    return rows


class _Judge:
    """Says what may be kept."""

    def __init__(self, forget: Sequence[tuple[Question, str]], retain: Sequence[Row]) -> None:
        self.asked = [normalized(q) for q, _ in forget]
        self.answers = [words for _, answer in forget if (words := neighbours(answer))]
        known = set[str]().union(*(neighbours(f"{_all_turns(row.question)}\n{row.answer or ''}") for row in retain))
        # words of what is to be forgotten that nothing to be kept has
        self.gone = set[str]().union(*self.answers, *(neighbours(_all_turns(q)) for q, _ in forget)) - known
        self.seen = {*self.asked, *(normalized(row.question) for row in retain)}

    def new_questions(self, questions: Iterable[str]) -> list[str]:
        """Return those that may be asked, each once."""
        found: dict[str, str] = {}
        for question in questions:
            name = normalized(question)
            if name not in self.seen and not neighbours(question) & self.gone:
                self.seen.add(name)
                found[name] = question
        again = {b for _, b in near(self.asked, list(found))}
        return [question for i, question in enumerate(found.values()) if i not in again]

    def may_be_said(self, answer: str) -> bool:
        words = neighbours(answer)
        return not words & self.gone and all(len(words & told) < TOLD * len(told) for told in self.answers)


def _questions(
    engine: Callable[..., Rollouts], encoder: Encoder, beginnings: Sequence[str], samples: int, seed: int
) -> Iterator[str]:
    """Yield questions that the model writes: one of each beginning, then another, ..."""
    prompts = [encoder.question_prompt(begin) for begin in beginnings]
    made = engine(
        prompts, num_samples=samples, temperature=1.0, top_k=0, top_p=TOP_P, max_new_tokens=QUESTION_TOKENS, seed=seed,
        stop_ids=encoder.stops, as_generate=True,
    )  # fmt: skip
    for sample in range(samples):
        for begin, tokens in zip(beginnings, made.tokens, strict=True):
            question = encoder.question(begin, tokens[sample])
            if count_words(question) >= LONG:
                yield question


def _answered(engine: Callable[..., Rollouts], encoder: Encoder, questions: Sequence[str]) -> list[Row]:
    """Return questions with the model's greedy answers, where these end and can be trained on."""
    asked = {q: prompt for q in questions if (prompt := _prompt(encoder, q))}
    if not asked:
        return []
    made = engine(
        list(asked.values()), num_samples=1, temperature=0, stop_ids=encoder.stops, as_generate=True,
        max_new_tokens=[min(ANSWER_TOKENS, encoder.max_length - len(prompt)) for prompt in asked.values()],
    )  # fmt: skip
    ended = {q: ids for q, [ids] in zip(asked, made.tokens, strict=True) if set(ids[-1:]) & set(encoder.stops)}
    answers = encoder.answers(list(ended.values()))
    return [Row(q, answer) for q, answer in zip(ended, answers, strict=True) if _trainable(encoder, q, answer)]


def _prompt(encoder: Encoder, question: str) -> list[int]:
    """Return a question's prompt; nothing where it leaves no room for an answer, or reads as control tokens."""
    try:
        encoder.check_text("rehearsal", question)
    except PMCError:
        return []
    prompt = encoder.prompt(question)
    return prompt if len(prompt) < encoder.max_length else []


def _trainable(encoder: Encoder, question: str, answer: str) -> bool:
    if says_nothing(answer):
        return False
    try:
        encoder.check_text("rehearsal", answer)
        return not encoder.pair(question, answer).cut
    except PMCError:
        return False


def _beginnings(retain: Sequence[Row]) -> list[str]:
    """Return the first words of questions, the most frequent ones first."""
    asked = (_last_turn(row.question).strip() for row in retain if not is_text(row.question))
    words = Counter(text[: end_of_words(text, 1)] for text in asked)
    return [word for word, _ in words.most_common(BEGINNINGS) if word]


def _last_turn(question: Question) -> str:
    return question if isinstance(question, str) else question[-1].content


def _all_turns(question: Question) -> str:
    return question if isinstance(question, str) else "\n".join(turn.content for turn in question)
