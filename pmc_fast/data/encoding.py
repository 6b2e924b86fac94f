"""The two prompt formats of PMC: question and answer as token ids and labels."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import PMCConfig, PromptFormat
from ..errors import PMCError
from .chats import Chat, Question, Turn

QUESTION_TAG, QUESTION_END, ANSWER_TAG = "Question: ", "\n", "Answer: "
SYSTEM_PROMPT = "You are a helpful assistant."
_NO_TAGS = (
    "(a system turn, or several turns) has no place in the tags format: take a model with a chat template and "
    "prompt_format chat, or leave the other turns out"
)
IGNORED = -100  # the label of a token that is not trained


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence: ids and labels of equal length, label -100 where nothing is predicted."""

    input_ids: list[int]
    labels: list[int]
    positions: list[int] | None = None  # ascending, where they are not 0, 1, ...: tokens between were left out


def resolve_format(tokenizer: Any, prompt_format: str) -> PromptFormat:
    """Return the prompt format that "auto" stands for: chat if the tokenizer has a template."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if prompt_format == "chat" and not has_template:
        raise PMCError("prompt_format is 'chat' but the tokenizer has no chat template: use 'tags'")
    if prompt_format == "auto":
        return "chat" if has_template else "tags"
    return "chat" if prompt_format == "chat" else "tags"


def encode_prompt(
    tokenizer: Any,
    question: Question,
    *,
    prompt_format: PromptFormat,
    system_prompt: str = SYSTEM_PROMPT,
    date_string: str | None = None,
    start: str = "",
) -> list[int]:
    """Return the ids from which an answer to `question` is sampled, or goes on after the words `start`.

    In the tags format the prompt ends before "Answer: ": the model writes the tag itself. With a `start` the tag is
    there. White space at the end of `start` is left to the model: most tokenizers join it to the next word.
    """
    if prompt_format == "tags":
        if isinstance(question, Chat):
            raise PMCError(f"a conversation {_NO_TAGS}")
        begun = ANSWER_TAG + start.rstrip() if start else ""
        return tokenizer(QUESTION_TAG + question + QUESTION_END + begun)["input_ids"]
    if start:
        text = _chat_text(tokenizer, question, system_prompt, date_string) + start.rstrip()
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them
    return _chat(tokenizer, question, None, system_prompt, date_string)


def encode_pair(
    tokenizer: Any,
    question: Question,
    answer: str,
    *,
    prompt_format: PromptFormat,
    max_length: int = 200,
    system_prompt: str = SYSTEM_PROMPT,
    date_string: str | None = None,
) -> Encoded:
    """Encode a question with its answer for training.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; it is not changed.
    question, answer : str
        The pair, without tags.
    prompt_format : {"tags", "chat"}
        "Question: " question "\\n" + "Answer: " answer eos, or the tokenizer's chat template with
        a system prompt.
    max_length : int
        Longer sequences are cut: tags lose their tail and with it eos, chat keeps its final token.
    system_prompt, date_string : str
        Passed to the chat template.

    Returns
    -------
    Encoded
        Labels are -100 on the prompt. The answer's tag and eos are trained.

    Notes
    -----
    As the published code encodes (arXiv 2507.04219); padding is left to `collate`.
    """
    prompt = encode_prompt(
        tokenizer,
        question,
        prompt_format=prompt_format,
        system_prompt=system_prompt,
        date_string=date_string,
    )
    if prompt_format == "tags":
        text = QUESTION_TAG + str(question) + QUESTION_END + ANSWER_TAG + answer + tokenizer.eos_token
        ids = tokenizer(text)["input_ids"][:max_length]
    else:
        ids = _chat(tokenizer, question, answer, system_prompt, date_string)
        if len(ids) > max_length:
            ids = [*ids[: max_length - 1], ids[-1]]
    start = min(len(prompt), len(ids))
    return Encoded(ids, [IGNORED] * start + ids[start:])


def _chat(
    tokenizer: Any, question: Question, answer: str | None, system_prompt: str, date_string: str | None
) -> list[int]:
    return tokenizer.apply_chat_template(
        _messages(question, answer, system_prompt),
        tokenize=True,
        return_dict=False,
        add_generation_prompt=answer is None,
        date_string=date_string,
    )


def _messages(question: Question, answer: str | None, system_prompt: str) -> list[dict[str, str]]:
    """Return a conversation as templates take it; one without a system turn of its own gets the run's."""
    turns = list(question) if isinstance(question, Chat) else [Turn("user", question)]
    if turns[0].role != "system":
        turns.insert(0, Turn("system", system_prompt))
    if answer is not None:
        turns.append(Turn("assistant", answer))
    return [turn._asdict() for turn in turns]


