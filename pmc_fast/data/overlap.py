"""Questions that are both to be forgotten and to be kept: refused, or warned about."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import PMCError
from ..utils.text import row_numbers
from ..utils.words import count_words
from .chats import Chat, Question, asked
from .datasets import questions_of
from .encoding import ANSWER_TAG, Encoded

NEAR = 0.6  # weighted Jaccard similarity of near duplicates: a pair of different questions in TOFU has 0.5
LONG = 3  # words of an answer that identifies its question: "Yes" and "in Paris" answer many
SAMPLED = 5000  # rows from which the pieces' weights are estimated
_OF_A_NAME = set("#%&*@/\\§‰°′″†‡")  # "C#" is not "C"
_WORD = re.compile(r"\w+")
_NUMBER = re.compile(r"\d+")


def normalized(question: Question) -> str:
    """Return a question without differences of Unicode form, case, white space and punctuation at the ends."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", asked(question)).casefold())
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    begin, end = 0, len(text)
    while begin < end and _at_an_end(text[begin]):
        begin += 1
    while begin < end and _at_an_end(text[end - 1]):
        end -= 1
    return text[begin:end] or text


def _at_an_end(c: str) -> bool:
    return c == " " or (unicodedata.category(c) in ("Po", "Ps", "Pe", "Pi", "Pf") and c not in _OF_A_NAME)


def check_overlap(
    forget: Mapping[str, Sequence[Question]], keep: Mapping[str, Sequence[Question]], *, allow: bool = False
) -> list[str]:
    """Refuse questions that are to be forgotten and to be kept.

    Parameters
    ----------
    forget, keep : mapping of str to sequence of Question
        Questions by their source, which errors name.
    allow : bool
        Warn instead of refusing.

    Returns
    -------
    list of str
        Warnings, also of questions that are nearly the same by their shared parts of words; paraphrases in other words are
        not found.
    """
    warnings = []
    gone = {source: [normalized(q) for q in questions] for source, questions in forget.items()}
    for wanted, questions in keep.items():
        kept = [normalized(q) for q in questions]
        for source, others in gone.items():
            warnings += _judge(wanted, _rows_in(kept, others), source, _rows_in(others, kept), allow)
            pairs = [(a, b) for a, b in near(others, kept) if others[a] != kept[b]]
            if pairs:
                a, b = (sorted({p[side] + 1 for p in pairs}) for side in (0, 1))
                warnings.append(
                    f"{wanted}, {row_numbers(b)}: nearly the same questions are to be forgotten ({source}, "
                    f"{row_numbers(a)}): if they ask for the same, keeping them teaches what is being forgotten"
                )
    return warnings


def check_repeats(source: str, pairs: Sequence[tuple[Question, str | None]]) -> list[str]:
    """Return warnings of questions that a set has twice, with the same answer or with another."""
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    again: list[int] = []
    against: list[int] = []
    for number, (question, answer) in enumerate(pairs, start=1):
        system = question[0].content if isinstance(question, Chat) and question[0].role == "system" else ""
        given = answers[system, normalized(question)]
        if given:
            (again if normalized(answer or "") in given else against).append(number)
        given.append(normalized(answer or ""))
    warnings = []
    if again:
        warnings.append(f"{source}, {row_numbers(again)}: an earlier row asks and answers the same: it counts twice")
    if against:
        warnings.append(
            f"{source}, {row_numbers(against)}: an earlier row asks the same and has another answer: no model gives both, "
            "so that one of them always counts as not said; keep one"
        )
    return warnings


def check_answers(forget: Mapping[str, Sequence[str | None]], keep: Mapping[str, Sequence[str | None]]) -> list[str]:
    """Return warnings of answers of 3 words or more that are both to be forgotten and to be kept."""
    warnings = []
    gone = {source: [normalized(a or "") for a in answers] for source, answers in forget.items()}
    for wanted, answers in keep.items():
        kept = [normalized(a) if a and count_words(a) >= LONG else "" for a in answers]
        for source, others in gone.items():
            both = set(kept) & set(others) - {""}
            if both:
                rows, others_rows = ([n for n, a in enumerate(side, start=1) if a in both] for side in (kept, others))
                warnings.append(
                    f"{wanted}, {row_numbers(rows)}: the answer is one that is to be forgotten ({source}, "
                    f"{row_numbers(others_rows)}): keeping it teaches it"
                )
    return warnings


