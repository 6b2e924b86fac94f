"""Around a forward pass of a model: eval mode, autocast, its plain log-probs and tolerances to compare with them."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PMCError
from ..ops.dispatch import why_refused


def autocast(
    device: torch.device, dtype: torch.dtype | None, *, cache_enabled: bool = True
) -> AbstractContextManager[Any]:
    """Return torch.autocast's context, or one that does nothing where `dtype` is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=cache_enabled)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device has no memory left: libraries raise other kinds than torch."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def release_memory(device: torch.device) -> None:
    """Return what no tensor uses any more to the device."""
    gc.collect()  # tensors in circles, such as those of an error's traceback
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_placement(model: Any) -> None:
    """Refuse weights that can't be read where they are: quantised by torch, offloaded, spread, or on other devices."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao."):
            raise PMCError(
                f"{type(model).__name__} is quantised by torch ({name} is a {type(module).__module__} layer): give the "
                "model as it was before"
            )
    devices = {p.device for p in model.parameters()}
    if any(d.type == "meta" for d in devices):
        raise PMCError(
            f"{type(model).__name__} has parameters on meta (offloaded, or without weights): load it without device_map, "
            "as a whole on cpu or cuda"
        )
    for device in devices:
        if why := why_refused(device):
            raise PMCError(f"{type(model).__name__} is on {device}: {why}")
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise PMCError(f"{type(model).__name__} is spread over {names}: load it without device_map, on one of them")


def known_tokens(model: Any) -> int:
    """Return how many tokens a model both reads and predicts: some embed more than their head knows."""
    head = model.get_output_embeddings()
    sizes = [
        e.weight.shape[0] for e in (model.get_input_embeddings(), head) if getattr(e, "weight", None) is not None
    ]
    return min(sizes)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far rounding may put two computations of one model apart; a different computation differs by more."""

    layer: float  # a layer's output, relative to its largest number
    logits: float  # the head's output, relative to its largest number
    logps: float  # log-probs, mean absolute difference
    gradients: float  # the norm of a parameter's gradient, relative to itself


# With eps the spacing of numbers at 1:
# layer: one computation may round its output twice where the other does not: 2 eps. In float32, and for float64, whose
#   norms and rotary embeddings transformers computes in float32, sums of up to 1e4 terms in another order: 1e-5.
# logits: one product of the same hidden states, a scale and a cap: 4 eps of bfloat16. In float32 CUDA may compute the
#   product in TF32: its eps, 1e-3.
# logps: some 5 roundings in each of 32 layers add up as a random walk does, to 13 eps of a hidden state, half as much
#   again in a log-prob: 20 eps of bfloat16, 30 of float16, whose small numbers have fewer digits. In float32 each of
#   these is the sum of 1e4 terms in another order, 100 eps: 2e-4. In float64 13 eps of float32.
# gradients: backward doubles the roundings of logps; their norm averages over a parameter's numbers: 6 eps of bfloat16.
TOLERANCES = {
    torch.float64: Tolerance(layer=1e-5, logits=1e-3, logps=2e-6, gradients=1e-4),
    torch.float32: Tolerance(layer=1e-5, logits=1e-3, logps=2e-4, gradients=1e-3),
    torch.float16: Tolerance(layer=2 * torch.finfo(torch.float16).eps, logits=3e-2, logps=0.03, gradients=5e-2),
    torch.bfloat16: Tolerance(layer=2 * torch.finfo(torch.bfloat16).eps, logits=3e-2, logps=0.15, gradients=5e-2),
}


# what torch rounds the inputs of float32 products to: TF32 has as many digits as float16
ROUNDED = {"tf32": torch.float16, "bf16": torch.bfloat16}


def tolerance(*dtypes: torch.dtype, products_on: torch.device | None = None) -> Tolerance:
    """Return the tolerance of the coarsest dtype; an unknown one is as coarse as bfloat16.

    With `products_on` float32 counts as what that device rounds the inputs of float32 matrix products to, as
    `torch.set_float32_matmul_precision` or ``tf32`` of TrainingArguments let it.
    """
    if products_on is not None:
        backend = torch.backends.cuda if products_on.type == "cuda" else torch.backends.mkldnn
        rounded = ROUNDED.get(backend.matmul.fp32_precision, torch.float32)
        dtypes = tuple(rounded if dtype == torch.float32 else dtype for dtype in dtypes)
    known = [TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes]
    return max(known, key=lambda t: t.logps)


def require_same_logps(model: Any, what: str, error: float, dtype: torch.dtype) -> None:
    """Refuse a model whose log-probs, as `what` computes them, differ from its own forward pass by `error` in the mean."""
    if not error <= tolerance(dtype, products_on=model.get_input_embeddings().weight.device).logps:
        raise PMCError(
            f"{type(model).__name__}: {what} not compute what the model computes with attn_implementation "
            f"{model.config._attn_implementation!r} (log-probs off by {error:.3g}): try 'eager'; under mixed precision "
            "give autocast_dtype; if it stays, this family is not supported"
        )


@torch.no_grad()
def plain_logps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return what a model's plain forward pass, in eval mode, gives each token but the first: [B, T] -> [B, T - 1]."""
    with eval_mode(model):
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Switch a model to eval, and module by module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
