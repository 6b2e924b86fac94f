"""What a run will hold in memory, item by item, from the model's shape, the settings and the lengths of the data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import UnlearnConfig
from ..errors import PMCError
from ..methods import Method
from ..models.pass_memory import PassMemory, Shape, Sizes
from ..ops.adamw import replaces_torchs
from ..ops.divergence import HELD
from ..ops.nll_cpu import VOCAB_BLOCK, Cpu
from ..ops.nll_cuda import Cuda
from ..ops.weighted_nll import WORKSPACE
from ..rollout.inputs import PROMPT_ROWS
from ..rollout.request import MAX_ROWS
from .methods import method_of

GIB = 1 << 30
CONTEXT = 600 << 20  # CUDA's context, kernels, libraries
# what the allocator rounds up and can't use: less of what is allocated once, in large pieces
MARGINS = {True: 0.01, False: 0.05}
# what is held at different times: the sum of the largest counts
PHASES = {
    "rollout": "in a rollout",
    "head": "at the end of a forward pass",
    "backward": "in backward",
    "embedding": "at the end of backward",
    "optimizer": "in an optimizer step",
}
ALWAYS = tuple(PHASES)
STEP = ("head", "backward", "embedding", "optimizer")
# moments that optimizers keep of each number, by the beginning of their names
MOMENTS = {"adamw": 2, "stable_adamw": 2, "paged_adamw": 2, "lion": 1, "paged_lion": 1, "rmsprop": 1, "adagrad": 1,
           "ademamix": 3, "paged_ademamix": 3, "sgd": 0}  # fmt: skip
BLOCK_SCALES = 1 + 4 / 256  # an 8-bit moment has a float32 scale for each block


@dataclass(frozen=True, slots=True)
class Amount:
    """At most, and as expected where that is known."""

    most: float
    expected: float | None = None

    def get(self, expected: bool) -> float:
        return self.expected if expected and self.expected is not None else self.most


@dataclass(frozen=True, slots=True)
class Work:
    """What one process computes in a step and holds in a rollout."""

    tokens: Amount  # of an optimizer step's sequences
    targets: Amount
    longest: int  # tokens that can't be divided among packs
    slots: Amount  # tokens whose keys and values a rollout holds
    least_slots: int
    enough_slots: int  # for the samples of a step at once; fewer make prompts wait
    rows: int  # whose logits a rollout's step computes


@dataclass(frozen=True, slots=True)
class Choice:
    """How a run's memory is bounded; none of it changes results by more than rounding."""

    max_tokens: int
    cuda_graphs: bool
    graph_tokens: int | None = None  # the largest pack that a graph is captured of; None: any
    pool_tokens: int | None = None  # of keys and values; None: as many as are needed
    checkpointing: bool = False

    @classmethod
    def of(cls, config: UnlearnConfig, device: str) -> "Choice":
        """Return what the settings say."""
        return cls(config.max_tokens, config.cuda_graphs and device == "cuda")


