"""A tokenizer with a run's settings; what can't be encoded correctly is refused before work, by row."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from ..config import PromptConfig
from ..errors import PMCError
from ..utils.labels import IGNORED
from ..utils.text import row_numbers
from .chats import Chat, Question, is_text, text_to_continue
from .encoding import (
    ANSWER_TAG,
    NO_TAGS,
    QUESTION_END,
    QUESTION_TAG,
    SYSTEM_PROMPT,
    Encoded,
    EncodingError,
    Format,
    TemplateError,
    chat_text,
    control_tokens,
    decode_answers,
    encode_pair,
    encode_prompt,
    pad_id,
    resolve_format,
    stop_ids,
)  # fmt: skip

PROBE = ("Who did it?", "Ann did.")
NO_LIMIT = 1 << 20  # more tokens than the probe has


class Encoder:
    """The functions of `encoding` with one tokenizer and one run's settings.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; it is not changed.
    config : PromptConfig
    generation_config : transformers.GenerationConfig, optional
        Adds its eos ids to the tokenizer's as those that end an answer.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig, generation_config: Any = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = config.max_length
        self.format = resolve_format(tokenizer, config.prompt_format)
        self.stops = stop_ids(tokenizer, generation_config)
        self.pad = pad_id(tokenizer, self.stops)
        self.accidents = config.accidents
        self.warnings: list[str] = []  # of settings that the chat template does not support
        self._control = set() if config.allow_control_tokens else control_tokens(tokenizer)
        self._chat: dict[str, Any] = {"system_prompt": config.system_prompt, "date_string": config.date_string}
        self._takes_system = True
        self._plain_checked = False
        self.opening = ""  # what the template inserts before an answer
        if self.format == "chat":
            self._fit_template(config.system_prompt)
            self._find_opening()
        else:
            self._pair(*PROBE, NO_LIMIT)

    def _fit_template(self, wanted: str) -> None:
        """Leave out the default system prompt where the template supports none; refuse one that was asked for."""
        asked: dict[str, Any] = {"question": PROBE[0], "answer": None, "date_string": self._chat["date_string"]}
        try:
            self._pair(*PROBE, NO_LIMIT)
            tried = wanted.strip() or SYSTEM_PROMPT
            self._takes_system = tried in chat_text(self.tokenizer, system_prompt=tried, **asked)
            if wanted.strip() and not self._takes_system:
                self.warnings.append("the chat template leaves the system prompt out: the model is asked without")
            return
        except EncodingError as error:
            self._takes_system, self._chat["system_prompt"] = False, None
            try:
                self._pair(*PROBE, NO_LIMIT)
            except TemplateError as worse:
                reason = str(worse.__cause__).strip().split("\n")[0]
                raise PMCError(f"{worse}: {reason}; fix it, or use --prompt-format tags") from worse
            if wanted not in ("", SYSTEM_PROMPT):
                raise PMCError("the chat template takes no system prompt: give --system-prompt ''") from error
        if wanted:
            self.warnings.append("the chat template takes no system prompt: the model is asked without")

    def _find_opening(self) -> None:
        """Refuse templates that leave out the question or the answer (some read only messages in parts)."""
        question, answer = PROBE
        prompt, pair = (chat_text(self.tokenizer, question, a, **self._chat) for a in (None, answer))
        before, found, _ = pair[len(prompt) :].partition(answer)
        for what, there in (("question", question in prompt), ("answer", found)):
            if not there:
                raise PMCError(
                    f"the chat template leaves the {what} out (does it take parts alone, as for images?): set "
                    "tokenizer.chat_template to another, or use --prompt-format tags"
                )
        self.opening = before.strip()

    def text_warnings(self) -> list[str]:
        """Return a warning if sampled answers that are stored as text are not trained as they were sampled."""
        if not self.opening:
            return []
        return [
            f"the chat template begins every given answer with {self.opening!r}: so are retain answers trained, and "
            "sampled ones, which are encoded again; --store ids trains these as they were sampled"
        ]

    def prompt(self, question: Question, start: str = "", *, where: str = "") -> list[int]:
        """Return the ids from which answers to `question`, or their continuation of `start`, are sampled.

        `where` names the question in errors.
        """
        with self._named(where, question):
            if is_text(question):
                self._check_plain()
            elif (
                self.accidents and self.format == "chat"
            ):  # rendered, then tokenised with special tokens: a second BOS
                text = chat_text(self.tokenizer, question, None, **self._chat)
                return self.tokenizer(text + start.rstrip())["input_ids"]
            return encode_prompt(
                self.tokenizer, question, prompt_format=self.format_of(question), start=start, **self._chat
            )

    def pair(self, question: Question, answer: str, *, where: str = "") -> Encoded:
        """Encode a question with its answer for training; `where` names them in errors."""
        with self._named(where, question):
            if is_text(question):
                self._check_plain()
            return self._pair(question, answer, self.max_length)

    def _pair(self, question: Question, answer: str, max_length: int) -> Encoded:
        return encode_pair(
            self.tokenizer,
            question,
            answer,
            prompt_format=self.format_of(question),
            max_length=max_length,
            eos=self.stops[0],
            **self._chat,
        )

    def format_of(self, question: Question | list[int]) -> Format:
        """Return the prompt format of a question: "plain" of a text to be continued, else the run's."""
        return "plain" if is_text(question) else self.format

    def _check_plain(self) -> None:
        """Refuse texts to be continued with a tokenizer or settings that can't encode them correctly."""
        if self.accidents:
            raise EncodingError("the published code knows no texts to be continued: leave accidents out")
        if not self._plain_checked:
            self._pair(text_to_continue(PROBE[0]), PROBE[1], NO_LIMIT)
            self._plain_checked = True

    @contextmanager
    def _named(self, where: str, question: Question) -> Iterator[None]:
        try:
            if not self._takes_system and isinstance(question, Chat) and question[0].role == "system":
                raise EncodingError("the chat template takes no system turn: put it into the user's")
            yield
        except EncodingError as error:
            if where:
                raise PMCError(f"{where}: {error}") from error
            raise

    def answers(
        self, generated: Sequence[Sequence[int]], questions: Sequence[Question | list[int]] | None = None
    ) -> list[str]:
        """Turn generated ids into answers to `questions`, by default to none that is a text to be continued."""
        decode = partial(decode_answers, self.tokenizer, stops=self.stops)
        if questions is None:
            return decode(generated, prompt_format=self.format)
        formats = map(self.format_of, questions)
        return [decode([ids], prompt_format=f)[0] for ids, f in zip(generated, formats, strict=True)]

    def samples(self, generated: Sequence[Sequence[int]], question: Question | list[int] | None = None) -> list[str]:
        """Turn ids sampled for a question into answers; with `accidents` tagged samples lose their first 8 characters."""
        if not self.accidents:
            return self.answers(generated, None if question is None else [question] * len(generated))
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [text[len(ANSWER_TAG) :] for text in texts] if self.format == "tags" else texts

    def tag_length(self, ids: Sequence[int]) -> int:
        """Return how many tokens of a generated answer are the "Answer:" of the tags format; 0 in others and where it has none."""
        return len(self._tag) if self.format == "tags" and list(ids[: len(self._tag)]) == self._tag else 0

    @cached_property
    def _tag(self) -> list[int]:
        begin = QUESTION_TAG + "?" + QUESTION_END  # behind a prompt: alone, some tokenizers put a space before it
        prompt, ids = (self.tokenizer(text)["input_ids"] for text in (begin, begin + ANSWER_TAG.strip()))
        return list(ids[len(prompt) :])

    def tokens_alike(self, ids: Iterable[int]) -> set[int]:
        """Return all tokens that read as one of `ids` does, but for case and spaces.

        Tokens without a letter or digit, and those that end an answer, are alike to none.
        """
        words, spelled = self._spelled
        return {token for t in set(ids) if (word := words[t]) for token in spelled[word]}

    @cached_property
    def _spelled(self) -> tuple[list[str], dict[str, list[int]]]:
        """What each token reads, and the tokens that read so."""
        special = {*self.stops, *self.tokenizer.all_special_ids}
        texts = self.tokenizer.batch_decode([[t] for t in range(len(self.tokenizer))])
        words = [
            "" if t in special or not any(map(str.isalnum, text)) else text.strip().casefold()
            for t, text in enumerate(texts)
        ]
        spelled: dict[str, list[int]] = {}
        for t, word in enumerate(words):
            spelled.setdefault(word, []).append(t)
        return words, spelled

    def check_text(self, where: str, text: Question) -> None:
        """Refuse conversations in the tags format, and texts with control tokens, which could end the prompt."""
        if isinstance(text, Chat):
            if self.format_of(text) == "tags":
                raise PMCError(f"{where} is a conversation and {NO_TAGS}")
            for turn in text:
                self.check_text(where, turn.content)
            return
        found = self._control.intersection(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.tokenizer.unk_token_id in found and self.tokenizer.unk_token not in text:
            found.remove(self.tokenizer.unk_token_id)  # an unknown word is no control token
        if found:
            name = self.tokenizer.convert_ids_to_tokens(min(found))
            raise PMCError(
                f"{where} holds {name!r}, a control token of the model and not text to it: write it otherwise, or let it "
                "through with --allow-control-tokens"
            )

    def check_lengths(self, source: str, pairs: Iterable[tuple[Question, str | None]]) -> list[int]:
        """Return the rows whose answers max_length cuts; refuse questions that leave no room for an answer.

        Control tokens are refused too. Errors name the row, not its text.
        """
        cut = []
        for number, (question, answer) in enumerate(pairs, start=1):
            self.check_text(f"{source}, row {number}: the question", question)
            self.check_text(f"{source}, row {number}: the answer", answer or "")
            where = f"{source}, row {number}"
            size = len(self.prompt(question, where=where))
            if size >= self.max_length:
                raise PMCError(
                    f"{source}, row {number}: the question takes {size} tokens and leaves none of max_length "
                    f"{self.max_length} for an answer: raise --max-length or shorten it"
                )
            if answer is not None:
                pair = self.pair(question, answer, where=where)
                if all(label == IGNORED for label in pair.labels):
                    raise PMCError(
                        f"{source}, row {number}: no token of its answer fits max_length {self.max_length}: "
                        "raise --max-length or shorten it"
                    )
                if pair.cut:
                    cut.append(number)
        return cut

    def cut_warning(self, source: str, rows: Sequence[int], count: int) -> str:
        """Return the warning for rows whose answers max_length cuts."""
        return (
            f"{source}: {len(rows)} of {count} answers are longer than max_length {self.max_length} leaves room for "
            f"({row_numbers(rows)}): their ends are neither trained nor asked for; raise --max-length"
        )
