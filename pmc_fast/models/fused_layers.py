"""Layers that a model lends for a while: our kernels do each in one pass over memory."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..ops import layers
from ..ops.layers import fast_linear_serves
from . import patching
from .layer_sources import is_gated_mlp, is_rms_norm, is_rotary

THIN = 64  # linear layers of fewer inputs or outputs, such as LoRA's, are torch's: panels bring them nothing
ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files

Forward = Callable[..., torch.Tensor]
Situation = tuple[Any, ...]  # what decides whether a replacement agrees: it is tried once in each


@contextmanager
def replaced(forwards: dict[Any, Forward]) -> Iterator[None]:
    """Give modules another forward, and take it away again."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(patching.forward(module, forward))
        yield


class FastLayers:
    """RMS norms, gated MLPs and rotary embeddings of a model that our one-pass kernels can replace.

    Served are float32 on the CPU, and float32, bfloat16 and float16 on CUDA, also as autocast mixes them. Replaced are
    layers that are known by their source, where a replacement also gives what the layer gives on made-up numbers: in
    low precision some round at other places. In torch each of these layers reads and writes its rows several times.

    Parameters
    ----------
    model : torch.nn.Module
    training : bool
        Lend layers with gradients, on the CPU linear ones (torch.nn.Linear, where AVX-512 is) included. Lend around
        the forward pass; backward may come after.
    backend : {"cpu", "cuda"}, optional
        Whose kernels; by default the device's own.
    """

    def __init__(self, model: Any, training: bool = False, *, backend: str | None = None) -> None:
        self.model, self.training, self._backend = model, training, backend
        self._tried_with: tuple[Any, ...] | None = None
        self._found: dict[Any, Forward] = {}
        self._rotaries: list[ModuleType] = []
        self._turns_alike: dict[tuple[Callable[..., Any], Situation], bool] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # what was found is the model's own: a copy finds its model's
        return type(self)._of, (self.model, self.training, self._backend)

    @classmethod
    def _of(cls, model: Any, training: bool, backend: str | None) -> "FastLayers":
        return cls(model, training, backend=backend)

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Replace what can be; put all back at the end.

        On the CPU nothing is lent under autocast. For training nothing is where layers are checkpointed either:
        checkpoints recompute layers in backward, when these are torch's again, and demand the same of them.
        """
        places = {(p.device, p.dtype) for p in self.model.parameters()}
        on_cpu = any(self._kind(device) == "cpu" for device, _ in places)
        if (on_cpu and torch.is_autocast_enabled("cpu")) or (self.training and checkpointed(self.model)):
            yield
            return
        found_for = (places, *map(_makings, self.model.modules()))
        if found_for != self._tried_with:  # the model is new here, was moved, or its layers were changed
            self._found, self._rotaries = self._find(), self._find_rotaries()
            self._tried_with = found_for
        originals = [(module, getattr(module, ROTARY)) for module in self._rotaries]
        free = {m: forward for m, forward in self._found.items() if "forward" not in vars(m)}
        if self.training and on_cpu:
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

    def _find_rotaries(self) -> list[ModuleType]:
        weight = next(self.model.parameters(), None)
        if weight is None or self._situation(weight) is None:
            return []
        known = [m for m in _modelling_files(self.model) if is_rotary(getattr(m, ROTARY))]
        return [m for m in known if self._rotates_halves(getattr(m, ROTARY), weight, weight)]

    def _rms_norm_of(self, module: Any) -> Forward | None:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (is_rms_norm(module) and isinstance(weight, torch.Tensor) and weight.dim() == 1):
            return None
        width = weight.shape[0]  # 0: a wrapper brings the weight for the time of the layer's own call
        too_wide = self._kind(weight.device) == "cuda" and width > layers.MAX_WIDTH
        if width == 0 or too_wide or not isinstance(eps, float):
            return None
        original = module.forward
        offsets: dict[Situation | None, float | None] = {None: None}

        def offset_for(x: torch.Tensor) -> float | None:
            # the parameter is looked up at each call: it may be another one by then
            situation = self._situation(x, module.weight)
            if situation not in offsets:
                offsets[situation] = self._try_rms_norm(original, module.weight, eps, x.dtype)
            return offsets[situation]

        def forward(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            offset = None if rest else offset_for(x)
            if offset is None:
                return original(x, *rest)
            return layers.rms_norm(x, module.weight, eps, offset, backend=self._backend)

        return forward if offset_for(weight) is not None else None

    def _try_rms_norm(self, original: Forward, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> float | None:
        x = _made_up(weight.device, dtype, 2, weight.shape[0])
        with _trial(x.device):
            try:
                expected = original(x)
            except (TypeError, AttributeError):  # needs more than x
                return None
            unit = _unit(x, expected)
            for offset in (0.0, 1.0):
                ours = layers.rms_norm(x, weight, eps, offset, backend=self._backend)
                close = ours.dtype == expected.dtype and torch.allclose(
                    ours, expected, rtol=_allowed(unit), atol=1e-6
                )
                # who rounds at other places differs in every third number or so
                if close and (unit < 1e-5 or (ours != expected).double().mean() <= 1 / 16):
                    return offset
        return None

    def _gated_mlp_of(self, module: Any) -> Forward | None:
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(p, torch.nn.Module) for p in parts) or not is_gated_mlp(module):
            return None
        weight = getattr(parts[0], "weight", None)
        if weight is None or weight.dim() != 2 or self._situation(weight) is None:
            return None
        if not is_silu(module.act_fn):
            return None
        original = module.forward
        agrees: dict[Situation | None, bool] = {None: False}

        def gated(x: torch.Tensor) -> torch.Tensor:
            gate, up = module.gate_proj(x), module.up_proj(x)
            return module.down_proj(layers.silu_mul(gate, up, backend=self._backend))

        def agrees_on(x: torch.Tensor) -> bool:
            situation = self._situation(x, module.gate_proj.weight)
            if situation not in agrees:
                made_up = _made_up(x.device, x.dtype, 1, 2, weight.shape[1])
                agrees[situation] = _near(*(_as_trained(module, f, made_up) for f in (gated, original)))
            return agrees[situation]

        def forward(x: torch.Tensor) -> torch.Tensor:
            bare = patching.is_bare(module.act_fn)  # a hook on what is not called would be silent
            return gated(x) if bare and agrees_on(x) else original(x)

        return forward if agrees_on(weight) else None

    def _linear(self, module: torch.nn.Linear) -> Forward:
        original = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            ours = self._situation(x, module.weight) is not None
            return layers.linear(x, module.weight, module.bias) if ours else original(x)

        return forward

    def _rotates_halves(self, function: Callable[..., Any], q: torch.Tensor, cos: torch.Tensor) -> bool:
        """Return whether the function does what ours does, on numbers of q's and cos's types."""
        x = _made_up(q.device, q.dtype, 1, 2, 3, 8)
        cos, sin = (_made_up(q.device, cos.dtype, 1, 3, 8) * size for size in (0.3, -0.2))
        with _trial(q.device):
            try:
                expected = function(x, x[:, :1], cos, sin)
            except (TypeError, RuntimeError):  # another signature: complex numbers, position ids
                return False
            ours = layers.rotary(x, x[:, :1], cos, sin, backend=self._backend)
        return all(_near(a, b, x) for a, b in zip(ours, expected, strict=True))

    def _rotate(
        self, original: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Rotate a packed sequence; hand on whatever else comes here, such as another model's training step."""
        packed = (
            not rest and not options and cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and q.shape[0] == 1
        )
        lasts = all(t.stride(-1) == 1 for t in (q, k)) and cos.is_contiguous() and sin.is_contiguous()
        fits = packed and lasts and k.shape[2:] == q.shape[2:] and k.dtype == q.dtype and q.shape[-1] % 2 == 0
        fits = fits and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        situation = self._situation(q, k, cos, sin) if fits else None
        if situation is None or not self._turns_as(original, situation, q, cos):
            return original(q, k, cos, sin, *rest, **options)
        return layers.rotary(q, k, cos, sin, backend=self._backend)

    def _turns_as(
        self, original: Callable[..., Any], situation: Situation, q: torch.Tensor, cos: torch.Tensor
    ) -> bool:
        key = (original, situation)
        if key not in self._turns_alike:
            self._turns_alike[key] = self._rotates_halves(original, q, cos)
        return self._turns_alike[key]

    def _kind(self, device: torch.device) -> str:
        return self._backend or device.type

    def _situation(self, *tensors: torch.Tensor) -> Situation | None:
        """Return the situation that a layer is called in, or None where our kernels do not serve.

        Autocast may be switched on inside of a model's forward, and the model be moved while it is lent.
        """
        device, kind = tensors[0].device, self._kind(tensors[0].device)
        types = tuple(t.dtype for t in tensors)
        served = layers.DTYPES.get(kind, ())
        if not plain(*tensors) or any(t.device != device for t in tensors) or any(t not in served for t in types):
            return None
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return None if kind == "cpu" and low is not None else (device, low, types)


