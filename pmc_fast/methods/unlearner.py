"""A method's gradients on a model, in packed passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..config import PMCConfig
from ..data import Encoded, Encoder, Row, is_text
from ..data.packing import Pack, num_targets, pack
from ..errors import PMCError
from ..models.context import eval_mode
from ..models.packed_forward import PackedPass, causal_lm
from ..models.supported import check_float16, check_model, has_dropout
from ..models.teacher import Teacher
from ..utils.text import row_numbers
from .method import REFUSALS, Batch, Kind, Method

# weights below it are 0: beside those of other tokens they are lost in float32, and their gradients would be subnormal numbers,
# with which CPUs compute ten times slower. NPO's fall so far on answers that are forgotten.
NEGLIGIBLE = 1e-14
logger = logging.get_logger(__name__)


def check_rows(method: Method, forget: Sequence[Row], source: str = "forget") -> None:
    """Refuse rows that a method can't train on; `source` names them in errors.

    Raises
    ------
    PMCError
        Rows without an answer, where the method trains on it; texts to be continued, where it trains on refusals.
    """
    name = type(method).__name__
    if method.told and (silent := [n for n, row in enumerate(forget, start=1) if not row.answer]):
        raise PMCError(
            f"{source}, {row_numbers(silent)}: no answer is given, and {name} trains on the answers to be forgotten: give "
            "them, or use PMC or IDK"
        )
    if "template" in method.answers and (texts := [n for n, r in enumerate(forget, start=1) if is_text(r.question)]):
        raise PMCError(
            f"{source}, {row_numbers(texts)}: a text to be continued, and {name} trains on refusals, which continue no text: "
            "use PMC, or a method without refusals, such as NPO"
        )


def check_retain_loss(method: Method, config: PMCConfig) -> None:
    """Refuse retain_loss "kl" where a step would go nowhere: its gradient is 0 while the model is untouched.

    Raises
    ------
    PMCError
        A method that mixes gradients, of which the shortest mixture would be 0; one that trains on nothing else.
    """
    if config.retain_loss == "kl" and (method.apart or not method.answers):
        what = "mixes two losses' gradients" if method.apart else "trains on retain pairs alone"
        raise PMCError(
            f"retain_loss is 'kl' and {type(method).__name__} {what}: the divergence and its gradient are 0 while the model is untouched, "
            "which it would stay; use retain_loss='nll'"
        )


class Unlearner:
    """Trains with a method in any loop: `prepare` once, then `backward` in each step, with the loop's own optimizer.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    tokenizer : transformers.PreTrainedTokenizerBase
    config : PMCConfig
        Its prompt format, max_length, max_tokens and retain_loss are read.
    method : Method
    forget : sequence of Row
        Questions, with their answers if `method.told`.
    autocast_dtype : torch.dtype, optional
        As of `PMC`.

    Raises
    ------
    PMCError
        A method that needs the answers to be forgotten, and rows without; one that trains on refusals, and texts to be
        continued; an answer of which no token fits max_length; a model that is not supported.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: PMCConfig,
        method: Method,
        forget: Sequence[Row],
        *,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        check_model(model)
        check_float16(model, autocast_dtype)
        self.model, self.config, self.method = model, config, method
        self.encoder = Encoder(tokenizer, config, model.generation_config)
        self.packed = PackedPass(causal_lm(model), autocast_dtype=autocast_dtype)
        check_rows(method, forget)
        check_retain_loss(method, config)
        on_answers, on_retain = method.divergences
        self.retain_weight, self.divergences = method.retain_weight, (on_answers, on_retain)
        if config.retain_loss == "kl":
            self.retain_weight, self.divergences = 0.0, (on_answers, on_retain + method.retain_weight)
        self.questions = len(forget)
        self.answers: dict[Kind, list[Encoded]] = {kind: self._encode(kind, forget) for kind in method.answers}
        self.max_tokens = config.max_tokens  # of a pass; it may be lowered at any time
        self.prepared = False
        self._reference: dict[Kind, torch.Tensor] = {}
        self.teacher: Teacher | None = None

    def _encode(self, kind: Kind, forget: Sequence[Row]) -> list[Encoded]:
        texts = [
            row.answer or "" if kind == "forget" else REFUSALS[i % len(REFUSALS)] for i, row in enumerate(forget)
        ]
        pairs = [self.encoder.pair(row.question, text) for row, text in zip(forget, texts, strict=True)]
        if cut := [n for n, pair in enumerate(pairs, start=1) if not num_targets(pair)]:
            raise PMCError(
                f"forget, {row_numbers(cut)}: no token of the {kind} answer fits max_length {self.config.max_length}: raise "
                "max_length or shorten the question"
            )
        return pairs

    def prepare(self) -> None:
        """Compute what the method needs of the untouched model."""
        self.packed.check()
        if not self.method.linear and has_dropout(self.model):
            logger.warning(
                f"{type(self.method).__name__}: the weights of tokens are computed in a pass of its own, in which dropout draws other "
                "masks than in the pass with gradients: set dropout to 0 for the exact gradient"
            )
        if any(self.divergences):
            probe = self._packs([next(of[0] for of in self.answers.values())])[0]
            self.teacher = Teacher(self.model, self.packed, probe)
        with eval_mode(self.packed.base):
            for kind in self.method.reference:
                logps, offsets = self._logps(self.answers[kind])
                batch = Batch({kind: logps}, {kind: offsets}, {})
                self._reference[kind] = batch.sums(kind)
        self.prepared = True

    def backward(self, indices: Sequence[int], retain: Sequence[Encoded] = (), *, model: Any = None) -> float:
        """Add the gradients of a step's loss to the parameters' `.grad`, and return the loss.

        Parameters
        ----------
        indices : sequence of int
            Of forget questions, from 0.
        retain : sequence of Encoded
            Pairs to keep: `self.encoder.pair(question, answer)`.
        model : callable, optional
            What to call: the model as it is wrapped for training.
        """
        unprepared = any(self.divergences) and self.teacher is None
        if unprepared or set(self.method.reference) - set(self._reference):
            raise PMCError(
                f"{type(self.method).__name__} needs the untouched model's log-probs: call prepare() first"
            )
        if unknown := [i for i in indices if not 0 <= i < self.questions]:
            raise PMCError(f"index {unknown[0]} is none of {self.questions} questions: they are counted from 0")
        answers = {kind: [of[i] for i in indices] for kind, of in self.answers.items()}
        objective, scales = self._weights(answers, indices)
        on_answers, on_retain = self.divergences
        kept = [s for s in retain if num_targets(s)] if self.method.needs_retain else []
        count = sum(map(num_targets, kept))
        asked = [s for of in answers.values() for s in of]
        if not asked and not kept:
            raise PMCError(f"{type(self.method).__name__} has nothing to train on: give retain pairs")
        if not on_answers and not self.method.apart:  # a mixture counts them, weight or not
            weighed = [(s, scale) for s, scale in zip(asked, scales, strict=True) if scale.any()]
            asked, scales = [s for s, _ in weighed], [scale for _, scale in weighed]
        parts = [
            _Part(asked, scales, on_answers),
            _Part(kept, [torch.full((num_targets(s),), self.retain_weight / count) for s in kept], on_retain),
        ]
        if self.method.apart and all(part.sequences for part in parts):
            (forgotten, retained), divergence = self._apart(parts, model)
        else:
            (forgotten, retained), divergence = self._pass(parts, model)
        return (forgotten if objective is None else objective) + retained + divergence

    def _pass(self, parts: Sequence["_Part"], model: Any) -> tuple[list[float], float]:
        """Add the gradients of some parts; return each one's weighted cross-entropy, and their divergence."""
        sequences = [s for part in parts for s in part.sequences]
        scales = [scale for part in parts for scale in part.scales]
        shares = [share for part in parts for share in part.shares]
        part_of = torch.tensor([n for n, part in enumerate(parts) for _ in part.sequences])
        losses = torch.zeros(len(parts), dtype=torch.float64, device=self._device)
        divergence = torch.zeros((), dtype=torch.float64, device=self._device)
        for p in self._packs(sequences):
            lengths = p.cu_targets.diff()
            scale = torch.cat([scales[i] for i in p.sequences])
            diverging = torch.tensor([shares[i] for i in p.sequences]).repeat_interleave(lengths)
            if self.teacher is None:
                loss, logps = self.packed(p, scale, model=model)
            else:
                loss, logps, diverged = self.teacher.loss(p, sequences, scale, diverging, model=model)
                divergence += (diverged * diverging.to(diverged)).sum()
            loss.backward()
            of = part_of[p.sequences].repeat_interleave(lengths)
            losses.index_add_(0, of.to(self._device), -logps.double() * scale.to(self._device))
        return losses.tolist(), float(divergence)

    def _apart(self, parts: Sequence["_Part"], model: Any) -> tuple[list[float], float]:
        """Add the method's mixture of two parts' gradients; return as `_pass` does."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        earlier = [p.grad for p in parameters]
        losses, gradients, divergence = [], [], 0.0
        for part in parts:
            for p in parameters:
                p.grad = None
            [loss], diverging = self._pass([part], model)
            losses.append(loss)
            divergence += diverging
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        forget, retain = gradients
        share, rest = self.method.mixture(_inner(forget, forget), _inner(forget, retain), _inner(retain, retain))
        for p, before, f, r in zip(parameters, earlier, forget, retain, strict=True):
            p.grad = f.mul_(share).add_(r, alpha=rest)
            if before is not None:
                p.grad += before
        return losses, divergence

    @property
    def _device(self) -> torch.device:
        return self.packed.base.get_input_embeddings().weight.device

    def _weights(
        self, answers: dict[Kind, list[Encoded]], indices: Sequence[int]
    ) -> tuple[float | None, list[torch.Tensor]]:
        """Return the objective, unless it is linear, and of each sequence its tokens' scales, -d objective / d logp."""
        made = {}
        for kind, sequences in answers.items():
            if self.method.linear:  # the same wherever it is taken
                lengths = torch.tensor([0, *map(num_targets, sequences)])
                made[kind] = torch.zeros(int(lengths.sum())), lengths.cumsum(0)
            else:
                made[kind] = self._logps(sequences)
        logps = {kind: of.double().cpu().requires_grad_() for kind, (of, _) in made.items()}
        offsets = {kind: of for kind, (_, of) in made.items()}
        reference = {kind: of[list(indices)] for kind, of in self._reference.items()}
        objective = self.method.objective(Batch(logps, offsets, reference))
        if not logps:
            return None, []
        gradients = torch.autograd.grad(objective, list(logps.values()))
        scales = [
            torch.where(part.abs() < NEGLIGIBLE, 0.0, part).float()
            for gradient, of in zip(gradients, offsets.values(), strict=True)
            for part in (-gradient).split(of.diff().tolist())
        ]
        return None if self.method.linear else objective.item(), scales

    @torch.no_grad()
    def _logps(self, sequences: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probs of all sequences' targets, in order and on the host, and the sequences' offsets."""
        found: dict[int, torch.Tensor] = {}
        for p in self._packs(sequences):
            _, logps = self.packed(p, torch.zeros(len(p.targets)))
            found |= dict(zip(p.sequences, logps.double().cpu().split(p.cu_targets.diff().tolist()), strict=True))
        parts = [found[i] for i in range(len(sequences))]
        lengths = torch.tensor([0, *map(len, parts)])
        return torch.cat(parts), lengths.cumsum(0)

    def _packs(self, sequences: Sequence[Encoded]) -> list[Pack]:
        return pack([[s] for s in sequences], self.max_tokens)


@dataclass(frozen=True)
class _Part:
    """Sequences that a step trains on, the weight of each of their tokens, and that of their mean divergence."""

    sequences: list[Encoded]
    scales: list[torch.Tensor]
    divergence: float

    @property
    def shares(self) -> list[float]:
        """The weight of each token's divergence, sequence by sequence."""
        tokens = sum(map(num_targets, self.sequences))
        return [self.divergence / tokens for _ in self.sequences]


def _inner(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    products = [x.flatten().float().dot(y.flatten().float()) for x, y in zip(a, b, strict=True)]
    return float(torch.stack(products).double().sum())
