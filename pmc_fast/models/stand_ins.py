"""Stand-ins for kernels, on tensors without data: they make and keep what the kernels do."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import patching
from .fused_layers import ROTARY, is_silu, modelling_files
from .layer_sources import is_gated_mlp, is_rms_norm, is_rotary

ATTENTION = "pmc_fast_pass_memory"


@dataclass(slots=True)
class Step:
    """A pass whose keys and values are noted."""

    device: str
    cached: dict[int, int]  # bytes of a pass's keys and values, by layer


class _Made(torch.autograd.Function):
    """Makes tensors of the shapes and types `made`; backward makes gradients like the inputs."""

    @staticmethod
    def forward(ctx: Any, made: Sequence[tuple[Any, torch.dtype]], kept: bool, *inputs: torch.Tensor) -> Any:
        ctx.like = [(t.shape, t.dtype) for t in inputs]
        out = tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in made)
        if kept:
            ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        like = zip(ctx.like, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(grads[0].new_empty(s, dtype=d) if need else None for (s, d), need in like)


class _Attended(torch.autograd.Function):
    """Keeps queries, keys, values, the output and a number for each row and head, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _attention(
    module: Any, query: Any, key: Any, value: Any, *args: Any, packed_segments: Any = None, **how: Any
) -> Any:
    step: Step = packed_segments
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    q, k, v = (t[0].transpose(0, 1).to(low if t.dtype == torch.float32 else t.dtype) for t in (query, key, value))
    step.cached[module.layer_idx] = 2 * k.numel() * k.element_size()  # values are widened to the size of keys
    made = _Attended.apply(q, k, v)
    if step.device == "cpu":
        made = made.clone()  # sequence by sequence, and then put together
    return made[None], None


patching.register_attention(ATTENTION, _attention)


@contextmanager
def kernels_replaced(model: Any) -> Iterator[None]:
    """Replace the layers that `FusedLayers` replaces."""

    def norm(module: Any) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            weight = module.weight
            _Made.apply([(x.shape[:-1], torch.float32)], False, x)
            (y,) = _Made.apply([(x.shape, torch.promote_types(x.dtype, weight.dtype))], True, x, weight)
            return y

        return forward

    def gated(module: Any) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            gate, up = module.gate_proj(x), module.up_proj(x)
            (y,) = _Made.apply([(gate.shape, gate.dtype)], True, gate, up)
            return module.down_proj(y)

        return forward

    def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, *rest: Any, **options: Any) -> Any:
        dtype = torch.promote_types(q.dtype, cos.dtype)
        return _Made.apply([(q.shape, dtype), (k.shape, dtype)], False, q, k)

    free = [m for m in model.modules() if "forward" not in vars(m)]
    replaced = {m: norm(m) for m in free if is_rms_norm(m)}
    replaced |= {m: gated(m) for m in free if hasattr(m, "act_fn") and is_gated_mlp(m) and is_silu(m.act_fn)}
    with ExitStack() as stack:
        stack.enter_context(patching.forwards(replaced))
        for file in modelling_files(model):
            if is_rotary(getattr(file, ROTARY)):
                stack.enter_context(patching.attribute(file, ROTARY, rotary))
        yield
