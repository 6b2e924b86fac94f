"""What a model's passes hold in memory, from its shape alone.

A pass runs through a few of the layers on tensors without data, with stand-ins for kernels (`stand_ins`).
What more layers and more tokens take is proportional.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import PMCError
from . import patching
from .context import autocast
from .fused_layers import use_checkpointing
from .stand_ins import ATTENTION, Step, kernels_replaced

FEW, MORE = 1024, 2048  # tokens of the two passes whose difference is what a token takes


@dataclass(frozen=True, slots=True)
class Bytes:
    """An amount of memory that grows with the number of tokens."""

    fixed: float = 0.0
    each: float = 0.0

    def of(self, tokens: float) -> float:
        """Return the bytes for a number of tokens."""
        return self.fixed + self.each * tokens

    def plus(self, other: "Bytes", times: float = 1.0) -> "Bytes":
        return Bytes(self.fixed + times * other.fixed, self.each + times * other.each)


@dataclass(frozen=True, slots=True)
class PassMemory:
    """What a model's passes hold beside parameters and their gradients."""

    saved: Bytes  # from forward until backward
    backward: Bytes  # more than that, while backward runs
    forward: Bytes  # in a pass without gradients
    cached: float  # keys and values of a token

    @classmethod
    def nothing(cls) -> "PassMemory":
        """Return what is counted where nothing is known."""
        return cls(Bytes(), Bytes(), Bytes(), 0.0)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers in a model's parameters."""

    frozen: Counter[torch.dtype]
    trained: Counter[torch.dtype]
    embedded: int  # trained, in embeddings
    factors: int  # rows and columns of trained matrices: what a factored second moment has
    linear: int  # of float32, in linear layers
    multiplied: int  # of any type, in linear layers
    adapted: int  # bytes of float32 or float64, in layers with an adapter
    vocab: int
    width: int
    head_trained: bool
    tied: bool

    @classmethod
    def nothing(cls) -> "Sizes":
        """Return what is counted where nothing is known."""
        return cls(Counter(), Counter(), 0, 0, 0, 0, 0, 0, 0, False, False)


