"""Pairs to keep that the untouched model writes itself: pseudo-rehearsal (Robins, Connection Science 7(2), 1995)."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import regex

from ..data import Encoder, Question, Row, is_text
from ..data.overlap import LONG, normalized
from ..errors import PMCError
from ..rollout import Rollouts
from ..utils.words import count_words, end_of_words, says_nothing, unicode_units

QUESTION_TOKENS, ANSWER_TOKENS = 32, 48  # at most, of what is written; what has not ended by then is left out
BEGINNINGS = 64  # at most, the most frequent ones
ROUNDS = 4  # of sampling, each of twice as many questions as are still missing
TOP_P = 0.95
_SENTENCE_END = regex.compile(r"[\p{Sentence_Terminal}؟;՞]+(?![\p{L}\p{N}])")


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
    engine : RolloutEngine
        Of the untouched model. Several processes call together, with the same arguments.
    encoder : Encoder
    count : int
        Of the rows. Fewer are returned where the model writes too few that may be kept.
    forget : sequence of (question, str)
        What is to be forgotten: questions with the model's own answers. A row that shares a word with them is left out, unless
        `retain` has that word, too.
    retain : sequence of Row
    seed : int

    Raises
    ------
    PMCError
        `retain` has only texts to be continued, which are no questions.
    """
    beginnings = _beginnings(retain)
    if not beginnings:
        raise PMCError(
            "rehearsal_pairs needs retain questions, whose first words its own begin with, and all rows of retain are texts to be "
            "continued: leave it out"
        )
    gone = set[str]().union(*(_units(_last_turn(q)) | _units(answer) for q, answer in forget))
    gone -= set[str]().union(*(_units(_last_turn(row.question)) | _units(row.answer or "") for row in retain))
    seen = {normalized(_last_turn(q)) for q in (*(q for q, _ in forget), *(row.question for row in retain))}
    rows: list[Row] = []
    for turn in range(ROUNDS):
        if (missing := count - len(rows)) <= 0:
            break
        written = _questions(engine, encoder, beginnings, math.ceil(2 * missing / len(beginnings)), seed + turn)
        questions = []
        for question in written:
            if (name := normalized(question)) not in seen and not _units(question) & gone:
                seen.add(name)
                questions.append(question)
        answered = _answered(engine, encoder, questions)
        rows += [row for row in answered if not _units(row.answer or "") & gone][:missing]
    return rows


def _questions(
    engine: Callable[..., Rollouts], encoder: Encoder, beginnings: Sequence[str], samples: int, seed: int
) -> Iterable[str]:
    """Yield questions that the model writes: one of each beginning, then another, ..."""
    decode = partial(encoder.tokenizer.decode, skip_special_tokens=True)
    prompts = [encoder.question_prompt(begin) for begin in beginnings]
    made = engine(
        prompts, num_samples=samples, temperature=1.0, top_k=0, top_p=TOP_P,
        max_new_tokens=QUESTION_TOKENS, seed=seed, stop_ids=encoder.stops, as_generate=True,
    )  # fmt: skip
    for sample in range(samples):
        for begin, prompt, tokens in zip(beginnings, prompts, made.tokens, strict=True):
            # alone, some tokenizers leave out the space before the next word
            before, text = decode(prompt), decode(prompt + tokens[sample])
            question = _first_sentence(begin + text[len(before) :], whole=_ended(tokens[sample], encoder))
            if count_words(question) >= LONG:
                yield question


def _first_sentence(text: str, *, whole: bool) -> str:
    """Return a text up to the end of its first sentence or line; nothing if neither ends and the text is not `whole`."""
    line, newline, _ = text.partition("\n")
    if end := _SENTENCE_END.search(line):
        return line[: end.end()].strip()
    return line.strip() if newline or whole else ""


def _answered(engine: Callable[..., Rollouts], encoder: Encoder, questions: Sequence[str]) -> list[Row]:
    """Return questions with the model's greedy answers, where these end."""
    room = encoder.max_length - ANSWER_TOKENS
    asked = [(q, prompt) for q in questions if len(prompt := encoder.prompt(q)) <= room]
    if not asked:
        return []
    made = engine(
        [prompt for _, prompt in asked], num_samples=1, temperature=0, max_new_tokens=ANSWER_TOKENS, stop_ids=encoder.stops,
        as_generate=True,
    )  # fmt: skip
    ended = [(q, ids) for (q, _), [ids] in zip(asked, made.tokens, strict=True) if _ended(ids, encoder)]
    answers = encoder.answers([ids for _, ids in ended])
    return [Row(q, answer) for (q, _), answer in zip(ended, answers, strict=True) if not says_nothing(answer)]


def _ended(ids: Sequence[int], encoder: Encoder) -> bool:
    return not set(encoder.stops).isdisjoint(ids[-1:])


def _beginnings(retain: Sequence[Row]) -> list[str]:
    """Return the first words of questions, the most frequent ones first."""
    asked = (_last_turn(row.question).strip() for row in retain if not is_text(row.question))
    words = Counter(text[: end_of_words(text, 1)] for text in asked)
    return [word for word, _ in words.most_common(BEGINNINGS) if word]


def _last_turn(question: Question) -> str:
    return question if isinstance(question, str) else question[-1].content


def _units(text: str) -> set[str]:
    """Return a text's words; of scripts in which a character is one, two neighbours."""
    units = unicode_units(text)
    pairs = {a + b for a, b in itertools.pairwise(units) if len(a) == len(b) == 1 and not (a + b).isascii()}
    return {u for u in units if len(u) > 1 or u.isascii()} | pairs