@dataclass(frozen=True, slots=True)
class Item:
    """Memory for one thing."""

    name: str
    phases: tuple[str, ...]
    most: float
    expected: float


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All that a run holds."""

    items: tuple[Item, ...]
    unknown: tuple[str, ...]  # what could not be counted

    def at(self, phase: str, *, expected: bool = False) -> float:
        """Return the bytes that are held in a phase."""
        held = ((i.expected if expected else i.most, i.phases == ALWAYS) for i in self.items if phase in i.phases)
        return sum(n * (1 + MARGINS[always]) for n, always in held)

    def peak(self, *, expected: bool = False) -> tuple[float, str]:
        """Return the largest sum of a phase, and which that is."""
        return max((self.at(phase, expected=expected), phase) for phase in PHASES)

    def warnings(self) -> list[str]:
        """Return a warning for each thing that is not counted."""
        return [f"memory: not counted, so the run may hold more than is said: {what}" for what in self.unknown]


class Memory:
    """Makes plans of one run.

    Parameters
    ----------
    config : UnlearnConfig
    shape : Shape
    work : Work
    device : {"cpu", "cuda"}
    low : torch.dtype, optional
        Of autocast.
    """

    def __init__(self, config: UnlearnConfig, shape: Shape, work: Work, device: str, low: torch.dtype | None) -> None:
        self.config, self.shape, self.work, self.device, self.low = config, shape, work, device, low
        self.sizes: Sizes = shape.sizes
        self.param_dtype, self.computes_in = shape.dtype, low or shape.dtype

    def plan(self, choice: Choice) -> MemoryPlan:
        """Return what a run holds under a choice."""
        items: list[Item] = []
        unknown: list[str] = []

        def add(name: str, phases: Sequence[str], most: float, expected: float | None = None) -> None:
            if most:
                items.append(Item(name, tuple(phases), most, most if expected is None else expected))

        self._add_weights(add, unknown, choice)
        try:
            passes = self.passes(choice)
        except PMCError as error:
            unknown.append(str(error))
            passes = PassMemory.nothing()
        self._add_rollout(add, passes, choice)
        self._add_training(add, passes, choice)
        if self.device == "cuda":
            add("CUDA context", ALWAYS, CONTEXT)
        return MemoryPlan(tuple(items), tuple(unknown))

    def passes(self, choice: Choice) -> PassMemory:
        """Return what the model's passes hold under a choice."""
        return self.shape.passes(self.device, self.low, checkpointing=choice.checkpointing)

    def _add_weights(self, add: Any, unknown: list[str], choice: Choice) -> None:
        s, c = self.sizes, self.config
        trained = sum(s.trained.values())
        low = sum(n for dtype, n in s.trained.items() if dtype.itemsize < 4)
        masters = 0 if c.allow_pure_bf16 else low
        add("parameters", ALWAYS, _bytes(s.trained) + _bytes(s.frozen))
        add("float32 masters", ALWAYS, 4 * masters)
        moments = _moments(c.optimizer, s)
        if moments is None:
            unknown.append(f"what the optimizer {c.optimizer} keeps")
        pure = low if c.allow_pure_bf16 and "8bit" not in c.optimizer else 0
        add("moments of the optimizer", ALWAYS, (moments or 0) * (1 - pure / max(1, 2 * trained)))
        one_pass = self.work.tokens.most <= choice.max_tokens  # then gradients come as activations go
        eager = ("embedding", "optimizer") if one_pass else STEP
        # graphs write to the same gradients again and again; else they end with the step
        add("gradients", ALWAYS if self.replays(choice) else eager, _bytes(s.trained))
        method = method_of(c)
        if _compares(c, method) and not getattr(c, "lora", False):  # an adapter is switched off instead
            add("the untouched model", ALWAYS, _bytes(s.trained) + _bytes(s.frozen))
        if method is not None and method.apart:
            add("gradients of one loss alone", STEP, _bytes(s.trained))
        adam = c.optimizer in ("adamw_torch", "adamw_torch_fused")
        at_once = adam and replaces_torchs(self.device, c.optimizer == "adamw_torch_fused")
        if masters and not at_once:
            add("float32 gradients for masters", ("optimizer",), 4 * masters)
        if (
            c.optimizer in ("adamw_torch", "adagrad", "rmsprop")
            and self.device == "cuda"
            and not (masters and at_once)
        ):
            add("temporaries of the optimizer", ("optimizer",), 4 * trained)

    def _add_rollout(self, add: Any, passes: PassMemory, choice: Choice) -> None:
        s, work = self.sizes, self.work
        if self.low is not None:
            add(f"{_name(self.low)} weights for rollouts", ALWAYS, self.low.itemsize * s.linear)
        else:
            add("merged weights for rollouts", ALWAYS, s.adapted)
        if self.config.rollout_dtype == "fp8":
            add("8-bit weights for rollouts", ALWAYS, s.multiplied)
        limit = work.slots.most if choice.pool_tokens is None else choice.pool_tokens
        ahead = 1.5  # a pool grows by a half, or to twice its size
        slots = [limit, min(limit, ahead * work.slots.get(expected=True))]
        add("keys and values of a rollout", ALWAYS, *(n * passes.cached for n in slots))
        rows = passes.forward.each * MAX_ROWS[self.device]
        logits = work.rows * s.vocab * (4 + self.computes_in.itemsize % 4)
        if choice.cuda_graphs:
            add("CUDA graphs of rollouts", ALWAYS, passes.forward.each * max(work.rows, PROMPT_ROWS) + logits)
            add("logits of a rollout", ALWAYS, work.rows * s.vocab * 4)
            add("layers of a rollout", ("rollout",), rows)
        else:
            add("layers and logits of a rollout", ("rollout",), rows + logits)

    def _add_training(self, add: Any, passes: PassMemory, choice: Choice) -> None:
        work = self.work
        largest = max(min(choice.max_tokens, work.tokens.most), work.longest)
        both = [min(largest, work.tokens.get(expected)) for expected in (False, True)]
        if self.replays(choice):
            graphs = [min(n, choice.graph_tokens or largest) for n in both]
            held = [max(self._held(passes, n).values()) for n in graphs]
            add("CUDA graphs of training passes", ALWAYS, *held)
        method = method_of(self.config)
        if _compares(self.config, method):
            targets = [work.targets.get(expected) for expected in (False, True)]
            logits = [min(WORKSPACE, HELD * 4 * self.sizes.vocab * n) for n in targets]
            add("logits of the divergence", ("head", "backward"), *logits)
        most, expected = (self._parts(passes, n) for n in both)
        for (name, phases), n in most.items():
            add(name, phases, n, expected[name, phases])

    def replays(self, choice: Choice) -> bool:
        """Return whether CUDA graphs of training passes are captured: not of other methods' passes."""
        method = method_of(self.config)
        return choice.cuda_graphs and method is None and not _compares(self.config, method)

    def _held(self, passes: PassMemory, tokens: float) -> dict[str, float]:
        """Return what a captured training pass holds in each phase."""
        parts = self._parts(passes, tokens, in_place=True)
        return {phase: sum(n for (_, phases), n in parts.items() if phase in phases) for phase in PHASES}

    def _parts(
        self, passes: PassMemory, tokens: float, *, in_place: bool = False
    ) -> dict[tuple[str, tuple[str, ...]], float]:
        """Return what a training pass holds; `in_place`: the head's gradient is added to the one that is there."""
        s = self.sizes
        share = self.work.targets.most / max(1, self.work.tokens.most)
        forward, start, kept = self._head(tokens * min(1.0, share), in_place)
        embedding = s.vocab * s.width * next(iter(s.trained)).itemsize if s.embedded else 0
        waits = kept if s.tied else 0  # for the embedding's, with which it is one gradient
        return {
            ("activations of a training pass", ("head", "backward")): passes.saved.of(tokens),
            ("logits of the head", ("head",)): forward,
            ("temporaries of backward", ("backward",)): max(start, waits + passes.backward.of(tokens)),
            ("gradient of the embedding", ("embedding",)): waits + embedding,
        }

    def _head(self, rows: float, in_place: bool) -> tuple[float, float, float]:
        """Return what `weighted_nll` holds in forward and when backward begins, and its gradient's size."""
        s, item, on_cpu = self.sizes, self.computes_in.itemsize, self.device == "cpu"
        if not s.vocab:
            return 0, 0, 0  # of a model of which nothing is known
        kernels: Any = Cpu if on_cpu else Cuda
        shapes = [(math.ceil(rows), s.width), (s.vocab, s.width)]
        hidden_rows, head = (torch.empty(n, dtype=self.computes_in, device="meta") for n in shapes)
        weight, wide = head.numel(), kernels.logits_dtype(head).itemsize
        whole, hidden = rows * s.vocab * wide, 2 * rows * s.width * item
        cast = weight * item if self.low is not None and self.param_dtype == torch.float32 else 0
        cast += VOCAB_BLOCK * s.width * 4 if on_cpu and item < 4 else 0
        # packs of fewer rows may fill a chunk that those of `rows` do not: they are divided equally
        chunk = min(kernels.most_rows(head, WORKSPACE) * s.vocab * wide, whole)
        if not s.head_trained:
            return cast + chunk + hidden, hidden, 0
        gradient = 0 if in_place else weight * wide + (weight * item if wide != item else 0)
        if kernels.keeps(hidden_rows, head, WORKSPACE):  # d(logits) are kept, and backward forms the gradient
            kept = whole + rows * s.width * wide + hidden
            return cast + kept, kept + gradient, 0 if in_place else weight * item
        total = weight * max(4, item)  # chunks add up in float32
        narrowed = weight * item if item < 4 else 0
        return cast + hidden + total + max(chunk, narrowed), hidden + 2 * weight * item, weight * item


def _compares(config: UnlearnConfig, method: Method | None) -> bool:
    """Return whether a loss compares the model's distributions with the untouched model's."""
    weight = config.retain_weight if method is None else method.retain_weight
    return bool(config.retain_loss == "kl" and weight) or (method is not None and any(method.divergences))


def _bytes(numbers: Any) -> int:
    return sum(n * dtype.itemsize for dtype, n in numbers.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _moments(optimizer: str, sizes: Sizes) -> float | None:
    """Return the bytes that an optimizer keeps, or None if that is not known."""
    trained = sum(sizes.trained.values())
    if optimizer == "adafactor":
        return 4.0 * sizes.factors
    known = [n for name, n in MOMENTS.items() if optimizer.startswith(name)]
    if not known or optimizer == "adamw_anyprecision":
        return None
    bits = next((bits for bits in (4, 8) if f"{bits}bit" in optimizer), 32)
    if bits == 32:
        return 4.0 * known[0] * trained
    wide = 0 if optimizer.startswith("adamw_torch") else sizes.embedded  # bitsandbytes keeps embeddings' in float32
    return known[0] * (4 * wide + BLOCK_SCALES * bits / 8 * (trained - wide))
