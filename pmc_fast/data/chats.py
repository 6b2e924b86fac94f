"""Conversations and their turns, in the forms of data sets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import PMCError
from ..utils.text import names

TEXT = "text"  # the role of a text that is to be continued
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str  # "system", "user" or "assistant"; TEXT in a question of this turn alone
    content: str


class Chat(tuple[Turn, ...]):
    """A question with a system turn or earlier turns, or a text to be continued. As JSON it is a list of [role, content]."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(f"{role}: {content}" for role, content in self)

    @property
    def asked(self) -> str:
        """The text without the system turn; of a single turn, its content alone."""
        turns = [turn for turn in self if turn.role != "system"]
        return turns[0].content if len(turns) == 1 else str(Chat(turns))


Question = str | Chat


def text_to_continue(beginning: str) -> Chat:
    """Return the question that stands for the beginning of a text: it is put into no template, and sampled from as it is."""
    return Chat((Turn(TEXT, beginning),))


def is_text(question: Any) -> bool:
    """Return whether a question is a text to be continued."""
    return isinstance(question, Chat) and question[0].role == TEXT


def question_of(turns: Sequence[Turn]) -> Question:
    """Return the turns before an answer as a question; a single user's turn becomes its text."""
    return turns[0].content if len(turns) == 1 and turns[0].role == "user" else Chat(turns)


def asked(question: Question) -> str:
    """Return a question's text without its system turn."""
    return question if isinstance(question, str) else question.asked


def with_words(question: Question, change: Callable[[str], str]) -> Question:
    """Return a question whose words were changed: of a conversation those of its last turn."""
    if isinstance(question, str):
        return change(question)
    return Chat((*question[:-1], question[-1]._replace(content=change(question[-1].content))))


def split_chat(messages: Sequence[Any], where: str, *, answers: bool = True) -> tuple[list[Turn], str | None]:
    """Return the turns before the answer, and the answer: the last turn, if it is the assistant's.

    Parameters
    ----------
    messages : sequence
        Objects with role and content (or from and value), or pairs of role and content.
    where : str
        Names the row in errors.
    answers : bool
        If false, the answer is not read.

    Raises
    ------
    PMCError
        A turn of a tool or another role, or one that is not text; an assistant's turn that follows no user's.
    """
    if len(messages) == 1 and _is_pair(messages[0]) and messages[0][0] == TEXT:  # as a Chat is written
        return [Turn(TEXT, _content(messages[0], f"{where}, turn 1"))], None
    roles = [_role(message, f"{where}, turn {number}") for number, message in enumerate(messages, start=1)]
    if "system" in roles[1:]:
        raise PMCError(f"{where}, turn {roles.index('system', 1) + 1} is a system turn: it must be the first one")
    answered = roles[-1] == "assistant"
    count = len(roles) - answered
    turns = [Turn(role, _content(messages[i], f"{where}, turn {i + 1}")) for i, role in enumerate(roles[:count])]
    answer = _content(messages[count], f"{where}, turn {count + 1}") if answered and answers else None
    if turns and turns[-1].role != "user":
        asks = "is followed by no user's turn" if count == len(roles) else "stands where a user's turn must ask"
        raise PMCError(f"{where}, turn {count} is the {turns[-1].role}'s and {asks}: there is no question to answer")
    return turns, answer


def _role(message: Any, where: str) -> str:
    role = message[0] if _is_pair(message) else None
    if isinstance(message, Mapping):
        role = message.get("role", message.get("from"))
    if isinstance(role, str) and role in ROLES:
        return ROLES[role]
    if not isinstance(message, Mapping) or not isinstance(role, str):
        raise PMCError(f"{where} has no role: a message is an object with role and content")
    raise PMCError(f"{where} has the role {names([role])}: only system, user and assistant turns are supported yet")


def _is_pair(message: Any) -> bool:
    return isinstance(message, (list, tuple)) and len(message) == 2


def _content(message: Any, where: str) -> str:
    if _is_pair(message):
        content = message[1]
    else:
        more = [n for n in message if n not in ("role", "content", "from", "value") and not is_missing(message[n])]
        if more:
            raise PMCError(f"{where} has {names(more)} beside its text, which would be lost: leave it out")
        content = message["content"] if "content" in message else message.get("value")
    if isinstance(content, (list, tuple)):  # parts, as multimodal chats have
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise PMCError(f"{where} has a part that is {names(other[:1])}: only text is supported")
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str):
        raise PMCError(f"{where} has a content that is {type(content).__name__}, not text")
    return content


def is_missing(value: Any) -> bool:
    """Return whether a value is missing: null, NaN, empty, or an object that Arrow filled with nulls."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, Mapping):
        return all(v is None for v in value.values())
    return isinstance(value, (str, list, tuple)) and not value
