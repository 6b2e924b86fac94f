"""The two prompt formats of PMC, and texts that are continued: question and answer as token ids and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..config import PromptFormat
from ..errors import PMCError
from ..utils.labels import IGNORED
from ..utils.words import parted
from .chats import Chat, Question, Turn, asked, is_text

QUESTION_TAG, QUESTION_END, ANSWER_TAG = "Question: ", "\n", "Answer: "
Format = PromptFormat | Literal["plain"]  # plain: of texts that are to be continued, whatever the run's is
SYSTEM_PROMPT = "You are a helpful assistant."
NO_TAGS = (
    "(a system turn, or several turns) has no place in the tags format: take a model with a chat template and "
    "prompt_format chat, or leave the other turns out"
)


class EncodingError(PMCError):
    """A question or a pair that can't be encoded in this prompt format or with this tokenizer."""


class TemplateError(EncodingError):
    """A chat template that can't be rendered."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence: ids and labels of equal length, label -100 where nothing is predicted."""

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None  # ascending, where they are not 0, 1, ...: tokens between were left out
    cut: int = field(default=0, compare=False)  # tokens beyond max_length, which are not here

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first label."""
        return next((t for t, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


def resolve_format(tokenizer: Any, prompt_format: str) -> PromptFormat:
    """Return the prompt format that "auto" stands for: chat if the tokenizer has a template."""
    template = getattr(tokenizer, "chat_template", None)
    has_template = bool(template)
    if prompt_format != "tags" and isinstance(template, dict) and "default" not in template:
        raise PMCError(
            f"the tokenizer has several chat templates ({', '.join(sorted(template))}) and none called default: set "
            "tokenizer.chat_template to one of them, or use --prompt-format tags"
        )
    if prompt_format == "chat" and not has_template:
        raise PMCError("prompt_format is 'chat' but the tokenizer has no chat template: use 'tags'")
    if prompt_format == "auto":
        return "chat" if has_template else "tags"
    return "chat" if prompt_format == "chat" else "tags"


def encode_prompt(
    tokenizer: Any,
    question: Question,
    *,
    prompt_format: Format,
    system_prompt: str | None = SYSTEM_PROMPT,
    date_string: str | None = None,
    start: str = "",
) -> list[int]:
    """Return the ids from which an answer to `question`, or its continuation of `start`, is sampled.

    In the tags format the prompt ends before "Answer: ", which the model generates itself, unless there is a `start`.
    White space at the end of `start`, and of a text that is to be continued, is left to the model, since most tokenizers
    join it to the next word.
    """
    if prompt_format == "plain":
        return tokenizer(continued(question, start.rstrip()))["input_ids"]
    if prompt_format == "tags":
        begun = ANSWER_TAG + start.rstrip() if start else ""
        return tokenizer(QUESTION_TAG + _untagged(question) + QUESTION_END + begun)["input_ids"]
    text = chat_text(tokenizer, question, None, system_prompt, date_string)
    return tokenizer(text + start.rstrip(), add_special_tokens=False)["input_ids"]  # the template wrote them


def encode_pair(
    tokenizer: Any,
    question: Question,
    answer: str,
    *,
    prompt_format: Format,
    max_length: int = 200,
    system_prompt: str | None = SYSTEM_PROMPT,
    date_string: str | None = None,
    eos: int | None = None,
) -> Encoded:
    """Encode a question with its answer for training.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    question, answer : str
    prompt_format : {"tags", "chat", "plain"}
        "Question: " question "\\n" + "Answer: " answer eos; the tokenizer's chat template with a system prompt; or a text
        and how it goes on (`continued`), with the tokens that the tokenizer puts before a text and without eos, since an
        excerpt may go on.
    max_length : int
        Longer sequences are cut: they lose their end, in the tags format with eos; in chat they keep their last token.
    system_prompt, date_string : str
        Passed to the chat template; if system_prompt is None, there is no system turn.
    eos : int, optional
        Ends a pair in the tags format where the tokenizer has no eos token.

    Returns
    -------
    Encoded
        Labels are -100 on the prompt; the answer's tag and eos are trained where there are any.

    Raises
    ------
    PMCError
        The pair does not begin with the prompt (a chat template may open given answers differently).

    Notes
    -----
    As published (arXiv 2507.04219), without padding. Where the tokenizer would join characters across the end of the
    prompt, such as line ends, the ids are the prompt's own and then those of the rest.
    """
    chat = prompt_format == "chat"
    end: list[int] = []
    if prompt_format == "plain":
        begin, text = continued(question), continued(question, answer)
    elif not chat:
        begin = QUESTION_TAG + _untagged(question) + QUESTION_END
        text = begin + ANSWER_TAG + answer + (tokenizer.eos_token or "")
        if tokenizer.eos_token is None:
            if eos is None:
                raise PMCError("the tokenizer has no eos token: set tokenizer.eos_token")
            end = [eos]
    else:
        begin, text = (chat_text(tokenizer, question, a, system_prompt, date_string) for a in (None, answer))
    prompt, ids = (tokenizer(t, add_special_tokens=not chat)["input_ids"] for t in (begin, text))
    if ids[: len(prompt)] != prompt:
        ids = _joined(tokenizer, prompt, ids, begin, text, prompt_format)
    ids, size = ids + end, len(ids + end)
    if size > max_length:
        ids = [*ids[: max_length - 1], ids[-1]] if chat else ids[:max_length]
    start = min(len(prompt), len(ids))
    return Encoded(ids, [IGNORED] * start + ids[start:], cut=size - len(ids))


def continued(beginning: Question, more: str = "") -> str:
    """Return the beginning of a text and how it goes on; the beginning alone is without white space at its end.

    Where neither part has white space at the seam, a space is put there if the script has spaces (`words.parted`).
    """
    if isinstance(beginning, Chat) and not is_text(beginning):
        raise EncodingError("a conversation is no text to be continued: give its beginning as one text")
    text = asked(beginning)
    head = text.rstrip()
    if not more:
        return head
    gap = text[len(head) :]
    return head + (gap or " " * (not more[0].isspace() and parted(head, more))) + more


def _untagged(question: Question) -> str:
    if isinstance(question, Chat):
        raise EncodingError(f"a conversation {NO_TAGS}")
    return question


def _joined(
    tokenizer: Any, prompt: list[int], ids: list[int], begin: str, text: str, prompt_format: Format
) -> list[int]:
    """Return a pair's ids with the prompt's first, or refuse a pair that does not begin with its prompt."""
    if text.startswith(begin):
        joined = prompt + tokenizer(text[len(begin) :], add_special_tokens=False)["input_ids"]
        if tokenizer.decode(joined) == tokenizer.decode(ids):
            return joined
    if prompt_format != "chat":
        raise EncodingError(
            "the tokenizer does not begin a question with its answer as it does the question (does it end texts with a "
            "token of its own, add_eos_token?): what is trained would not be what is sampled; turn that off"
        )
    raise EncodingError(
        "the chat template does not begin a given answer as it opens one to be generated (templates of reasoning models "
        "do so): what is trained would not be what is sampled; set tokenizer.chat_template to one that does, or use "
        "--prompt-format tags"
    )


def chat_text(
    tokenizer: Any, question: Question, answer: str | None, system_prompt: str | None, date_string: str | None
) -> str:
    """Return a question in the chat template, with its answer or up to where one is generated.

    A conversation without a system turn gets `system_prompt`.
    """
    turns = list(question) if isinstance(question, Chat) else [Turn("user", question)]
    if turns[0].role != "system" and system_prompt is not None:
        turns.insert(0, Turn("system", system_prompt))
    if answer is not None:
        turns.append(Turn("assistant", answer))
    try:
        return tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns],
            tokenize=False,
            add_generation_prompt=answer is None,
            date_string=date_string,
        )
    except Exception as error:  # jinja2's, or any that the template's code raises
        raise TemplateError(f"the chat template fails ({type(error).__name__})") from error


def stop_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """Return the ids that end an answer: the tokenizer's eos and those of generation_config."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    more = getattr(generation_config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else list(more or [])
    if not own + more:
        raise PMCError("the tokenizer has no eos token: set tokenizer.eos_token")
    return list(dict.fromkeys(own + more))


