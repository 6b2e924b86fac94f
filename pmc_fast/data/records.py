"""Questions and answers from the columns of a data set's rows, under the names that are in use."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PMCError
from ..utils.text import names, row_numbers
from ..utils.words import count_words, end_of_words
from .chats import Question, Turn, asked, is_missing, is_text, question_of, split_chat, text_to_continue
from .columns import (
    ANSWER_NAMES,
    CHAT_NAMES,
    CHOICE_NAMES,
    CONTEXT_NAMES,
    LETTERS,
    MAYBE_ANSWERS,
    NOT_SERVED,
    OTHER_ANSWERS,
    QUESTION_NAMES,
    SYSTEM_NAMES,
    Columns,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A question and, where the data has one, its answer."""

    question: Question
    answer: str | None = None


def rows_of(
    records: Iterable[Any],
    source: str,
    *,
    answers: bool | None = False,
    paraphrased: bool = False,
    columns: Mapping[str, str] | None = None,
    prompt_words: int = 0,
) -> list[Row]:
    """Read rows from records in memory, such as a datasets.Dataset; `source` names them in errors.

    If `answers` is None, no answer is read. For the rest see `load_rows`.
    """
    if not isinstance(prompt_words, int) or isinstance(prompt_words, bool) or prompt_words < 0:
        raise PMCError(f"prompt_words is {prompt_words!r}: it must be 0 or more")
    rows: list[Row] = []
    short: list[int] = []
    last: Mapping[str, Any] = {}
    named = Columns(columns)
    for number, record in enumerate(records, start=1):
        where = f"{source}, row {number}"
        if isinstance(record, str):  # MUSE's raw texts are such lists
            if not prompt_words:
                raise PMCError(
                    f"{where} is str, not an object with a question: to have a list of texts continued, give --prompt-words 32"
                )
            record = {"text": record}
        if not isinstance(record, Mapping):
            raise PMCError(f"{where} is {type(record).__name__}, not an object with a question")
        last = record
        read = _Record(named.known(record, where), where, paraphrased, prompt_words)
        try:
            row = read.row(answered=answers is not None)
        except PMCError:
            named.check_has(where, record)  # a column that the row lacks explains more
            raise
        for text in (str(row.question), row.answer or ""):
            if not _is_unicode(text):
                raise PMCError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff): fix its encoding")
        if not (asked(row.question) if is_text(row.question) else str(row.question)).strip():
            raise named.no_question(where, record)
        if read.too_short:
            short.append(number)
        elif answers and (row.answer is None or not row.answer.strip()):
            raise PMCError(
                f"{where} has no answer: name the column one of {', '.join(ANSWER_NAMES)}, or give --columns answer=NAME (it "
                f"has {names(record)})"
            )
        rows.append(row)
    if short:
        raise PMCError(
            f"{source}, {row_numbers(short)}: no word is left that could be the answer, how the text goes on (prompt_words "
            f"{prompt_words}): lower --prompt-words or leave the row out"
        )
    if rows:
        named.check_seen(source, last)
    return rows