def same_rows(questions: Sequence[Question], others: Sequence[Question]) -> list[int]:
    """Return the numbers, from 1, of the questions that are among the others."""
    return _rows_in([normalized(q) for q in questions], [normalized(q) for q in others])


def _rows_in(questions: Sequence[str], others: Sequence[str]) -> list[int]:
    among = set(others)
    return [number for number, q in enumerate(questions, start=1) if q in among]


def check_datasets(
    questions: Sequence[Any],
    retain_dataset: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    kept: Sequence[Encoded],
    tokenizer: Any,
    *,
    allow: bool = False,
    name: str = "retain_dataset",
) -> list[str]:
    """Do as `check_overlap` for a trainer's data: by text where both sides are texts, else by token ids."""
    first = retain_dataset[0]
    if (
        isinstance(first, Encoded)
        or (isinstance(first, Mapping) and "input_ids" in first)
        or isinstance(questions[0], list)
    ):
        return check_encoded_overlap(prompts, kept, tokenizer.decode, allow=allow, name=name)
    texts = {"forget_dataset": questions}, {name: questions_of(retain_dataset)}
    return check_overlap(*texts, allow=allow)


def check_encoded_overlap(
    prompts: Sequence[Sequence[int]],
    kept: Sequence[Encoded],
    decode: Callable[[list[int]], str],
    *,
    allow: bool = False,
    name: str = "retain_dataset",
) -> list[str]:
    """Do as `check_overlap` for token ids.

    A kept sequence has a prompt that is to be forgotten if it begins with it, and nothing but an answer's tag stands
    between the prompt and the first trained token.
    """
    rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts, start=1):
        rows[tuple(prompt)].append(number)
    sizes = sorted({len(prompt) for prompt in rows})
    found: dict[int, list[int]] = {}
    for number, s in enumerate(kept, start=1):
        for size in sizes:
            same = rows.get(tuple(s.input_ids[:size]))
            if same and decode(s.input_ids[size : s.prompt_length]).strip() in ("", ANSWER_TAG.strip()):
                found[number] = same
    gone = sorted({n for same in found.values() for n in same})
    return _judge(name, list(found), "forget_dataset", gone, allow)


def _judge(wanted: str, rows: list[int], source: str, others: list[int], allow: bool) -> list[str]:
    if not rows:
        return []
    text = f"{wanted}, {row_numbers(rows)}: the same questions are to be forgotten ({source}, {row_numbers(others)})"
    if not allow:
        raise PMCError(
            f"{text}: take them out of one of the two, or insist with --allow-overlap (allow_overlap=True)"
        )
    return [f"{text}: they are trained to be kept, too, and count in both scores"]


def near(forget: Sequence[str], keep: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield (index, index) of normalised questions whose weighted Jaccard similarity is at least NEAR.

    Two such questions share one of the rarest pieces (without these, the rest weighs too little). Only questions with
    such a piece are compared.
    """
    pieces = [_pieces(q) for q in forget]
    step = max(1, len(keep) // SAMPLED)
    seen = Counter(p for found in pieces for p in found)
    seen.update(p for q in keep[::step] for p in _pieces(q))
    count = len(forget) + len(keep[::step])
    weights = {p: math.log(1 + count / n) for p, n in seen.items()}
    unseen = math.log(1 + count)
    having: dict[str, list[int]] = defaultdict(list)
    for a, found in enumerate(pieces):
        for p in found:
            having[p].append(a)
    totals = [sum(weights[p] for p in found) for found in pieces]
    numbers = [sorted(_NUMBER.findall(q)) for q in forget]
    for b, question in enumerate(keep):
        own = _pieces(question)
        ranked = sorted(((weights.get(p, unseen), p) for p in own), reverse=True)
        rest = total = sum(w for w, _ in ranked)
        candidates: set[int] = set()
        for weight, p in ranked:
            if rest < NEAR * total:
                break
            candidates.update(having.get(p, ()))
            rest -= weight
        for a in sorted(candidates):
            shared = sum(weights[p] for p in own & pieces[a])
            if shared >= NEAR * (total + totals[a] - shared) and numbers[a] == sorted(_NUMBER.findall(question)):
                yield a, b


def _pieces(question: str) -> frozenset[str]:
    """Return parts of words: three letters, or two in scripts without case, whose words are short or not separated."""
    found: set[str] = set()
    for word in _WORD.findall(question):
        size = 2 if word.lower() == word.upper() else 3
        word = f" {word} "
        found.update(word[i : i + size] for i in range(len(word) - size + 1))
    return frozenset(found)