def _chat_text(tokenizer: Any, question: Question, system_prompt: str, date_string: str | None) -> str:
    return tokenizer.apply_chat_template(
        _messages(question, None, system_prompt), tokenize=False, add_generation_prompt=True, date_string=date_string
    )


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

    Many tokenizers pad with eos. Lengths here never come from ids or masks, so that is no error;
    a distinct id only keeps dumps readable. One without any other special token pads with eos.
    """
    stops = set(stops)
    special = [tokenizer.pad_token_id, tokenizer.unk_token_id, *getattr(tokenizer, "all_special_ids", [])]
    for token in special:
        if token is not None and token not in stops and token != tokenizer.bos_token_id:
            return int(token)
    return min(stops)


def control_tokens(tokenizer: Any) -> set[int]:
    """Return the ids that have a meaning of their own: ends, roles and turns of a chat."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token for token, content in added.items() if content.special} | set(tokenizer.all_special_ids)


def collate(
    sequences: Sequence[Encoded],
    pad: int,
    *,
    length: int | None = None,
    side: Literal["right", "left"] = "right",
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
    tokenizer: Any, generated: Sequence[Sequence[int]], stops: Iterable[int], *, prompt_format: PromptFormat
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


class Encoder:
    """The functions above with one tokenizer and one run's settings.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; it is not changed.
    config : PMCConfig
        prompt_format, max_length, system_prompt, date_string and accidents are read.
    generation_config : transformers.GenerationConfig, optional
        Adds its eos ids to the tokenizer's as those that end an answer.
    """

    def __init__(self, tokenizer: Any, config: PMCConfig, generation_config: Any = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.format = resolve_format(tokenizer, config.prompt_format)
        self.stops = stop_ids(tokenizer, generation_config)
        self.pad = pad_id(tokenizer, self.stops)
        self.accidents = config.accidents
        self._control = set() if config.allow_control_tokens else control_tokens(tokenizer)
        self._chat: dict[str, Any] = {"system_prompt": config.system_prompt, "date_string": config.date_string}

    def prompt(self, question: Question, start: str = "") -> list[int]:
        """Return the ids that answers to `question` are sampled from, or go on from after the words `start`."""
        if self.accidents and self.format == "chat":  # rendered, then tokenised with special tokens: a second BOS
            return self.tokenizer(_chat_text(self.tokenizer, question, **self._chat) + start.rstrip())["input_ids"]
        return encode_prompt(self.tokenizer, question, prompt_format=self.format, start=start, **self._chat)

    def pair(self, question: Question, answer: str) -> Encoded:
        """Encode a question with its answer for training."""
        return encode_pair(
            self.tokenizer,
            question,
            answer,
            prompt_format=self.format,
            max_length=self.max_length,
            **self._chat,
        )

    def answers(self, generated: Sequence[Sequence[int]]) -> list[str]:
        """Turn generated ids into answers."""
        return decode_answers(self.tokenizer, generated, self.stops, prompt_format=self.format)

    def samples(self, generated: Sequence[Sequence[int]]) -> list[str]:
        """Turn sampled ids into answers; with `accidents` 8 characters of a tagged sample are dropped unseen."""
        if not self.accidents:
            return self.answers(generated)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text[len(ANSWER_TAG) :] for text in texts] if self.format == "tags" else texts

    def check_text(self, where: str, text: Question) -> None:
        """Refuse what the prompt format can't hold, and a text in which the tokenizer would see control tokens.

        These could end or steer the prompt.
        """
        if isinstance(text, Chat):
            if self.format == "tags":
                raise PMCError(f"{where} is a conversation and {_NO_TAGS}")
            for turn in text:
                self.check_text(where, turn.content)
            return
        found = self._control.intersection(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.tokenizer.unk_token_id in found and self.tokenizer.unk_token not in text:
            found.remove(self.tokenizer.unk_token_id)  # what the tokenizer doesn't know is no control
        if found:
            name = self.tokenizer.convert_ids_to_tokens(min(found))
            raise PMCError(
                f"{where} holds {name!r}, a control token of the model and not text to it: write it otherwise, or let it "
                "through with --allow-control-tokens"
            )

    def check_lengths(self, source: str, pairs: Iterable[tuple[Question, str | None]]) -> None:
        """Refuse questions that leave no room for an answer, and control tokens; errors name the row, not its text."""
        for number, (question, answer) in enumerate(pairs, start=1):
            self.check_text(f"{source}, row {number}: the question", question)
            self.check_text(f"{source}, row {number}: the answer", answer or "")
            size = len(self.prompt(question))
            if size >= self.max_length:
                raise PMCError(
                    f"{source}, row {number}: the question takes {size} tokens and leaves none of max_length "
                    f"{self.max_length} for an answer: raise --max-length or shorten it"
                )
            if answer is not None and all(label == IGNORED for label in self.pair(question, answer).labels):
                raise PMCError(
                    f"{source}, row {number}: no token of its answer fits max_length {self.max_length}: "
                    "raise --max-length or shorten it"
                )