class _Record:
    """One row's columns."""

    def __init__(
        self, record: Mapping[str, Any], where: str, paraphrased: bool = False, prompt_words: int = 0
    ) -> None:
        self.record, self.where, self.prompt_words = record, where, prompt_words
        self.too_short = False  # a text of no more than prompt_words words
        self.questions = ("paraphrased_question",) * paraphrased + QUESTION_NAMES
        self.answers = ("paraphrased_answer",) * paraphrased + ANSWER_NAMES

    def row(self, *, answered: bool) -> Row:
        """Return the row, with its answer if `answered`."""
        if found := [name for name in NOT_SERVED if self.has(name)]:
            raise PMCError(f"{self.where} has {found[0]}, which are not supported: leave the column out")
        if (text := self.text_row(answered)) is not None:
            return text
        name, chat = self.one_of(self.questions), self.one_of(CHAT_NAMES)
        source = chat or name
        if source is None:
            return Row("")
        options: list[tuple[str, str]] = []
        messages: list[Any] = []
        if chat or isinstance(self.record[source], (list, tuple)):
            messages = self.messages(source)
        else:
            options = self.options()
            messages = [Turn("user", self.asked(source, options))]
        reply = self.one_of(self.answers) if answered else None
        if reply and _are_messages(self.record[reply]):
            messages, reply = [*messages, *self.record[reply]], None
        turns, answer = split_chat(messages, self.where, answers=answered)
        if chat and name and self.record[name] not in [turn.content for turn in turns]:
            raise PMCError(f"{self.where} has both {chat} and {name}: leave out what is not meant")
        if reply and answer is not None:
            raise PMCError(f"{self.where} has an answer in {source} and in {reply}: leave out what is not meant")
        if answered and answer is None:
            answer = self.choice(options, reply) if options else self.answer(reply)
            if answer is None and (maybe := [name for name in MAYBE_ANSWERS if self.has(name)]):
                raise PMCError(
                    f"{self.where} has {maybe[0]} and no answer: if that is the answer, call the column answer or give "
                    f"--columns answer={maybe[0]}, else leave it out"
                )
        return Row(question_of(self.with_system(turns)), answer)

    def text_row(self, answered: bool) -> Row | None:
        """Return the row of a text that is to be continued, if it is one."""
        goes_on: tuple[str, ...]
        if self.has("beginning"):
            begins, goes_on = "beginning", ("continuation", *ANSWER_NAMES)
        elif set(self.record) == {"prompt", "gt"} and self.has(
            "prompt"
        ):  # MUSE's verbmem; with other columns it may be anything
            begins, goes_on = "prompt", ("gt",)
        elif self.prompt_words and self.has("text"):
            begins, goes_on = "text", ()
        else:
            return None
        others = (*self.questions, *CHAT_NAMES, *CONTEXT_NAMES, *CHOICE_NAMES, *SYSTEM_NAMES, "beginning", "text")
        others += () if goes_on else ANSWER_NAMES
        if more := [name for name in others if self.has(name) and name != begins]:
            split = ", which --prompt-words splits" if begins == "text" else ""
            raise PMCError(f"{self.where} has {begins}{split}, and {more[0]}: leave out what is not meant")
        text = self.text(begins)
        if goes_on:
            reply = self.one_of(goes_on) if answered else None
            return Row(text_to_continue(text), self.answer(reply) if reply else None)
        end = end_of_words(text, self.prompt_words)
        self.too_short = not count_words(text[end:])
        return Row(text_to_continue(text[:end]), text[end:])

    def has(self, name: str) -> bool:
        return name in self.record and not is_missing(self.record[name])

    def one_of(self, names: tuple[str, ...]) -> str | None:
        """Return the first of these columns that the row has; refuse others with another value."""
        found = [name for name in names if self.has(name)]
        if found and not found[0].startswith("paraphrased_"):
            for other in found[1:]:
                if self.record[other] != self.record[found[0]]:
                    raise PMCError(f"{self.where} has both {found[0]} and {other}: leave out what is not meant")
        return found[0] if found else None

    def text(self, name: str) -> str:
        value = self.record[name]
        if not isinstance(value, str):
            hint = ""
            if name in self.questions and isinstance(value, (list, Mapping)):
                hint = " (of columns in place of rows, make rows)"
            raise PMCError(f"{self.where}: {name} is {type(value).__name__}, not text{hint}")
        return value

    def messages(self, source: str) -> list[Any]:
        """Return the turns in a column; refuse a row whose other columns would belong into them."""
        value = self.record[source]
        if not _are_messages(value):
            what = (
                f"a list of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) else type(value).__name__
            )
            wanted = "one text (of columns in place of rows, make rows)" if source in self.questions else "messages"
            raise PMCError(f"{self.where}: {source} is {what}, not {wanted}")
        if more := [name for name in (*CONTEXT_NAMES, *CHOICE_NAMES) if self.has(name)]:
            raise PMCError(f"{self.where} has {source} and {more[0]}: put that into the turn it belongs to")
        return list(value)

    def with_system(self, turns: list[Turn]) -> list[Turn]:
        name = self.one_of(SYSTEM_NAMES)
        if name is None or turns[0] == Turn("system", self.text(name)):
            return turns
        if turns[0].role == "system":
            raise PMCError(f"{self.where} has a system turn and another text in {name}: leave out what is not meant")
        return [Turn("system", self.text(name)), *turns]

    def asked(self, source: str, options: list[tuple[str, str]]) -> str:
        """Return a question with its choices and its context (Alpaca's input; Dolly's and SQuAD's context)."""
        text = "\n".join([self.text(source), *(f"{label}. {option}" for label, option in options)])
        name = self.one_of(CONTEXT_NAMES)
        if name is None:
            return text
        after = source == "instruction" or name == "input"
        return f"{text}\n\n{self.text(name)}" if after else f"{self.text(name)}\n\n{text}"

    def options(self) -> list[tuple[str, str]]:
        """Return the labels and texts of a multiple-choice question in the forms of MMLU, ARC and MedQA."""
        name = self.one_of(CHOICE_NAMES)
        if name is None:
            letters = [letter for letter in LETTERS if self.has(letter)]
            return [(letter, self.text(letter)) for letter in letters] if letters[:2] == ["A", "B"] else []
        value = self.record[name]
        if isinstance(value, Mapping) and {"label", "text"} <= set(value):
            labels, texts = value["label"], value["text"]
        elif isinstance(value, Mapping):
            labels, texts = list(value), list(value.values())
        else:
            labels, texts = LETTERS[: len(value)], value
        lists = isinstance(texts, (list, tuple)) and len(texts) == len(labels)
        if not lists or not all(isinstance(text, str) for text in (*labels, *texts)):
            raise PMCError(f"{self.where}: {name} is not a list of texts")
        return list(zip(labels, texts, strict=True))

    def choice(self, options: list[tuple[str, str]], reply: str | None) -> str | None:
        """Return the choice that is the answer, which the row gives by index from 0, label or text."""
        reply = reply or ("answerKey" if self.has("answerKey") else None)
        if reply is None:
            return None
        value = self.record[reply]
        if isinstance(value, int) and not isinstance(value, bool):
            picked = [i for i in range(len(options)) if i == value]
        else:
            picked = [i for i, option in enumerate(options) if isinstance(value, str) and value.strip() in option]
        if len(picked) != 1:
            raise PMCError(
                f"{self.where}: {reply} is none of the {len(options)} choices, or not one alone: give its label, its "
                "text or its index from 0"
            )
        label, text = options[picked[0]]
        return f"{label}. {text}"

    def answer(self, reply: str | None) -> str | None:
        others = [name for name in OTHER_ANSWERS if self.has(name)]
        if others and (reply is None or self.record[others[0]] != self.record[reply]):
            which = f" beside {reply}" if reply else ""
            goes_on = ""
            if others[0] == "gt" and self.has("prompt"):
                goes_on = (
                    "; if it goes on with the prompt, as MUSE's does, --columns beginning=prompt,continuation=gt"
                )
            raise PMCError(
                f"{self.where} has {others[0]}{which}: if that is the answer, call the column answer or give --columns "
                f"answer={others[0]}{goes_on}; else leave it out"
            )
        if reply is None:
            return None
        value = self.record[reply]
        if isinstance(value, Mapping) and ("text" in value or "value" in value):
            value = value["value"] if "value" in value else value["text"]  # TriviaQA's; SQuAD's
            value = value[:1] if isinstance(value, list) else value  # what others wrote for the same
        if isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
            if len(set(value)) > 1:
                raise PMCError(f"{self.where}: {reply} holds {len(value)} answers: give one")
            value = value[0] if value else None
        return None if is_missing(value) else _Record({reply: value}, self.where).text(reply)


def _are_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and not isinstance(value[0], str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
