"""Lets a transformers model compute one step's rows over the shared pool, and leaves it as it was.

The model's own code runs unmodified on one packed sequence of tokens that need not be neighbours: an
attention function registered with transformers' attention interface writes their keys and values to the
pool and reads what each row sees. No transformers cache is involved, whose calls differ between versions.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface

from ..errors import PMCError
from ..lending import CpuLayers, replaced
from ..models import eval_mode
from ..ops.decode_attention import StepIndex, decode_attention
from ..ops.decode_layers import fast_linear_serves, linear

ATTENTION = "pmc_fast_rollout"
UNKNOWN = ("s_aux", "sinks", "position_bias", "head_mask")  # what an attention may add that ours does not know


class ModelStep:
    """A model's forward pass over rows of a rollout.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    autocast_dtype : torch.dtype, optional
        The dtype that training runs under with torch.autocast: the linear layers then read a copy of their
        weights in it, renewed by every `lend`.
    """

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None = None) -> None:
        self.model, self.autocast_dtype = model, autocast_dtype
        self._forget_buffers()
        self._index: StepIndex | None = None
        self._backend: str | None = None

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Set the model up for rollouts; put everything back at the end, also after an exception."""
        weight = self.model.get_input_embeddings().weight
        if (weight.device, weight.dtype) != (self.device, self._dtype):  # the model was moved
            self._forget_buffers()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(_attention(self.model))
            stack.enter_context(replaced(self._linears()))
            if self.device.type == "cpu" and self.autocast_dtype is None:
                stack.enter_context(self._layers.lend())
            stack.enter_context(self.autocast())
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that the model computes in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, index: StepIndex, rows: torch.Tensor, span: int
    ) -> torch.Tensor:
        """Compute a step and return the logits of some of its rows.

        Parameters
        ----------
        tokens, positions : int64 Tensor [R]
        index : StepIndex
            The slots that each row writes and sees.
        rows : int64 Tensor [L]
            Rows whose logits are wanted.
        span : int
            Slots that the pool must have.

        Returns
        -------
        float32 Tensor [L, V], or float64 for a float64 model on the CPU
        """
        self._reserve(span)
        self._index = index
        out = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            rollout_step=self,
        )
        self._index = None
        logits = out.logits[0]
        wide = logits.dtype == torch.float64 and self.device.type == "cpu"  # CUDA's sampler reads no float64
        return logits if wide else logits.float()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend in one layer: q [1, heads, R, dim], k and v [1, kv_heads, R, dim] -> [1, R, heads, dim]."""
        assert self._index is not None  # only `logits` calls the model
        if self.autocast_dtype is not None:  # as autocast does with torch's own attention: rotary kept float32
            q, k, v = (t.to(self.autocast_dtype) for t in (q, k, v))
        if layer not in self.pool:
            shape = (self._span, k.shape[1], k.shape[3])
            self.pool[layer] = (k.new_empty(shape), v.new_empty(shape))
            self.windows[layer] = window
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        k_pool, v_pool = self.pool[layer]
        return decode_attention(
            q, k, v, k_pool, v_pool, self._index, scale=scale, softcap=softcap, window=window, backend=self._backend
        )[None]

    def pool_bytes(self) -> int:
        """Return the memory that the pool takes now."""
        return sum(t.nbytes for pair in self.pool.values() for t in pair)

    def copy_bytes(self) -> int:
        """Return the memory of the weights' copies under autocast."""
        return sum(t.nbytes for pair in self._copies.values() for t in pair if t is not None)

    def _forget_buffers(self) -> None:
        weight = self.model.get_input_embeddings().weight
        self.device, self._dtype = weight.device, weight.dtype
        self.pool: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.windows: dict[int, int | None] = {}
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._layers = CpuLayers(self.model)
        self._span = 0

    def _reserve(self, span: int) -> None:
        if span <= self._span:
            return
        self._span = max(span, self._span * 3 // 2)
        for layer, pair in self.pool.items():
            self.pool[layer] = tuple(_longer(t, self._span) for t in pair)  # type: ignore[assignment]

    def _linears(self) -> dict[Any, Callable[..., torch.Tensor]]:
        forwards: dict[Any, Callable[..., torch.Tensor]] = {}
        for module in self.model.modules():
            if type(module) is not torch.nn.Linear or "forward" in vars(module):
                continue
            if self.autocast_dtype is not None and module.weight.dtype == torch.float32:
                weight, bias = self._copy(module)
                forwards[module] = functools.partial(torch.nn.functional.linear, weight=weight, bias=bias)
            elif self.autocast_dtype is None and fast_linear_serves(module.weight):
                forwards[module] = functools.partial(linear, weight=module.weight, bias=module.bias)
        return forwards

    def _copy(self, module: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
        key = id(module)
        if key not in self._copies:
            low = functools.partial(torch.empty_like, dtype=self.autocast_dtype, requires_grad=False)
            self._copies[key] = (low(module.weight), None if module.bias is None else low(module.bias))
        weight, bias = self._copies[key]
        weight.copy_(module.weight)
        if bias is not None:
            bias.copy_(module.bias)
        return weight, bias


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    rollout_step: ModelStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the pool; the signature is transformers' attention interface's."""
    name = type(module).__name__
    if rollout_step is None or getattr(module, "layer_idx", None) is None:
        raise PMCError(
            f"{name} does not hand its arguments on to the attention interface: this family is not supported"
        )
    for extra in UNKNOWN:
        if kwargs.get(extra) is not None:
            raise PMCError(f"{name} needs {extra} in its attention: this family is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rollout_step.attend(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


AttentionInterface.register(ATTENTION, attention)


@contextmanager
def _attention(model: Any) -> Iterator[None]:
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [
        (c, c._attn_implementation_internal) for c in configs.values() if hasattr(c, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _longer(tensor: torch.Tensor, size: int) -> torch.Tensor:
    longer = tensor.new_empty((size, *tensor.shape[1:]))
    longer[: tensor.shape[0]] = tensor
    return longer