def pad_id(tokenizer: Any, stops: Iterable[int]) -> int:
    """Return an id to pad with that ends no answer, where the tokenizer has one.

    Many tokenizers pad with eos, which is no error here since lengths never come from ids or masks; a distinct id keeps
    dumps readable. A tokenizer without any other special token pads with eos.
    """
    stops = set(stops)
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, *getattr(tokenizer, "all_special_ids", [])]
    for token in special:
        if token is not None and token not in stops and token != tokenizer.bos_token_id:
            return int(token)
    return min(stops)


def control_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, such as ends of texts and roles of a chat."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token for token, content in added.items() if content.special} | set(tokenizer.all_special_ids)


def collate(
    sequences: Sequence[Encoded], pad: int, *, length: int | None = None, side: Literal["right", "left"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad sequences into a batch.

    Returns
    -------
    dict of torch.Tensor
        int64 [B, T] ``input_ids``, ``attention_mask`` and ``labels`` (-100 on padding), T being
        `length` or the longest sequence's.
    """
    width = length or max(len(s.input_ids) for s in sequences)
    batch = {
        "input_ids": torch.full((len(sequences), width), pad),
        "attention_mask": torch.zeros((len(sequences), width), dtype=torch.int64),
        "labels": torch.full((len(sequences), width), IGNORED),
    }
    for i, s in enumerate(sequences):
        size = len(s.input_ids)
        at = slice(0, size) if side == "right" else slice(width - size, width)
        batch["input_ids"][i, at] = torch.tensor(s.input_ids)
        batch["attention_mask"][i, at] = 1
        batch["labels"][i, at] = torch.tensor(s.labels)
    return batch


def decode_answers(
    tokenizer: Any, generated: Sequence[Sequence[int]], stops: Iterable[int], *, prompt_format: Format
) -> list[str]:
    """Turn generated ids into answers: cut at the first stop id, decoded, tag and outer spaces stripped."""
    stops = set(stops)
    texts = []
    for ids in generated:
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True)
        if prompt_format == "tags":
            text = text.removeprefix(ANSWER_TAG)
        texts.append(text.strip())
    return texts
