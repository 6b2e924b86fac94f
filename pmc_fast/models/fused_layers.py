"""Layers replaced by fused kernels during a pass."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers.activations import ACT2FN

from ..ops import layers
from . import patching
from .context import tolerance
from .layer_sources import is_gated_mlp, is_rms_norm, is_rotary

ROTARY = "apply_rotary_pos_emb"  # the function's name in transformers' modelling files

Forward = Callable[..., torch.Tensor]
DispatchKey = tuple[Any, ...]  # device and dtypes of a call: a kernel is compared with its layer once for each


class FusedLayers:
    """Replaces RMS norms, gated MLPs and rotary embeddings of a model by kernels that read their input once.

    Supported are float32 on the CPU, and float32, bfloat16 and float16 on CUDA, also as autocast mixes them. A layer is
    replaced if its source is known and the kernel agrees with it on a probe input: in low precision some layers round
    at other places.

    Parameters
    ----------
    model : torch.nn.Module
    training : bool
        Replace layers in forward passes with gradients. Backward may come after the replacement.
    backend : {"cpu", "cuda"}, optional
        Of the kernels; by default the device's own.
    """

    def __init__(self, model: Any, training: bool = False, *, backend: str | None = None) -> None:
        self.model, self.training, self._backend = model, training, backend
        self._state: tuple[Any, ...] | None = None
        self._forwards: dict[Any, Forward] = {}
        self._rotaries: list[ModuleType] = []
        self._results: dict[tuple[Any, DispatchKey], Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # without the replacements, which belong to this model: a copy finds those of its own
        return functools.partial(type(self), backend=self._backend), (self.model, self.training)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace layers, and restore them at the end.

        On the CPU none are replaced under autocast. In training none are replaced if layers are checkpointed: backward
        recomputes them after they were restored, and checkpoints demand the same operations as in forward.
        """
        places = {(p.device, p.dtype) for p in self.model.parameters()}
        on_cpu = any(self._kind(device) == "cpu" for device, _ in places)
        if (on_cpu and torch.is_autocast_enabled("cpu")) or (self.training and uses_checkpointing(self.model)):
            yield
            return
        state = (places, *map(_assumptions, self.model.modules()))
        if state != self._state:  # a new model, or one that was moved or changed
            self._results.clear()
            self._forwards, self._rotaries = self._find(), self._find_rotaries()
            self._state = state
        forwards = {m: forward for m, forward in self._forwards.items() if "forward" not in vars(m)}
        with ExitStack() as stack:
            stack.enter_context(patching.forwards(forwards))
            for module in self._rotaries:
                rotate = functools.partial(self._rotate, getattr(module, ROTARY))
                stack.enter_context(patching.attribute(module, ROTARY, rotate))
            yield

    def _find(self) -> dict[Any, Forward]:
        free = [m for m in self.model.modules() if "forward" not in vars(m)]
        found = {m: self._rms_norm(m) or self._gated_mlp(m) for m in free}
        return {m: forward for m, forward in found.items() if forward is not None}

    def _find_rotaries(self) -> list[ModuleType]:
        weight = next(self.model.parameters(), None)
        if weight is None or self._key(weight) is None:
            return []
        known = [m for m in modelling_files(self.model) if is_rotary(getattr(m, ROTARY))]
        return [m for m in known if self._rotates_halves(getattr(m, ROTARY), weight, weight)]

    def _once(self, function: Any, key: DispatchKey | None, compare: Callable[[], Any]) -> Any:
        """Return the result of a comparison with `function`, which is made once for each key; None without a key."""
        if key is None:
            return None
        if (function, key) not in self._results:
            self._results[function, key] = compare()
        return self._results[function, key]

    def _rms_norm(self, module: Any) -> Forward | None:
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not (is_rms_norm(module) and isinstance(weight, torch.Tensor) and weight.dim() == 1):
            return None
        width = weight.shape[0]  # 0: a wrapper provides the weight during the layer's own call
        too_wide = self._kind(weight.device) == "cuda" and width > layers.MAX_WIDTH
        if width == 0 or too_wide or not isinstance(eps, float):
            return None
        original = module.forward

        def offset_for(x: torch.Tensor) -> float | None:
            weight = module.weight  # it may be another one in each call
            return self._once(original, self._key(x, weight), lambda: self._offset(original, weight, eps, x.dtype))

        def forward(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            offset = None if rest else offset_for(x)
            if offset is None:
                return original(x, *rest)
            return layers.rms_norm(x, module.weight, eps, offset, backend=self._backend)

        return forward if offset_for(weight) is not None else None

    def _offset(self, original: Forward, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> float | None:
        """Return what the layer adds to its weight, or None if the kernel does not agree with it."""
        x = probe_input(weight.device, dtype, 2, weight.shape[0])
        with _isolated(x.device):
            try:
                expected = original(x)
            except (TypeError, AttributeError):  # needs more than x
                return None
            allowed = tolerance(dtype, expected.dtype).layer
            for offset in (0.0, 1.0):
                ours = layers.rms_norm(x, weight, eps, offset, backend=self._backend)
                close = ours.dtype == expected.dtype and torch.allclose(ours, expected, rtol=allowed, atol=1e-6)
                # in low precision, rounding at another place changes about every third number
                exact = dtype == expected.dtype == torch.float32
                if close and (exact or (ours != expected).double().mean() <= 1 / 16):
                    return offset
        return None

    def _gated_mlp(self, module: Any) -> Forward | None:
        parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(isinstance(p, torch.nn.Module) for p in parts) or not is_gated_mlp(module):
            return None
        weight = getattr(parts[0], "weight", None)
        if weight is None or weight.dim() != 2 or self._key(weight) is None or not is_silu(module.act_fn):
            return None
        original = module.forward

        def gated(x: torch.Tensor) -> torch.Tensor:
            gate, up = module.gate_proj(x), module.up_proj(x)
            return module.down_proj(layers.silu_mul(gate, up, backend=self._backend))

        def compare(x: torch.Tensor) -> bool:
            probe = probe_input(x.device, x.dtype, 1, 2, weight.shape[1])
            ours, expected = (_in_train_mode(module, f, probe) for f in (gated, original))
            return _near(ours, expected, products_on=x.device)

        def agrees(x: torch.Tensor) -> bool:
            return bool(self._once(original, self._key(x, module.gate_proj.weight), lambda: compare(x)))

        def forward(x: torch.Tensor) -> torch.Tensor:
            bare = patching.is_bare(module.act_fn)  # hooks of the activation would not run
            return gated(x) if bare and agrees(x) else original(x)

        return forward if agrees(weight) else None

    def _rotates_halves(self, function: Callable[..., Any], q: torch.Tensor, cos: torch.Tensor) -> bool:
        """Return whether the kernel agrees with the function on inputs of the dtypes of q and cos."""
        x = probe_input(q.device, q.dtype, 1, 2, 3, 8)
        cos, sin = (probe_input(q.device, cos.dtype, 1, 3, 8) * size for size in (0.3, -0.2))
        with _isolated(q.device):
            try:
                expected = function(x, x[:, :1], cos, sin)
            except (TypeError, RuntimeError):  # another signature: complex numbers, position ids
                return False
            rotated = layers.rotary(x, x[:, :1], cos, sin, backend=self._backend)
        return all(_near(a, b, x) for a, b in zip(rotated, expected, strict=True))

    def _rotate(
        self, original: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        """Rotate a packed sequence; call the original for anything else, such as another model's training step."""
        fits = (
            not (rest or options)
            and q.shape[0] == 1
            and cos.shape == sin.shape == (1, *q.shape[2:])
            and k.shape[2:] == q.shape[2:]
            and k.dtype == q.dtype
            and q.shape[-1] % 2 == 0
            and q.stride(-1) == k.stride(-1) == 1
            and cos.is_contiguous()
            and sin.is_contiguous()
            and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        )
        key = self._key(q, k, cos, sin) if fits else None
        if not self._once(original, key, lambda: self._rotates_halves(original, q, cos)):
            return original(q, k, cos, sin, *rest, **options)
        return layers.rotary(q, k, cos, sin, backend=self._backend)

    def _kind(self, device: torch.device) -> str:
        return self._backend or device.type

    def _key(self, *tensors: torch.Tensor) -> DispatchKey | None:
        """Return device and dtypes of a call, or None if there is no kernel for them.

        It is asked for in each call: autocast may be entered inside the model's forward, and the model may be moved.
        """
        device, kind = tensors[0].device, self._kind(tensors[0].device)
        dtypes = tuple(t.dtype for t in tensors)
        supported = layers.DTYPES.get(kind, ())
        if not plain(*tensors) or any(t.device != device for t in tensors) or not set(dtypes) <= set(supported):
            return None
        low = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return None if kind == "cpu" and low is not None else (device, low, dtypes)


@contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Compute without gradients and without autocast's cache, in which older torch would keep weights without them."""
    low = torch.get_autocast_dtype(device.type)
    again = torch.autocast(device.type, low, torch.is_autocast_enabled(device.type), cache_enabled=False)
    with torch.no_grad(), again:
        yield


def probe_input(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Return evenly spaced numbers from -2 to 3, for comparisons."""
    numbers = torch.linspace(-2, 3, torch.Size(shape).numel(), dtype=torch.float64)
    return numbers.reshape(shape).to(device, dtype)


def _near(
    ours: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor, products_on: torch.device | None = None
) -> bool:
    allowed = tolerance(expected.dtype, *(t.dtype for t in inputs), products_on=products_on).layer
    return ours.dtype == expected.dtype and bool((ours - expected).abs().max() <= allowed * expected.abs().max())


def is_silu(function: Any) -> bool:
    """Return whether an activation is SiLU: on a probe input, in low precision, others come too close to it."""
    return type(function) in (torch.nn.SiLU, type(ACT2FN["silu"])) or function is torch.nn.functional.silu


def plain(*tensors: torch.Tensor) -> bool:
    """Return whether tensors are ordinary ones: not quantised, sharded or traced."""
    return all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)


def _assumptions(module: Any) -> tuple[Any, ...]:
    """Return what a replacement assumes of a layer and its owner may change: code, epsilon, activation."""
    own, parts = vars(module), vars(module)["_modules"]
    act = parts.get("act_fn", own.get("act_fn"))
    return type(module).forward, own.get("variance_epsilon"), own.get("eps"), act


def uses_checkpointing(model: Any) -> bool:
    """Return whether backward recomputes layers."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def use_checkpointing(model: Any) -> None:
    """Let backward recompute layers, of which only the inputs are then kept."""
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.24; the old name warns
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _in_train_mode(module: Any, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    """Compute in train mode with the same random numbers every time, so that dropout is compared as well."""
    flags = [(m, m.training) for m in module.modules()]
    cuda = [x.device] if x.is_cuda else []
    try:
        for m, _ in flags:
            m.training = True
        with torch.random.fork_rng(cuda), _isolated(x.device):
            for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in cuda)):
                generator.manual_seed(0)
            return forward(x)
    finally:
        for m, flag in flags:
            m.training = flag


def modelling_files(model: Any) -> list[ModuleType]:
    names = {type(m).__module__ for m in model.modules()}
    return [sys.modules[n] for n in sorted(names) if hasattr(sys.modules.get(n), ROTARY)]
