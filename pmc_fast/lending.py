"""Layers that a float32 model on the CPU lends for a while: our kernels do each in one pass."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch

from . import patching
from .ops import decode_layers, train_layers
from .ops.decode_layers import fast_linear_serves

THIN = 64  # linear layers of fewer inputs or outputs, such as LoRA's, are torch's: panels bring them nothing
ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files

Forward = Callable[..., torch.Tensor]


@contextmanager
def replaced(forwards: dict[Any, Forward]) -> Iterator[None]:
    """Give modules another forward, and take it away again."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(patching.forward(module, forward))
        yield


class CpuLayers:
    """RMS norms, gated MLPs and rotary embeddings of a float32 model that our one-pass kernels can replace.

    Which ones can is found by trying: a replacement must give what the layer gives on numbers made up for it.
    In torch each of these layers reads and writes its rows several times.

    Parameters
    ----------
    model : torch.nn.Module
    training : bool
        Lend layers with gradients, linear ones (torch.nn.Linear, where AVX-512 is) included. Lend around the
        forward pass; backward may come after. Without, what is lent has no gradients, for rollouts.
    """

    def __init__(self, model: Any, training: bool = False) -> None:
        self.model, self.training = model, training
        self._ops = train_layers if training else decode_layers
        self._found: dict[Any, Forward] | None = None
        self._rotaries: list[ModuleType] = []

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Replace what can be; put all back at the end.

        Nothing is lent under autocast. For training nothing is where layers are checkpointed either:
        checkpoints recompute layers in backward, when these are torch's again, and demand the same of them.
        """
        if torch.is_autocast_enabled("cpu") or (self.training and checkpointed(self.model)):
            yield
            return
        if self._found is None:
            with torch.no_grad():
                self._found = self._find()
                self._rotaries = [m for m in _modelling_files(self.model) if self._rotates_halves(getattr(m, ROTARY))]
        originals = [(module, getattr(module, ROTARY)) for module in self._rotaries]
        free = {m: forward for m, forward in self._found.items() if "forward" not in vars(m)}
        if self.training:
            free |= {m: self._linear(m) for m in self.model.modules() if _is_plain_linear(m)}
        with replaced(free):
            try:
                for module, original in originals:
                    setattr(module, ROTARY, functools.partial(self._rotate, original))
                yield
            finally:
                for module, original in originals:
                    setattr(module, ROTARY, original)

    def _find(self) -> dict[Any, Forward]:
        found = {}
        for module in self.model.modules():
            if "forward" not in vars(module):
                forward = self._rms_norm_of(module) or self._gated_mlp_of(module)
                if forward is not None:
                    found[module] = forward
        return found

    def _rms_norm_of(self, module: Any) -> Forward | None:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor) and weight.dim() == 1):
            return None
        if not (_plain(weight) and isinstance(eps, float)):
            return None
        original = module.forward
        x = torch.linspace(-2, 3, 2 * weight.shape[0]).reshape(2, -1)
        expected = original(x)
        for offset in (0.0, 1.0):
            if torch.allclose(self._ops.rms_norm(x, weight, eps, offset), expected, rtol=1e-5, atol=1e-6):
                # the parameter is looked up at each call: it may be another one by then
                return lambda x: (
                    self._ops.rms_norm(x, module.weight, eps, offset) if _plain(x, module.weight) else original(x)
                )
        return None

    def _gated_mlp_of(self, module: Any) -> Forward | None:
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(p, torch.nn.Module) for p in parts) or not hasattr(module, "act_fn"):
            return None
        weight = getattr(parts[0], "weight", None)
        if weight is None or weight.dim() != 2 or not _plain(weight):
            return None
        original = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not _plain(x):
                return original(x)
            gate, up = module.gate_proj(x), module.up_proj(x)
            return module.down_proj(self._ops.silu_mul(gate, up))

        x = torch.linspace(-2, 3, 2 * weight.shape[1]).reshape(1, 2, -1)
        ours, expected = _as_trained(module, forward, x), _as_trained(module, original, x)
        return forward if (ours - expected).abs().max() <= 1e-5 * expected.abs().max() else None

    def _linear(self, module: torch.nn.Linear) -> Forward:
        original = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            return train_layers.linear(x, module.weight, module.bias) if _plain(x, module.weight) else original(x)

        return forward

    def _rotates_halves(self, function: Callable[..., Any]) -> bool:
        q = torch.linspace(-1, 2, 2 * 3 * 8).reshape(1, 2, 3, 8)
        cos, sin = torch.linspace(0, 1, 24).reshape(1, 3, 8), torch.linspace(-1, 1, 24).reshape(1, 3, 8)
        try:
            expected = function(q, q[:, :1], cos, sin)
        except (TypeError, RuntimeError):  # another signature: complex numbers, position ids
            return False
        ours = (self._ops.rotary(q, cos, sin), self._ops.rotary(q[:, :1], cos, sin))
        return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, expected, strict=True))

    def _rotate(
        self, original: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Rotate a packed sequence; hand on whatever else comes here, such as another model's training step."""
        plain = not rest and not options and cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1
        lasts = all(t.stride(-1) == 1 for t in (q, k)) and cos.is_contiguous() and sin.is_contiguous()
        graded = (cos.requires_grad or sin.requires_grad) if self.training else True
        ours = plain and lasts and _plain(q, k, cos, sin) and not (graded and torch.is_grad_enabled())
        if not ours or k.shape[2:] != q.shape[2:] or q.shape[-1] % 2:
            return original(q, k, cos, sin, *rest, **options)
        return self._ops.rotary(q, cos, sin), self._ops.rotary(k, cos, sin)


def _plain(*tensors: torch.Tensor) -> bool:
    """Return whether our kernels may stand in: autocast may be switched on inside of a model's forward."""
    good = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return good and not torch.is_autocast_enabled("cpu")


def _is_plain_linear(module: Any) -> bool:
    plain = type(module) is torch.nn.Linear and "forward" not in vars(module) and fast_linear_serves(module.weight)
    return plain and min(module.weight.shape) >= THIN


def checkpointed(model: Any) -> bool:
    """Return whether layers are computed again in backward."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def _as_trained(module: Any, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    """Compute with dropout as in training, of the same random numbers every time: a replacement must keep it."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = True
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return forward(x)
    finally:
        for m, flag in flags:
            m.training = flag


def _modelling_files(model: Any) -> list[ModuleType]:
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), ROTARY)]
