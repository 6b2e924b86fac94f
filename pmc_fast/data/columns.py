"""Columns by what they hold: the names that are in use, and those that a user gives."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import COLUMN_NAMES
from ..errors import PMCError
from ..utils.text import names
from .chats import is_missing

QUESTION_NAMES = ("question", "prompt", "query", "instruction")
ANSWER_NAMES = ("answer", "response", "completion", "output", "answers")  # the last one is SQuAD's
CHAT_NAMES = ("messages", "conversations")
CONTEXT_NAMES = ("input", "context", "passage")
SYSTEM_NAMES = ("system", "system_prompt")
CHOICE_NAMES = ("choices", "options")
OTHER_ANSWERS = ("truth", "gt", "ground_truth", "best_answer", "answerKey")  # refused with a question, never guessed
# likewise, but not where there is an answer: then they are something else, such as a class
MAYBE_ANSWERS = (
    "target", "label", "reference", "reference_answer", "solution", "expected", "expected_output", "expected_answer",
    "gold", "correct_answer", "reply", "chosen", "continuation",
)  # fmt: skip
NOT_SERVED = ("tools", "functions", "history", "chat_template_kwargs", "images", "image", "videos", "audio")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
PARAPHRASES = ("paraphrased_question", "paraphrased_answer")
KNOWN = {
    name.casefold(): name
    for name in (
        *PARAPHRASES, *QUESTION_NAMES, *ANSWER_NAMES, *CHAT_NAMES, *CONTEXT_NAMES, *SYSTEM_NAMES, *CHOICE_NAMES,
        *OTHER_ANSWERS, *MAYBE_ANSWERS, *NOT_SERVED, "beginning", "text",
    )
}  # fmt: skip
# the columns that one which the user names stands for: a row that has them beside it is not asked which one is meant
STANDS_FOR: dict[str, tuple[str, ...]] = {name: (name,) for name in COLUMN_NAMES} | {
    "question": QUESTION_NAMES,
    "answer": (*ANSWER_NAMES, *OTHER_ANSWERS, *MAYBE_ANSWERS),
    "context": CONTEXT_NAMES,
    "choices": (*CHOICE_NAMES, *LETTERS),
    "system": SYSTEM_NAMES,
    "messages": CHAT_NAMES,
}
ASKS = (
    "question",
    "messages",
    "beginning",
    "text",
    "paraphrased_question",
)  # without one of these a row asks nothing
HEADERS = frozenset((*QUESTION_NAMES, *CHAT_NAMES, *ASKS))


class Columns:
    """Which of a data set's columns hold what: the user's word before the usual names.

    Parameters
    ----------
    given : mapping of str to str, optional
        Columns by what they hold (`COLUMN_NAMES`), such as ``{"question": "frage"}``.
    """

    def __init__(self, given: Mapping[str, str] | None = None) -> None:
        given = {} if given is None else given
        if not isinstance(given, Mapping) or not all(isinstance(c, str) for c in given.values()):
            raise PMCError(f"columns is {given!r}: it must be a dict of names, such as {{'question': 'frage'}}")
        if unknown := [name for name in given if name not in COLUMN_NAMES]:
            raise PMCError(f"columns has {unknown[0]!r}: give one of {', '.join(COLUMN_NAMES)}")
        self.given = {name: column.strip() for name, column in given.items()}
        self._unseen = dict(self.given)

    def known(self, record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """Return a row with known names for its columns: " Answer" becomes answer, which would otherwise not be read."""
        written = {given: known_name(given) for given in record}
        used: dict[str, str] = {}  # columns of the row by what the user says that they hold
        for name, column in self.given.items():
            if (found := _find(column, record)) is not None:
                used[name] = found
                self._unseen.pop(name, None)
        if not self.given and all(given == name for given, name in written.items()):
            return record
        gone = {other for name in self.given for other in STANDS_FOR[name]}  # also where this row lacks the column
        known: dict[str, Any] = {}
        for given, name in written.items():
            value = record[given]
            if given in used.values() or name in gone:
                continue
            if name in known and not is_missing(value) and not is_missing(known[name]) and value != known[name]:
                raise PMCError(f"{where} has {name} twice, written in two ways: leave out what is not meant")
            if name not in known or is_missing(known[name]):
                known[name] = value
        return known | {name: record[column] for name, column in used.items()}

    def check_seen(self, source: str, record: Mapping[str, Any]) -> None:
        """Refuse a column that no row had; `record` is one of the rows."""
        self._refuse(self._unseen, source, record)

    def check_has(self, where: str, record: Mapping[str, Any]) -> None:
        """Refuse a row that lacks a column."""
        self._refuse([name for name, column in self.given.items() if _find(column, record) is None], where, record)

    def _refuse(self, lacking: Iterable[str], where: str, record: Mapping[str, Any]) -> None:
        for name in lacking:
            raise PMCError(
                f"{where} has no column {self.given[name]!r}, which columns names for {name}: it has {names(record)}"
            )

    def no_question(self, where: str, record: Mapping[str, Any]) -> PMCError:
        """Return the error for a row that asks nothing: what it has, and what to do."""
        said = [f"{name} from {self.given[name]!r}" for name in ASKS if name in self.given]
        if said:
            remedy = f"columns takes {' and '.join(said)} (for FORGET's rows alone: forget.question=NAME)"
        else:
            remedy = f"name the column one of {', '.join(QUESTION_NAMES)}, or give --columns question=NAME"
            if "text" in record:
                remedy += ", or --prompt-words 32 to have the text continued"
        return PMCError(f"{where} has no question: {remedy} (it has {names(record)})")

    def check_header(self, header: Sequence[str], delimiter: str) -> None:
        """Refuse the first line of a table if it names no column that asks anything, or one twice.

        Raises
        ------
        ValueError
            Its columns are named if all look like names: a table without such a line begins with texts.
        """
        asks = {known_name(name) for name in header} & HEADERS
        asks |= {name for name in ASKS if name in self.given and _find(self.given[name], header) is not None}
        if len(set(header)) == len(header) and (asks or not header):
            return
        found = names(header)
        shown = "" if not header or "not shown" in found else f"; it has {found} (or give --columns question=NAME)"
        raise ValueError(
            f"the first line must name the columns, each once, separated by {delimiter!r}, one of them "
            f"{self.given.get('question', QUESTION_NAMES[0])}{shown}"
        )


def known_name(given: Any) -> Any:
    """Return the known name of a column, whatever its case and the spaces around it."""
    return KNOWN.get(given.strip().casefold(), given) if isinstance(given, str) else given


def _find(column: str, names: Any) -> str | None:
    """Return the name among `names` that is a column's, whatever its case and the spaces around it if none is the same."""
    if column in names:
        return column
    alike = [n for n in names if isinstance(n, str) and n.strip().casefold() == column.casefold()]
    return alike[0] if len(alike) == 1 else None
