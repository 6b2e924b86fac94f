"""Partial Model Collapse for any training loop: prepare, sample, loss (arXiv 2507.04219, section 4)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from . import models, selection
from .config import PMCConfig
from .data import Encoded, Encoder, Row
from .data.encoding import IGNORED
from .data.packing import Pack, num_targets, pack, unpad
from .errors import PMCError
from .objectives import pmc_weights
from .ops import row_scales
from .packed_pass import PackedPass, causal_lm
from .reward import Reward, rouge_l_recall
from .rollout import RolloutEngine
from .store import BestStore

Retain = Mapping[str, torch.Tensor] | Sequence[Encoded]


@dataclass(frozen=True, slots=True)
class Step:
    """Questions of an optimizer step, or of one of its micro-batches, with the answers to train on."""

    indices: list[int]
    answers: list[list[Encoded]]  # of each question: one, or all N
    weights: list[list[float]]  # of each answer; a question's sum to 1
    micro_batches: int = 1  # of the optimizer step
    collapse_tokens: float = 0.0  # of the optimizer step, each answer's times its weight
    counters: dict[str, float] = field(default_factory=dict)  # of the rollout

    def split(self, size: int) -> list["Step"]:
        """Return micro-batches of at most `size` questions."""
        if size < 1:
            raise PMCError(f"size of a micro-batch is {size}: it must be at least 1")
        at = [slice(i, i + size) for i in range(0, len(self.indices), size)]
        return [
            replace(self, indices=self.indices[s], answers=self.answers[s], weights=self.weights[s], micro_batches=len(at))
            for s in at
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loss:
    """The loss of a micro-batch: backward it, step when all micro-batches of the step are done."""

    loss: torch.Tensor  # [], differentiable: its share of the step's loss
    collapse: torch.Tensor  # [], cross-entropy of the sampled answers; of all packs together if there are several
    retain: torch.Tensor  # [], cross-entropy of the retain answers, not multiplied by lambda
    counters: dict[str, int]  # tokens and targets computed, packs


class PMC:
    """The algorithm without a training loop.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model. Its live weights are sampled from; whoever calls `backward` and steps trains it.
    tokenizer : transformers.PreTrainedTokenizerBase
    config : PMCConfig
    questions : sequence of str, or of lists of int
        To be forgotten: texts, put into the prompt format, or prompts as token ids.
    positions : sequence of int list or None, optional
        Of each prompt's ids, where they are not 0, 1, ...; see `pmc_fast.data.packing.unpad`.
    reward : callable, optional
        (initial [Q], candidates [Q][N], min_len) -> [Q, N] in [0, 1]; 0: fully unlike.
    autocast_dtype : torch.dtype, optional
        What the model computes in under torch.autocast; rollouts and losses then enter it themselves.

    Raises
    ------
    PMCError
        A question that leaves no room for an answer; a model that is not supported, by name, on first use.

    Notes
    -----
    `step = pmc.sample(indices)` once an optimizer step, then `pmc.loss(part, retain).loss.backward()` for each
    part of `step.split(size)`: the gradients add up to the step's, whatever the number of parts.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: PMCConfig,
        questions: Sequence[str] | Sequence[list[int]],
        *,
        positions: Sequence[list[int] | None] | None = None,
        reward: Reward = rouge_l_recall,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.encoder = Encoder(tokenizer, config, None if config.accidents else model.generation_config)
        self.reward, self.autocast_dtype = reward, autocast_dtype
        self.engine = RolloutEngine(model, autocast_dtype=autocast_dtype)
        self.store = BestStore(len(questions))
        self.questions: list[Any] = list(questions)
        texts = isinstance(self.questions[0], str)
        if config.store == "text" and not texts:
            raise PMCError("store is 'text' but the questions are token ids: use store='ids'")
        self.keeps_text = texts and config.store != "ids"
        self.prompts = [self.encoder.prompt(q) if isinstance(q, str) else [int(t) for t in q] for q in self.questions]
        self.positions = [None] * len(self.prompts) if positions is None else list(positions)
        for i, prompt in enumerate(self.prompts):
            if len(prompt) >= config.max_length:
                raise PMCError(
                    f"question {i} takes {len(prompt)} tokens and leaves none of max_length {config.max_length} for an "
                    "answer: raise max_length or shorten it"
                )
        self.initial_answers: list[str] = []
        self._initial_ids: list[list[int]] = []
        self._pass = PackedPass(causal_lm(model))
        self._checked = False

    def prepare(self) -> list[str]:
        """Answer every forget question greedily with the untouched model, y_i, and return the answers."""
        made = self.engine(
            self.prompts, num_samples=1, temperature=0, max_length=self.config.max_length, stop_ids=self.encoder.stops,
            positions=self.positions,
        )  # fmt: skip
        self._initial_ids = [tokens for [tokens] in made.tokens]
        self.initial_answers = self.encoder.answers(self._initial_ids)
        if all(not y.split() for y in self.initial_answers):
            raise PMCError("every initial answer is empty: there is nothing to forget; check prompt_format")
        return self.initial_answers

    def sample(self, indices: Sequence[int]) -> Step:
        """Visit the questions of an optimizer step: sample where the store asks for it, keep the better answers.

        Parameters
        ----------
        indices : sequence of int
            Of all its micro-batches: the weights do not move between them, so one rollout serves all.
        """
        if not self.initial_answers:
            raise PMCError("there are no initial answers: call prepare() before the first step")
        indices = [int(i) for i in indices]
        asked = self.store.pending(list(dict.fromkeys(indices)))
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
        return Step(indices, answers, weights, 1, tokens, counters)

    def _visit(self, asked: list[int]) -> dict[str, float]:
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
        )
        texts = [self.encoder.samples(samples) for samples in made.tokens]
        initial = [self.initial_answers[i] for i in asked]
        scores = np.asarray(self.reward(initial, texts, c.min_len), dtype=np.float64)
        candidates: list[Any] = texts if self.keeps_text else made.tokens
        for row, (i, visit) in enumerate(zip(asked, visits, strict=True)):
            kept, score = self._select(candidates[row], scores[row], (c.seed, i, visit))
            self.store.offer(i, kept, score)
        return {name: float(n) for name, n in made.counters.items()}

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

    def encode_retain(self, rows: Sequence[Row]) -> list[Encoded]:
        """Encode retain pairs in the questions' prompt format."""
        return [self.encoder.pair(row.question, row.answer or "") for row in rows]

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
            Trained tokens of the retain batches of the whole step: needed where normalization is "step" and the
            step has several parts.

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
        """Yield the loss of each pack of at most max_tokens; `collapse` and `retain` are sums up to that pack."""
        device = self.model.get_input_embeddings().weight.device
        if not self._checked:
            self._pass.check(self.autocast_dtype, model=model)
            self._checked = True
        kept = unpad(retain) if isinstance(retain, Mapping) else list(retain)
        collapse = [a for of in part.answers for a in of]
        weights, lengths, scale = self._weights(part, kept, collapse, retain_tokens)
        packs = pack([*part.answers, *([s] for s in kept)], self.config.max_tokens)
        if not packs:
            raise PMCError("a micro-batch has no token to train on: all its answers are empty")
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        # what `collapse` and `retain` report: each a mean over its own batch, whatever the weights in the loss are
        means = pmc_weights(lengths, weights, 1.0)
        for p in packs:
            row_scale, mean = (
                row_scales(of[p.sequences], p.cu_targets, p.targets, reduction="sum").to(device)
                for of in (scale, means)
            )
            is_retain = torch.tensor(p.sequences) >= len(collapse)
            with models.autocast(device, self.autocast_dtype):
                loss, logps = self._pass(p.to(device), row_scale, model=model)
            part_of = is_retain.repeat_interleave(p.cu_targets.diff()).long().to(device)
            sums = sums.index_add(0, part_of, -logps.double() * mean.double())
            yield Loss(loss, sums[0], sums[1], _counters(p))

    def _weights(
        self, part: Step, retain: list[Encoded], collapse: list[Encoded], retain_tokens: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the collapse sequences' weights, all sequences' lengths, and their weights in the loss: float64."""
        weights = torch.tensor([w for of in part.weights for w in of], dtype=torch.float64)
        lengths = torch.tensor([num_targets(s) for s in [*collapse, *retain]], dtype=torch.float64)
        lambda_ = self.config.retain_weight
        if self.config.normalization == "micro_batch":
            return weights, lengths, pmc_weights(lengths, weights, lambda_) / part.micro_batches
        if retain_tokens is None:
            if part.micro_batches > 1:
                raise PMCError(
                    "normalization is 'step' and the step has several parts: give loss(..., retain_tokens=) the trained "
                    "tokens of all its retain batches"
                )
            retain_tokens = int(lengths[len(collapse) :].sum())
        return weights, lengths, pmc_weights(lengths, weights, lambda_, (part.collapse_tokens, retain_tokens))

    def scores(self) -> list[float]:
        """Return the stored answers' scores, of the questions that have one."""
        return [self.store.score(i) for i in range(len(self.store)) if self.store.visits(i)]

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, JSON-ready. It holds generated answers: keep it as private as the data."""
        return {
            "store": self.store.state_dict(),
            "initial_answers": self.initial_answers,
            "initial_ids": self._initial_ids,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; a state of other questions is refused."""
        self.store.load_state_dict(state["store"])
        self.initial_answers, self._initial_ids = state["initial_answers"], state["initial_ids"]


def _counters(p: Pack) -> dict[str, int]:
    return {"tokens": len(p), "targets": len(p.targets), "head_rows": len(p.hidden_rows), "packs": 1}