class Shape:
    """A model without data.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    dtype : torch.dtype
        Of the parameters.
    prepare : callable, optional
        Makes of the model what is trained, such as PEFT's around it.

    Notes
    -----
    Of a model that can't be made without data nothing is counted: its sizes are 0, and `passes` says why.
    """

    def __init__(self, config: Any, dtype: torch.dtype, prepare: Callable[[Any], Any] = lambda model: model) -> None:
        self.dtype = dtype
        self.base: Any = None
        self.model: Any = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, PassMemory] = {}
        self._why: PMCError | None = None
        try:
            self._make(config, prepare)
            self.sizes = self._sizes()
        except PMCError:  # of settings: the run would raise it too
            raise
        except Exception as error:  # whatever a modelling file does where there are no numbers
            self.sizes = Sizes.nothing()
            self._why = PMCError(f"what {config.model_type} holds: it can't be made without data ({_reason(error)})")

    @property
    def supports_checkpointing(self) -> bool:
        """Whether layers can be computed again in backward."""
        return getattr(self.base, "supports_gradient_checkpointing", False)

    def _make(self, config: Any, prepare: Callable[[Any], Any]) -> None:
        import transformers

        with torch.device("meta"):
            self.base = transformers.AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=False
            )
            self.model = prepare(self.base).train()
        with self._mode:
            _make_fake(self.model)

    def _sizes(self) -> Sizes:
        parameters = list(self.model.parameters())  # each once
        trained = [p for p in parameters if p.requires_grad]
        modules = list(self.model.modules())
        embeddings = {m.weight for m in modules if isinstance(m, torch.nn.Embedding)}
        linear = [m.weight for m in modules if type(m) is torch.nn.Linear]
        adapted = [m.base_layer.weight for m in modules if hasattr(m, "base_layer")]
        head = self.base.get_output_embeddings().weight
        return Sizes(
            frozen=_by_dtype(p for p in parameters if not p.requires_grad),
            trained=_by_dtype(trained),
            embedded=sum(w.numel() for w in embeddings if w.requires_grad),
            factors=sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for p in trained),
            linear=sum(w.numel() for w in linear if w.dtype == torch.float32),
            multiplied=sum(w.numel() for w in linear),
            adapted=sum(w.nbytes for w in adapted if w.dtype in (torch.float32, torch.float64)),
            vocab=head.shape[0],
            width=head.shape[1],
            head_trained=head.requires_grad,
            tied=head is self.base.get_input_embeddings().weight,
        )  # fmt: skip

    def passes(self, device: str, low: torch.dtype | None, *, checkpointing: bool = False) -> PassMemory:
        """Return what passes hold.

        Parameters
        ----------
        device : {"cpu", "cuda"}
            Whose kernels are counted.
        low : torch.dtype, optional
            Of autocast.
        checkpointing : bool
            Keep each layer's input alone, and compute the layer again in backward.

        Raises
        ------
        PMCError
            What the layers hold depends on numbers, as in a mixture of experts; or there is no model.
        """
        if self._why is not None:
            raise self._why
        key = device, low, checkpointing
        if key not in self._known:
            try:
                self._known[key] = self._extrapolated(*key)
            except Exception as error:  # whatever a modelling file asks of numbers that are not there
                name = type(self.base).__name__
                raise PMCError(
                    f"{name}: what its passes hold can't be counted without data ({_reason(error)})"
                ) from error
        return self._known[key]

    def _extrapolated(self, device: str, low: torch.dtype | None, checkpointing: bool) -> PassMemory:
        """Count a pass through one layer of each kind, and add what one more of a kind holds for all that are left."""
        layers = _layers(self.base)
        kinds: dict[Any, list[Any]] = {}
        for layer in layers:
            kinds.setdefault(tuple((n, p.shape) for n, p in layer.named_parameters()), []).append(layer)
        some = [own[0] for own in kinds.values()]

        def run(chosen: Sequence[Any]) -> PassMemory:
            modules = {str(i): layer for i, layer in enumerate(chosen)}
            with patching.attribute(layers, "_modules", modules) if chosen else ExitStack():
                return self._counted(device, low)

        own_dtype = self.base.get_input_embeddings().weight.dtype
        fused = not checkpointing and (device == "cuda" or (own_dtype == torch.float32 and low is None))
        with ExitStack() as stack:
            stack.enter_context(patching.ONE_AT_A_TIME)
            # it would print what fails, which is an answer here
            stack.enter_context(patching.attribute(logging.getLogger(FakeTensorMode.__module__), "disabled", True))
            stack.enter_context(self._mode)
            stack.enter_context(patching.attention(self.base, ATTENTION))
            if fused:
                stack.enter_context(kernels_replaced(self.model))
            if checkpointing:
                stack.enter_context(_checkpointed(self.base))
            total = one = run(some)
            for own in kinds.values():
                if len(own) > 1:
                    total = _more_layers(total, one, run([*some, own[1]]), len(own) - 1)
        return total

    def _counted(self, device: str, low: torch.dtype | None) -> PassMemory:
        few, more = (self._run(device, low, tokens) for tokens in (FEW, MORE))
        each = [(b - a) / (MORE - FEW) for a, b in zip(few, more, strict=True)]
        saved, backward, forward = (Bytes(a - e * FEW, e) for a, e in zip(few[:3], each[:3], strict=True))
        return PassMemory(saved, backward, forward, few[3] / FEW)

    def _run(self, device: str, low: torch.dtype | None, tokens: int) -> tuple[float, float, float, float]:
        embeddings = self.base.get_input_embeddings()
        weight = embeddings.weight
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.empty_like(p)  # gradients are added to it
        known = [ids, positions, *self.model.parameters(), *self.model.buffers(), *(p.grad for p in trained)]

        def embedded(ids: torch.Tensor) -> torch.Tensor:  # without the embedding's gradient, which comes at the end
            return weight.new_empty((*ids.shape, weight.shape[1])).requires_grad_(weight.requires_grad)

        cached: dict[int, int] = {}

        def call(cached: dict[int, int]) -> torch.Tensor:
            step = Step(device, cached)
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, packed_segments=step)
            return out.logits

        with (
            patching.forward(embeddings, embedded),
            patching.forward(self.base.get_output_embeddings(), lambda hidden: hidden[..., :1]),
            autocast(torch.device("cpu"), low),
        ):
            with _Live(known) as plain, torch.no_grad():
                call(cached)
            with _Live(known) as live:
                out = call({})
                torch.clear_autocast_cache()  # what autograd keeps is still there
                saved = live.now
                live.peak = 0
                out.sum().backward()
        for p in trained:
            p.grad = None
        return saved, max(0, live.peak - saved), plain.peak, sum(cached.values())


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _checkpointed(base: Any) -> Iterator[None]:
    before = [(m, dict(vars(m))) for m in base.modules() if hasattr(m, "gradient_checkpointing")]
    use_checkpointing(base)
    try:
        yield
    finally:
        for module, own in before:
            module.gradient_checkpointing = own.get("gradient_checkpointing", False)


def _make_fake(model: Any) -> None:
    """Put tensors without data, but with a device, in the place of a model's own: autocast asks for the device."""
    new: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            for name, t in kind.items():
                if t is not None:
                    if id(t) not in new:
                        made = torch.empty(t.shape, dtype=t.dtype, device="cpu")
                        new[id(t)] = torch.nn.Parameter(made, t.requires_grad) if kind is module._parameters else made
                    kind[name] = new[id(t)]


def _by_dtype(parameters: Any) -> Counter[torch.dtype]:
    found: Counter[torch.dtype] = Counter()
    for p in parameters:
        found[p.dtype] += p.numel()
    return found


def _layers(base: Any) -> Any:
    """Return the list of a model's layers: the one that holds most parameters."""
    lists = [m for m in base.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def _more_layers(total: PassMemory, one: PassMemory, two: PassMemory, times: int) -> PassMemory:
    saved = total.saved.plus(two.saved, times).plus(one.saved, -times)
    return PassMemory(saved, total.backward, total.forward, total.cached + times * (two.cached - one.cached))


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that operations have made and that are still there, but for `known` ones."""

    def __init__(self, known: Sequence[torch.Tensor | None]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known if t is not None}
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
