"""Partial Model Collapse for any training loop: prepare, sample, loss (arXiv 2507.04219, section 4)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..config import PMCConfig
from ..data import (
    Encoded,
    Encoder,
    check_datasets,
    listed,
    questions_of,
    sequences_of,
)
from ..data.datasets import check_padding
from ..data.packing import (
    Pack,
    num_targets,
    pack,
    unpad,
)
from ..distributed import Ranks
from ..errors import PMCError
from ..models import context, loading
from ..models.fsdp import is_sharded
from ..models.packed_forward import PackedPass, causal_lm
from ..models.supported import check_float16, check_model
from ..ops import row_scales
from ..rollout import RolloutEngine, add_counters
from ..utils.labels import IGNORED
from ..utils.text import row_numbers
from ..utils.words import says_nothing
from . import selection
from .batch import Loss, Retain, Step
from .losses import pmc_weights
from .reward import (
    ROUGE,
    Reward,
    Scorer,
    choose_scorer,
    judged,
)
from .store import BestStore

logger = logging.get_logger(__name__)


class PMC:
    """The algorithm without a training loop.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model. Its live weights are sampled from; whoever calls `backward` and steps trains it.
    tokenizer : transformers.PreTrainedTokenizerBase
    config : PMCConfig
    questions : iterable of str, or of lists of int
        To be forgotten: texts, put into the prompt format, or prompts as token ids; also rows, as of `PMCTrainer`.
    positions : sequence of int list or None, optional
        Of each prompt's ids, where they are not 0, 1, ...; see `pmc_fast.data.packing.unpad`.
    reward : callable, optional
        (initial [Q], candidates [Q][N], min_len) -> [Q, N] in [0, 1]; 0: fully unlike. By default `config.reward`.
    autocast_dtype : torch.dtype, optional
        What the model computes in under torch.autocast; rollouts and losses then enter it themselves.
    process_group : torch.distributed.ProcessGroup, optional
        The processes that train the model together; by default all, once torch.distributed is initialised.

    Raises
    ------
    PMCError
        A question that leaves no room for an answer; a model or adapter that is not supported, by name, here or on
        first use;
        processes with different questions or settings.

    Notes
    -----
    `step = pmc.sample(indices)` once an optimizer step, then `pmc.loss(part, retain).loss.backward()` for each
    part of `step.split(size)`: the gradients add up to the step's, whatever the number of parts.

    On several processes all of them call `prepare`, `sample` and `loss`, with questions of their own: rollouts
    are shared out evenly, every store holds every answer, and losses are scaled for gradients that are averaged
    over the processes, as DDP and FSDP do. Which answers a question gets does not depend on their number.
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
        check_model(model)
        check_float16(model, autocast_dtype)
        self.questions: list[Any] = questions_of(questions, "questions")
        self.model, self.config, self.ranks = model, config, Ranks(process_group)
        self.encoder = Encoder(tokenizer, config, None if config.accidents else model.generation_config)
        if reward is not None and config.reward != "auto":
            raise PMCError(f"reward is given, and config.reward is {config.reward!r}: leave one of them out")
        self.reward, self.autocast_dtype = reward, autocast_dtype
        self.scorer: Scorer = ROUGE  # what `config.reward` is, known with the initial answers
        self.engine = RolloutEngine(
            model,
            autocast_dtype=autocast_dtype,
            cuda_graphs=config.cuda_graphs,
            process_group=process_group,
        )
        self.store = BestStore(len(self.questions))
        texts = not isinstance(self.questions[0], list)
        if config.store == "text" and not texts:
            raise PMCError("store is 'text' but the questions are token ids: use store='ids'")
        self.keeps_text = texts and config.store != "ids"
        for i, question in enumerate(self.questions if texts else ()):
            self.encoder.check_text(f"question {i}", question)
        self.prompts = [
            self.encoder.prompt(q, where=f"question {i}") if texts else q for i, q in enumerate(self.questions)
        ]
        self.positions = [None] * len(self.prompts) if positions is None else list(positions)
        for i, prompt in enumerate(self.prompts):
            if not texts:
                check_padding(prompt, tokenizer, f"question {i}", prompt=True)
            self._check_ids(f"question {i}", prompt)
            if len(prompt) >= config.max_length:
                raise PMCError(
                    f"question {i} takes {len(prompt)} tokens and leaves none of max_length {config.max_length} for an "
                    "answer: raise max_length or shorten it"
                )
        self.source = "initial answers"  # what errors and warnings call them
        self.rows = list(range(1, len(self.prompts) + 1))
        # to be said once `prepare` has added its own
        self.warnings = self.encoder.warnings + loading.check_positions(model.config, config.max_length)
        if self.keeps_text:
            self.warnings += self.encoder.text_warnings()
        self.initial_answers: list[str] = []
        self._initial_ids: list[list[int]] = []
        self._pass = PackedPass(causal_lm(model), cuda_graphs=config.cuda_graphs)
        self._checked = False

    def prepare(self, truths: Iterable[str] = ()) -> list[str]:
        """Answer every forget question greedily with the untouched model, y_i, and return the answers.

        Parameters
        ----------
        truths : iterable of str, optional
            What else will be compared with answers, so that reward "auto" is the same for training and evaluation.

        Raises
        ------
        PMCError
            An initial answer that the reward sees nothing of: any sample would be unlike it.
        """
        self.ranks.require_equal(
            {
                "questions": [self.prompts, self.positions],
                "PMC settings": self.config.algorithm(),
            }
        )
        if not is_sharded(self.model):  # else at the first loss, which is given what gathers its weights
            self._pass.check(self.autocast_dtype)
        mine = self.ranks.share(range(len(self.prompts)))
        made = self.engine(
            [self.prompts[i] for i in mine], num_samples=1, temperature=0, max_length=self.config.max_length,
            stop_ids=self.encoder.stops, positions=[self.positions[i] for i in mine], as_generate=True,
        )  # fmt: skip
        answers = {i: tokens for i, [tokens] in zip(mine, made.tokens, strict=True)}
        answers = {i: tokens for of in self.ranks.gather(answers) for i, tokens in of.items()}
        self._initial_ids = [answers[i] for i in range(len(self.prompts))]
        self.initial_answers = self.encoder.answers(self._initial_ids)
        if all(not y.split() for y in self.initial_answers):
            raise PMCError("every initial answer is empty: there is nothing to forget; check prompt_format")
        self.scorer = choose_scorer(self.config.reward, [*truths, *self.initial_answers])
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
        return self.initial_answers

    @property
    def cut_answers(self) -> list[int]:
        """Rows whose initial answer did not end before max_length."""
        stops = set(self.encoder.stops)
        return [
            row
            for row, prompt, ids in zip(self.rows, self.prompts, self._initial_ids, strict=True)
            if len(prompt) + len(ids) >= self.config.max_length and stops.isdisjoint(ids[-1:])
        ]

    def sample(self, indices: Sequence[int]) -> Step:
        """Visit the questions of an optimizer step: sample where the store asks for it, keep the better answers.

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
        everyones = self.ranks.gather(indices)
        asked = self.store.pending(list(dict.fromkeys(i for of in everyones for i in of)))
        counters: dict[str, float] = {"questions_sampled": len(asked)}
        if asked:
            counters |= self._visit(asked)
        answers, weights = [], []
        for i in indices:
            kept, of = zip(*self.store.answer(i), strict=True)
            answers.append([self._encode(i, answer) for answer in kept])
            weights.append(list(of))
        tokens = sum(
            w * num_targets(a) for of, ws in zip(answers, weights, strict=True) for a, w in zip(of, ws, strict=True)
        )
        sizes = [len(of) for of in everyones]
        groups = sum(n > 0 for n in sizes)
        return Step(indices, answers, weights, sizes, 1, groups, sum(self.ranks.gather(tokens)), counters)

    def _visit(self, asked: list[int]) -> dict[str, float]:
        """Sample and judge this process's share of the questions, and offer the store everyone's."""
        found: dict[int, tuple[list[list[Any]], float]] = {}
        total: dict[str, float] = {}
        for theirs, counted in self.ranks.gather(self._sample(self.ranks.share(asked))):
            found |= theirs
            add_counters(total, counted)
        for i in asked:
            self.store.offer(i, *found[i])
        return total

    def _sample(self, asked: list[int]) -> tuple[dict[int, tuple[list[list[Any]], float]], dict[str, float]]:
        """Sample questions; return what to keep of each, with its score, and the rollout's counters."""
        c = self.config
        visits = [self.store.visits(i) for i in asked]
        made = self.engine(
            [self.prompts[i] for i in asked],
            num_samples=c.num_samples,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            max_length=c.max_length,
            seed=c.seed,
            stream_ids=[(visit << 32) + i for i, visit in zip(asked, visits, strict=True)],
            stop_ids=self.encoder.stops,
            drafts=[[self._initial_ids[i]] for i in asked],
            positions=[self.positions[i] for i in asked],
            as_generate=True,
        )
        texts = [self.encoder.samples(samples) for samples in made.tokens]
        candidates: list[Any] = texts if self.keeps_text else made.tokens
        picks = {}
        if asked:
            reward = self.reward or self.scorer.recall
            scores = judged(reward, [self.initial_answers[i] for i in asked], texts, c.min_len)
            for row, (i, visit) in enumerate(zip(asked, visits, strict=True)):
                picks[i] = self._select(candidates[row], scores[row], (c.seed, i, visit))
        return picks, {name: float(n) for name, n in made.counters.items()}

    def _select(
        self, candidates: Sequence[Any], scores: np.ndarray, key: tuple[int, ...]
    ) -> tuple[list[list[Any]], float]:
        """Return the answers to keep with their weights, and their score."""
        if self.config.selection == "argmin":
            pick = int(selection.argmin(scores[None])[0])
            return [[candidates[pick], 1.0]], float(scores[pick])
        weights = selection.bradley_terry(scores[None], self.config.tau)[0]
        if self.config.selection == "bradley_terry":
            pick = selection.draw(weights, key)
            return [[candidates[pick], 1.0]], float(scores[pick])
        merged: dict[Any, list[Any]] = {}  # equal answers are one with the sum of their weights
        for candidate, weight in zip(candidates, weights, strict=True):
            name = candidate if isinstance(candidate, str) else tuple(candidate)
            merged.setdefault(name, [candidate, 0.0])[1] += float(weight)
        return list(merged.values()), float(np.clip(weights @ scores, 0, 1))

    def _encode(self, index: int, answer: Any) -> Encoded:
        if self.keeps_text:
            return self.encoder.pair(self.questions[index], answer)
        prompt, positions = self.prompts[index], self.positions[index]
        ids = (prompt + [int(t) for t in answer])[: self.config.max_length]
        if positions is not None:
            positions = positions + [positions[-1] + 1 + n for n in range(len(ids) - len(prompt))]
        return Encoded(ids, [IGNORED] * len(prompt) + ids[len(prompt) :], positions)

    def encode(self, rows: Iterable[Any] | None, name: str) -> list[Encoded]:
        """Encode pairs in the questions' prompt format; tokenised rows pass, unpadded. `name` is theirs in errors."""
        made = sequences_of(rows, self.encoder, name)
        for number, s in enumerate(made, start=1):
            self._check_ids(f"{name}, row {number}", [*s.input_ids, *(x for x in s.labels if x != IGNORED)])
        return made

    def encode_retain(
        self, rows: Iterable[Any] | None, name: str = "retain_dataset", *, warn: Callable[[str], None] | None = None
    ) -> list[Encoded]:
        """Encode pairs to keep; those of questions to be forgotten are refused (`allow_overlap`).

        Parameters
        ----------
        rows : iterable
            As of `encode`.
        name : str
            Theirs in errors.
        warn : callable, optional
            Hears of what is doubtful, such as questions that are nearly the same. By default it is logged.
        """
        if self.ranks.size > 1 and isinstance(rows, Sequence) and not rows:
            return []  # of a step that has no question for this process
        rows = listed(rows, name, "without pairs to keep, forgetting takes all else along")
        made = self.encode(rows, name)
        data = self.questions, rows, self.prompts, made, self.encoder.tokenizer
        if cut := [number for number, s in enumerate(made, start=1) if s.cut]:
            (warn or self._warn)(self.encoder.cut_warning(name, cut, len(made)))
        for text in check_datasets(*data, allow=self.config.allow_overlap, name=name):
            (warn or self._warn)(text)
        return made

    def _warn(self, text: str) -> None:
        if self.ranks.rank == 0:
            logger.warning(text)

    def _check_ids(self, where: str, ids: Sequence[int]) -> None:
        known = self.model.get_input_embeddings().weight.shape[0]
        if unknown := [t for t in (min(ids), max(ids)) if not 0 <= t < known]:
            raise PMCError(
                f"{where} has token id {unknown[0]} but the model's are 0 to {known - 1}: use the model's own tokenizer"
            )

    def loss(self, part: Step, retain: Retain, *, model: Any = None, retain_tokens: int | None = None) -> Loss:
        """Return CE(sampled answers) + lambda CE(retain answers) of a micro-batch, as its share of the step's loss.

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
            Of all packs at once. `losses` gives one pack after the other, which bounds the memory.
        """
        made = list(self.losses(part, retain, model=model, retain_tokens=retain_tokens))
        loss = torch.stack([m.loss for m in made]).sum() if len(made) > 1 else made[0].loss
        counters = {name: sum(m.counters[name] for m in made) for name in made[0].counters}
        return Loss(loss, made[-1].collapse, made[-1].retain, counters)

    def losses(
        self, part: Step, retain: Retain, *, model: Any = None, retain_tokens: int | None = None
    ) -> Iterator[Loss]:
        """Yield the loss of each pack of at most max_tokens; `collapse` and `retain` are sums up to that pack.

        On several processes all yield equally many: a shorter one adds packs of weight 0, since backward is collective.
        """
        device = self.model.get_input_embeddings().weight.device
        if not self._checked:
            self._pass.check(self.autocast_dtype, model=model)
            self._checked = True
        kept = unpad(retain) if isinstance(retain, Mapping) else list(retain)
        if other := next((s for s in kept if not isinstance(s, Encoded)), None):
            raise PMCError(
                f"retain holds {type(other).__name__}: give a padded batch, or what encode_retain(rows) returns"
            )
        if not part.indices and self.config.normalization == "micro_batch":
            kept = []  # retain pairs come with questions, in their group
        collapse = [a for of in part.answers for a in of]
        packs = pack([*part.answers, *([s] for s in kept)], self.config.max_tokens)
        own_tokens = sum(map(num_targets, kept)) if retain_tokens is None else retain_tokens
        everyones = self.ranks.gather((len(packs), own_tokens))
        count = max(n for n, _ in everyones)
        if not count:
            raise PMCError("a micro-batch has no token to train on: all its answers are empty")
        if retain_tokens is None and part.parts > 1 and self.config.normalization == "step":
            raise PMCError(
                "normalization is 'step' and the step has several parts: give loss(..., retain_tokens=) the trained "
                "tokens of all its retain batches"
            )
        weights, lengths, scale = self._weights(part, kept, collapse, sum(n for _, n in everyones))
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # what `collapse` and `retain` report: each a mean over its own batch, whatever the weights in the loss are
        means = pmc_weights(lengths, weights, 1.0)
        for p in packs:
            row_scale, mean = (
                row_scales(of[p.sequences], p.cu_targets, p.targets, reduction="sum") for of in (scale, means)
            )
            is_retain = torch.tensor(p.sequences) >= len(collapse)
            with context.autocast(device, self.autocast_dtype):
                loss, logps = self._pass(p, row_scale, model=model)
            part_of = is_retain.repeat_interleave(p.cu_targets.diff()).long().to(device)
            sums = sums.index_add(0, part_of, -logps.double() * mean.double().to(device))
            yield Loss(loss, sums[0], sums[1], _counters(p))
        for _ in range(count - len(packs)):
            blank = pack([[Encoded([0, 0], [IGNORED, 0])]], 2)[0]
            with context.autocast(device, self.autocast_dtype):
                loss, _ = self._pass(blank, torch.zeros(1), model=model)
            yield Loss(loss, sums[0], sums[1], dict.fromkeys(_counters(blank), 0))

    def _weights(
        self, part: Step, retain: list[Encoded], collapse: list[Encoded], retain_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the collapse sequences' weights, all sequences' lengths, and their weights in the loss: float64."""
        weights = torch.tensor([w for of in part.weights for w in of], dtype=torch.float64)
        lengths = torch.tensor([num_targets(s) for s in [*collapse, *retain]], dtype=torch.float64)
        lambda_ = self.config.retain_weight
        # gradients are averaged over the processes: that makes sums of these means of groups, and means of tokens
        if self.config.normalization == "micro_batch":
            scale = pmc_weights(lengths, weights, lambda_) / part.groups
        else:
            scale = pmc_weights(lengths, weights, lambda_, (part.collapse_tokens, retain_tokens))
        return weights, lengths, scale * self.ranks.size

    def scores(self) -> list[float]:
        """Return the stored answers' scores, of the questions that have one."""
        return [self.store.score(i) for i in range(len(self.store)) if self.store.visits(i)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, JSON-ready. It holds generated answers: keep it as private as the data."""
        return {
            "store": self.store.state_dict(),
            "initial_answers": self.initial_answers,
            "initial_ids": self._initial_ids,
            "reward": self.scorer.name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a state of other questions is refused."""
        self.store.load_state_dict(state["store"])
        self.initial_answers, self._initial_ids = state["initial_answers"], state["initial_ids"]
        self.scorer = choose_scorer(state.get("reward", self.config.reward), self.initial_answers)


def _counters(p: Pack) -> dict[str, int]:
    return {"tokens": len(p), "targets": len(p.targets), "head_rows": len(p.hidden_rows), "packs": 1}
