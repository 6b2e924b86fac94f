"""Partial Model Collapse for any training loop: prepare, sample, loss (arXiv 2507.04219, section 4)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..config import PMCConfig
from ..data import Encoded, Encoder, check_datasets, is_text, listed, questions_of, sequences_of
from ..data.chats import with_words
from ..data.datasets import check_ids, check_padding, check_sequences
from ..data.packing import num_targets
from ..distributed import Ranks
from ..errors import PMCError
from ..models import loading
from ..models.fsdp import is_sharded
from ..models.packed_forward import PackedPass
from ..models.supported import check_float16, check_model
from ..rollout import RolloutEngine, add_counters
from ..utils.labels import IGNORED
from ..utils.text import row_numbers
from ..utils.words import says_nothing, without_words
from .batch import Loss, Retain, Step
from .packed_loss import PackedLoss
from .reward import ROUGE, Reward, Scorer, choose_scorer
from .sampler import Pick, Sampler
from .store import BestStore

PROBES = 4  # initial answers by which a resumed run knows the untouched model
logger = logging.get_logger(__name__)


def check_store(config: PMCConfig, questions: Sequence[Any]) -> None:
    """Refuse to store how texts go on as text: they are trained as they were sampled."""
    if config.store == "text" and any(map(is_text, questions)):
        number = next(number for number, question in enumerate(questions, start=1) if is_text(question))
        raise PMCError(
            f"store is 'text' but question {number} is a text to be continued, and these are trained as they were sampled: "
            "use store='auto' (--store auto)"
        )


class PMC:
    """The algorithm without a training loop.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model. Its live weights are sampled from; whoever calls `backward` and steps trains it.
    tokenizer : transformers.PreTrainedTokenizerBase
    config : PMCConfig
    questions : iterable of str, or of lists of int
        To be forgotten: texts, which are put into the prompt format, prompts as token ids, or rows as of `PMCTrainer`.
    positions : sequence of int list or None, optional
        Of each prompt's ids, where they are not 0, 1, ...; see `pmc_fast.data.packing.unpad`.
    reward : callable, optional
        `reward(initial, candidates, min_len)` returns scores [Q, N] in [0, 1] for initial answers [Q] and lists of N
        candidates; 0: nothing in common. By default `config.reward`.
    autocast_dtype : torch.dtype, optional
        What the model computes in under torch.autocast; rollouts and losses then enter it themselves.
    process_group : torch.distributed.ProcessGroup, optional
        The processes that train the model together; by default all, once torch.distributed is initialised.

    Raises
    ------
    PMCError
        A question leaves no room for an answer; a model or adapter is not supported; questions or settings differ
        between processes. Some of these are found on first use.

    Notes
    -----
    `step = pmc.sample(indices)` once an optimizer step, then `pmc.loss(part, retain).loss.backward()` for each
    part of `step.split(size)`: the gradients add up to the step's, whatever the number of parts. `pmc.step_losses` takes
    all parts at once, in fewer passes.

    On several processes all of them call `prepare`, `sample` and `loss`, each with its own questions. The rollout is
    divided among the processes, every store holds every answer, and losses are scaled for gradients that are averaged
    over the processes, as DDP and FSDP do. The answers to a question do not depend on the number of processes.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: PMCConfig,
        questions: Iterable[Any],
        *,
        positions: Sequence[list[int] | None] | None = None,
        reward: Reward | None = None,
        autocast_dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(config, PMCConfig):
            raise PMCError(
                f"config is a {type(config).__name__}: it must be a PMCConfig, such as PMCConfig(num_samples=10)"
            )
        if reward is not None and config.reward != "auto":
            raise PMCError(f"reward is given, and config.reward is {config.reward!r}: leave one of them out")
        check_model(model)
        check_float16(model, autocast_dtype)
        self.questions: list[Any] = questions_of(questions, "questions")
        self.model, self.config, self.ranks = model, config, Ranks(process_group)
        self.encoder = Encoder(tokenizer, config, None if config.accidents else model.generation_config)
        self.reward, self.autocast_dtype = reward, autocast_dtype
        self.scorer: Scorer = ROUGE  # that of `config.reward` once there are initial answers
        self.engine = RolloutEngine(
            model, autocast_dtype=autocast_dtype, cuda_graphs=config.cuda_graphs, process_group=process_group
        )
        self.store = BestStore(len(self.questions))
        texts = not isinstance(self.questions[0], list)
        if config.store == "text" and not texts:
            raise PMCError("store is 'text' but the questions are token ids: use store='ids'")
        check_store(config, self.questions)
        if config.question_dropout and not texts:
            raise PMCError(
                f"question_dropout is {config.question_dropout} but the questions are token ids, whose words are not known: "
                "give texts, or leave it out"
            )
        self.keeps_text = texts and config.store != "ids"
        self.prompts = [self._prompt(i, q) for i, q in enumerate(self.questions)]
        self.positions = [None] * len(self.prompts) if positions is None else list(positions)
        self.source = "initial answers"  # their name in errors and warnings
        self.rows = list(range(1, len(self.prompts) + 1))
        # logged by whoever calls `prepare`, which adds its own
        self.warnings = self.encoder.warnings + loading.check_positions(model.config, config.max_length)
        if self.keeps_text:
            self.warnings += self.encoder.text_warnings()
        self.initial_answers: list[str] = []
        self._initial_ids: list[list[int]] = []
        self._sampler = Sampler(
            config, self.encoder, self.ranks, self.questions, self.prompts, self.positions, self.keeps_text
        )
        self._loss = PackedLoss(model, config, self.ranks, autocast_dtype)

    @property
    def packed(self) -> PackedPass:
        """The pass that computes losses, for measurements of the same model."""
        return self._loss.packed

    def share(self, engine: RolloutEngine, packed: PackedPass) -> None:
        """Sample and compute losses with an engine and a pass of the same model that somebody else uses too."""
        self.engine, self._loss.packed = engine, packed

    def _prompt(self, number: int, question: Any) -> list[int]:
        """Return a question's prompt as token ids; refuse one that can't be answered."""
        where = f"question {number}"
        if isinstance(question, list):
            prompt = question
            check_padding(prompt, self.encoder.tokenizer, where, prompt=True)
        else:
            self.encoder.check_text(where, question)
            prompt = self.encoder.prompt(question, where=where)
        check_ids(where, prompt, self._known_ids)
        if len(prompt) >= self.config.max_length:
            raise PMCError(
                f"{where} takes {len(prompt)} tokens and leaves none of max_length {self.config.max_length} for an "
                "answer: raise max_length or shorten it"
            )
        return prompt

    def prepare(self, truths: Iterable[str] = ()) -> list[str]:
        """Answer every forget question greedily with the untouched model, y_i, and return the answers.

        Parameters
        ----------
        truths : iterable of str, optional
            Other texts that answers will be compared with: reward "auto" is then the same in training and evaluation.

        Raises
        ------
        PMCError
            An initial answer in which the reward sees no word: every sample would be unlike it.
        """
        self.ranks.require_equal(
            {"questions": [self.prompts, self.positions], "PMC settings": self.config.algorithm()}
        )
        if not is_sharded(self.model):  # else with the first loss, whose model gathers the weights
            self._loss.check()
        self._loss.require_whole()
        if self.config.rollout_dtype != "auto":  # before initial answers, which are the model's own, are drawn
            self.engine.check(self.config.rollout_dtype)
        mine = self.ranks.share(range(len(self.prompts)))
        rollouts = self.engine(
            [self.prompts[i] for i in mine], num_samples=1, temperature=0, max_length=self.config.max_length,
            stop_ids=self.encoder.stops, positions=[self.positions[i] for i in mine], as_generate=True,
        )  # fmt: skip
        answers = {i: tokens for i, [tokens] in zip(mine, rollouts.tokens, strict=True)}
        answers = {i: tokens for theirs in self.ranks.gather(answers) for i, tokens in theirs.items()}
        self._initial_ids = [answers[i] for i in range(len(self.prompts))]
        said = self.encoder.answers(self._initial_ids, self.questions)
        if all(not y.split() for y in said):
            raise PMCError("every initial answer is empty: there is nothing to forget; check prompt_format")
        self._loss.drop_untouched()
        self._keep_untouched()
        self.initial_answers = said  # with which a run counts as prepared
        self.scorer = choose_scorer(self.config.reward, [*truths, *self.initial_answers])
        self._check_initial_answers()
        return self.initial_answers

    def _keep_untouched(self, known: list[float] | None = None) -> None:
        """Let retain_loss "kl" compare with the model as it is now; `known`: of a state, what tells it from a trained one."""
        answered = [i for i, ids in enumerate(self._initial_ids) if ids][:PROBES]
        if answered:  # else the state of a run that had not begun
            self._loss.keep_untouched([self._encode_ids(i, self._initial_ids[i]) for i in answered], known)

    def _check_initial_answers(self) -> None:
        numbered = list(zip(self.rows, self.initial_answers, strict=True))
        if silent := [row for row, y in numbered if says_nothing(y)]:
            self.warnings.append(
                f"{self.source}, {row_numbers(silent)}: the model says nothing, so whatever it says when sampled counts "
                "as forgotten and is trained on: leave the questions out, or check prompt_format"
            )
        if cut := self.cut_answers:
            self.warnings.append(
                f"{self.source}, {row_numbers(cut)}: {len(cut)} of {len(self.rows)} did not end before max_length "
                f"{self.config.max_length}: only what was said by then is forgotten; raise --max-length"
            )
        if self.reward is None:
            self.scorer.require_words(self.source, [(row, y) for row, y in numbered if not says_nothing(y)])

    @property
    def cut_answers(self) -> list[int]:
        """Rows whose initial answer did not end before max_length; a text may go on as long as it likes."""
        numbered = zip(self.rows, self.questions, self.prompts, self._initial_ids, strict=True)
        most = self.config.max_length
        full = [(row, ids) for row, q, prompt, ids in numbered if len(prompt) + len(ids) >= most and not is_text(q)]
        return [row for row, ids in full if not set(ids[-1:]) & set(self.encoder.stops)]

    def sample(self, indices: Sequence[int]) -> Step:
        """Visit the questions of an optimizer step: sample where the store asks for it, keep the better answers.

        With `rollout_batch_size` other questions may be visited as well; these are not sampled when their step comes.

        Parameters
        ----------
        indices : sequence of int
            Of all its micro-batches: the weights do not move between them, so one rollout serves all. On several
            processes, this one's share of them, which may be empty.
        """
        if not self.initial_answers:
            raise PMCError("there are no initial answers: call prepare() before the first step")
        indices = [int(i) for i in indices]
        if unknown := [i for i in indices if not 0 <= i < len(self.questions)]:
            raise PMCError(f"index {unknown[0]} is none of {len(self.questions)} questions: they are counted from 0")
        all_indices = self.ranks.gather(indices)
        listed = list(dict.fromkeys(i for theirs in all_indices for i in theirs))
        asked = self._to_visit(listed)
        counters: dict[str, float] = {"questions_sampled": len(asked)}
        if asked:
            counters |= self._visit(asked)
        used = {i: self.store.use(i) for i in listed}  # [[answer, weight], ...] of each question
        stored = [used[i] for i in indices]
        answers = [[self._encode(i, answer) for answer, _ in kept] for i, kept in zip(indices, stored, strict=True)]
        weights = [[weight for _, weight in kept] for kept in stored]
        tokens = sum(
            w * num_targets(a) for row, ws in zip(answers, weights, strict=True) for a, w in zip(row, ws, strict=True)
        )
        sizes, tokens = [len(theirs) for theirs in all_indices], sum(self.ranks.gather(tokens))
        return Step(indices, answers, weights, sizes, 1, sum(n > 0 for n in sizes), tokens, counters)

    def pending(self, indices: Sequence[int] | None = None) -> list[int]:
        """Return those questions, by default of all, that the next visit samples."""
        indices = range(len(self.questions)) if indices is None else indices
        return self.store.pending(indices, self.config.resample_above)

    def _to_visit(self, listed: list[int]) -> list[int]:
        """Return what a step samples: its questions, and others up to `rollout_batch_size`, those visited least first."""
        above, everything = self.config.resample_above, range(len(self.questions))
        asked = self.store.due(listed, above)
        if room := max(0, self.config.rollout_batch_size - len(asked)) if asked else 0:
            others = set(self.store.due(everything, above)) - set(asked)
            asked += sorted(others, key=lambda i: (self.store.visits(i), i))[:room]
        return asked

    def _visit(self, asked: list[int]) -> dict[str, float]:
        """Sample and score this process's share of the questions; offer all processes' answers to the store."""
        found: dict[int, Pick] = {}
        total: dict[str, float] = {}
        for theirs, counted in self.ranks.gather(self._sample(self.ranks.share(asked))):
            found |= theirs
            add_counters(total, counted)
        for i in asked:
            self.store.offer(i, *found[i])
        return total

    def _sample(self, asked: list[int]) -> tuple[dict[int, Pick], dict[str, float]]:
        """Sample questions; return each one's answers to keep with their score, and the rollout's counters."""
        visits = [self.store.visits(i) for i in asked]
        initial = [(self.initial_answers[i], self._initial_ids[i]) for i in asked]
        return self._sampler(self.engine, asked, visits, initial, self.reward or self.scorer.recall)

    def _encode(self, index: int, answer: Any) -> Encoded:
        if (uses := self.store.uses(index)) % 2 or not self.config.question_dropout:
            return self._encode_whole(index, answer)
        generator = np.random.default_rng((self.config.seed, index, uses))
        question = with_words(
            self.questions[index], lambda text: without_words(text, self.config.question_dropout, generator)
        )
        whole = self._encode_whole(index, answer)
        if self._sampler.as_text(index):
            pair = self.encoder.pair(question, answer)
            prompt = pair.input_ids[: pair.prompt_length]
        else:
            prompt = self.encoder.prompt(question)
        begin = whole.prompt_length  # what is trained is the same, wherever it was cut
        if len(prompt) > begin:  # words that became neighbours may take more tokens
            return whole
        ids, labels = prompt + whole.input_ids[begin:], [IGNORED] * len(prompt) + whole.labels[begin:]
        return replace(whole, input_ids=ids, labels=labels)

    def _encode_whole(self, index: int, answer: Any) -> Encoded:
        if self._sampler.as_text(index):
            return self.encoder.pair(self.questions[index], answer)
        return self._encode_ids(index, answer)

    def _encode_ids(self, index: int, answer: Sequence[int]) -> Encoded:
        prompt, positions = self.prompts[index], self.positions[index]
        ids = (prompt + [int(t) for t in answer])[: self.config.max_length]
        if positions is not None:
            positions = positions + [positions[-1] + 1 + n for n in range(len(ids) - len(prompt))]
        return Encoded(ids, [IGNORED] * len(prompt) + ids[len(prompt) :], positions)

    def encode(self, rows: Iterable[Any] | None, name: str) -> list[Encoded]:
        """Encode pairs in the questions' prompt format; tokenised rows are unpadded. `name` names them in errors."""
        sequences = sequences_of(rows, self.encoder, name)
        check_sequences(sequences, name, self._known_ids)
        return sequences

    def encode_retain(
        self, rows: Iterable[Any] | None, name: str = "retain_dataset", *, warn: Callable[[str], None] | None = None
    ) -> list[Encoded]:
        """Encode pairs to keep; pairs whose questions are to be forgotten are refused (`allow_overlap`).

        Parameters
        ----------
        rows : iterable
            As of `encode`.
        name : str
            Names them in errors.
        warn : callable, optional
            Called with each warning, such as of questions that are nearly the same. By default it is logged.
        """
        if self.ranks.size > 1 and isinstance(rows, Sequence) and not rows:
            return []  # of a step that has no question for this process
        warn = warn or self._warn
        rows = listed(rows, name, "without pairs to keep, forgetting takes all else along")
        sequences = self.encode(rows, name)
        if cut := [number for number, s in enumerate(sequences, start=1) if s.cut]:
            warn(self.encoder.cut_warning(name, cut, len(sequences)))
        data = self.questions, rows, self.prompts, sequences, self.encoder.tokenizer
        for text in check_datasets(*data, allow=self.config.allow_overlap, name=name):
            warn(text)
        return sequences

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            logger.warning(text)

    @property
    def _known_ids(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def loss(self, part: Step, retain: Retain, *, model: Any = None, retain_tokens: int | None = None) -> Loss:
        """Return CE(sampled answers) + lambda CE(retain answers) of a micro-batch, as its share of the step's loss.

        With retain_loss "kl" the second is lambda KL(untouched model || model).

        Parameters
        ----------
        part : Step
        retain : mapping or sequence of Encoded
            A padded batch (input_ids, attention_mask, labels), or sequences.
        model : callable, optional
            The model as it is wrapped for training (DDP, FSDP, torch.compile). By default the bare one.
        retain_tokens : int, optional
            Trained tokens of this process's retain batches of the whole step: needed where normalization is "step"
            and the step has several parts.

        Returns
        -------
        Loss
            Of all packs at once. `losses` yields one pack after the other, which bounds the memory.
        """
        packs = list(self.losses(part, retain, model=model, retain_tokens=retain_tokens))
        loss = torch.stack([m.loss for m in packs]).sum() if len(packs) > 1 else packs[0].loss
        counters = {name: sum(m.counters[name] for m in packs) for name in packs[0].counters}
        return Loss(loss, packs[-1].collapse, packs[-1].retain, counters)

    def losses(
        self, part: Step, retain: Retain, *, model: Any = None, retain_tokens: int | None = None
    ) -> Iterator[Loss]:
        """Yield the loss of each pack of at most max_tokens tokens; `collapse` and `retain` are sums up to that pack.

        All processes yield the same number: one with fewer packs adds packs of weight 0, since backward is collective.
        Call backward on each before the next: DDP exchanges gradients with the last one's.
        """
        for made in self._loss([(part, retain)], model=model, retain_tokens=retain_tokens):
            yield replace(made, collapse=made.collapse[0], retain=made.retain[0])

    def step_losses(self, parts: Sequence[tuple[Step, Retain]], *, model: Any = None) -> Iterator[Loss]:
        """Yield the loss of each pack of a whole optimizer step: micro-batches share packs, and keep their means.

        Parameters
        ----------
        parts : sequence of (Step, mapping or sequence of Encoded)
            All of `step.split(size)`, each with its retain batch.
        model : callable, optional
            As of `loss`.

        Yields
        ------
        Loss
            As of `losses`; `collapse` and `retain` have an entry for each part.
        """
        return self._loss(parts, model=model)

    def limit(self, max_tokens: int, graph_tokens: int | None) -> None:
        """Bound the memory of training passes from now on: the tokens of a pack, and of one that a graph is captured of.

        Losses and gradients stay as they are, up to rounding. `graph_tokens` 0: no graphs, None: of any pack.
        """
        self._loss.limit = max_tokens
        if graph_tokens == 0:
            self.packed.drop_graphs()
        else:
            self.packed.graph_tokens = graph_tokens

    @property
    def passes_divide(self) -> bool:
        """Whether a lower limit makes packs smaller: the largest is no single group, which has a pack of any size."""
        return 1 < self._loss.largest <= self._loss.max_tokens

    def halve_passes(self) -> int:
        """Release what is kept to be faster, let packs be half as large as the last ones, and return how large."""
        tokens = max(1, min(self._loss.max_tokens, self._loss.largest) // 2)
        self.limit(tokens, 0)
        self.engine.release()
        return tokens

    def scores(self) -> list[float]:
        """Return the scores of all stored answers."""
        return [self.store.score(i) for i in range(len(self.store)) if self.store.visits(i)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a run to resume, JSON-ready. It holds generated answers: keep it as private as the data."""
        return {
            "store": self.store.state_dict(),
            "initial_answers": self.initial_answers,
            "initial_ids": self._initial_ids,
            "reward": self.scorer.name,
            "untouched_logps": self._loss.untouched_logps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a state of other questions is refused.

        With retain_loss "kl", before trained weights are loaded: losses compare with the model as it is now.
        """
        self.store.load_state_dict(state["store"])
        self.initial_answers, self._initial_ids = state["initial_answers"], state["initial_ids"]
        self.scorer = choose_scorer(state.get("reward", self.config.reward), self.initial_answers)
        known = state.get("untouched_logps")
        if known is None and self._initial_ids and self._loss.compares and self._loss.teacher is None:
            raise PMCError(
                "retain_loss is 'kl' and the state is of a run without it, which does not say what the untouched model was: call "
                "prepare() with the untouched model first, or use retain_loss='nll'"
            )
        self._keep_untouched(known)
