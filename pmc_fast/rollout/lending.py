"""Layers that a float32 model on the CPU lends for the time of a rollout: our kernels do each in one pass."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from ..ops.decode_layers import rms_norm, rotary, silu_mul

ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files


@contextmanager
def replaced(forwards: dict[Any, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Give modules another forward, and take it away again."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


class CpuLayers:
    """RMS norms, gated MLPs and rotary embeddings of a float32 model that our one-pass kernels can replace.

    Which ones can is found by trying: a replacement must give what the layer gives on numbers made up for it.
    In torch each of these layers reads and writes its rows several times.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._found: dict[Any, Callable[..., torch.Tensor]] | None = None
        self._rotaries: list[ModuleType] = []

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Replace what can be; put all back at the end."""
        if self._found is None:
            self._found = self._find()
            self._rotaries = [m for m in _modelling_files(self.model) if _rotates_halves(getattr(m, ROTARY))]
        originals = [(module, getattr(module, ROTARY)) for module in self._rotaries]
        with replaced(self._found):
            try:
                for module, original in originals:
                    setattr(module, ROTARY, functools.partial(_rotate, original))
                yield
            finally:
                for module, original in originals:
                    setattr(module, ROTARY, original)

    def _find(self) -> dict[Any, Callable[..., torch.Tensor]]:
        found = {}
        for module in self.model.modules():
            if "forward" not in vars(module):
                forward = _rms_norm_of(module) or _gated_mlp_of(module)
                if forward is not None:
                    found[module] = forward
        return found


def _rms_norm_of(module: Any) -> Callable[..., torch.Tensor] | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor) and weight.dim() == 1):
        return None
    if weight.dtype != torch.float32 or not isinstance(eps, float):
        return None
    x = torch.linspace(-2, 3, 2 * weight.shape[0]).reshape(2, -1)
    expected = module(x)
    for offset in (0.0, 1.0):
        if torch.allclose(rms_norm(x, weight, eps, offset), expected, rtol=1e-5, atol=1e-6):
            # the parameter is looked up at each call: it may be another one by then
            return lambda x: rms_norm(x, module.weight, eps, offset)
    return None


def _gated_mlp_of(module: Any) -> Callable[..., torch.Tensor] | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(isinstance(p, torch.nn.Module) for p in parts) or not hasattr(module, "act_fn"):
        return None
    weight = getattr(parts[0], "weight", None)
    if weight is None or weight.dtype != torch.float32 or weight.dim() != 2:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        return module.down_proj(silu_mul(gate, up))

    x = torch.linspace(-2, 3, 2 * weight.shape[1]).reshape(1, 2, -1)
    ours, expected = forward(x), module(x)
    return forward if (ours - expected).abs().max() <= 1e-5 * expected.abs().max() else None


def _modelling_files(model: Any) -> list[ModuleType]:
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), ROTARY)]


def _rotates_halves(function: Callable[..., Any]) -> bool:
    q = torch.linspace(-1, 2, 2 * 3 * 8).reshape(1, 2, 3, 8)
    cos, sin = torch.linspace(0, 1, 24).reshape(1, 3, 8), torch.linspace(-1, 1, 24).reshape(1, 3, 8)
    try:
        expected = function(q, q[:, :1], cos, sin)
    except (TypeError, RuntimeError):  # another signature: complex numbers, position ids
        return False
    ours = (rotary(q, cos, sin), rotary(q[:, :1], cos, sin))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, expected, strict=True))


def _rotate(
    original: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """Rotate a step's rows; hand on whatever else comes here, such as another model's training step."""
    plain = not rest and not options and cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1
    float32 = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (q, k, cos, sin))
    lasts = all(t.stride(-1) == 1 for t in (q, k)) and cos.is_contiguous() and sin.is_contiguous()
    if not (plain and float32 and lasts) or torch.is_grad_enabled() or k.shape[2:] != q.shape[2:] or q.shape[-1] % 2:
        return original(q, k, cos, sin, *rest, **options)
    return rotary(q, cos, sin), rotary(k, cos, sin)