@contextmanager
def _trial(device: torch.device) -> Iterator[None]:
    """Compute what nobody else may notice: an older torch's autocast keeps weights that it casts, without gradients."""
    low = torch.get_autocast_dtype(device.type)
    again = torch.autocast(device.type, low, torch.is_autocast_enabled(device.type), cache_enabled=False)
    with torch.no_grad(), again:
        yield


def _made_up(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numbers = torch.linspace(-2, 3, torch.Size(shape).numel(), dtype=torch.float64)
    return numbers.reshape(shape).to(device, dtype)


def _unit(*tensors: torch.Tensor) -> float:
    """Return the coarsest rounding of all."""
    return max(torch.finfo(t.dtype).eps for t in tensors)


def _allowed(unit: float) -> float:
    return max(1e-5, 2 * unit)  # another order of sums in float32, a couple of roundings in less


def _near(ours: torch.Tensor, expected: torch.Tensor, *read: torch.Tensor) -> bool:
    allowed = _allowed(_unit(expected, *read))
    return ours.dtype == expected.dtype and bool((ours - expected).abs().max() <= allowed * expected.abs().max())


def is_silu(function: Any) -> bool:
    """Return whether an activation is SiLU: in low precision and near 0 others come too close to it for a trial."""
    return type(function) in (torch.nn.SiLU, type(ACT2FN["silu"])) or function is torch.nn.functional.silu


def plain(*tensors: torch.Tensor) -> bool:
    """Return whether tensors are what their memory holds: no quantised, sharded or traced ones."""
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _makings(module: Any) -> tuple[Any, ...]:
    """Return what a replacement took for granted of a layer, and its owner may change: code, epsilon, activation."""
    own, parts = vars(module), vars(module)["_modules"]
    act = parts.get("act_fn", own.get("act_fn"))
    return type(module).forward, own.get("variance_epsilon"), own.get("eps"), act


def _is_plain_linear(module: Any) -> bool:
    if type(module) is not torch.nn.Linear or "forward" in vars(module) or not plain(module.weight):
        return False
    return fast_linear_serves(module.weight) and min(module.weight.shape) >= THIN


def checkpointed(model: Any) -> bool:
    """Return whether layers are computed again in backward."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def _as_trained(module: Any, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    """Compute with dropout as in training, of the same random numbers every time: a replacement must keep it."""
    flags = [(m, m.training) for m in module.modules()]
    generators = [torch.default_generator]
    if x.is_cuda:
        generators.append(torch.cuda.default_generators[x.device.index])
    states = [g.get_state() for g in generators]
    try:
        for m, _ in flags:
            m.training = True
        for g in generators:
            g.manual_seed(0)
        with _trial(x.device):
            return forward(x)
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        for m, flag in flags:
            m.training = flag


def _modelling_files(model: Any) -> list[ModuleType]:
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), ROTARY)]
