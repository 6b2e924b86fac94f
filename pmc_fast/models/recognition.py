"""Which tokens a model's layers see, and up to which length, from its own masks and configuration.

A comparison on a few random tokens can't show windows, chunks and length-dependent rotary embeddings, which begin
thousands of tokens away in real models. So they are recognised: one pass of three tokens, whose attention computes
nothing, collects the masks that the model makes, as functions of positions, and the window that each layer is given.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionMaskInterface

from ..errors import PMCError
from . import patching
from .context import eval_mode

PROBE = "pmc_fast_probe"
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
STATIC_ROPES = {"default", "linear", "yarn", "llama3", "proportional", "ntk_alpha", "xdrope"}
FAR = 1 << 20  # tokens up to which masks are examined
LEAST = 16  # tokens that a supported model must at least allow
CHECKED = 1024  # the widest window beyond which log-probs are compared

Layer = tuple[int, int | None]  # what a layer's mask lets a token see, as `_reach` says, and its window


@dataclass(frozen=True)
class Recognised:
    """The windows of a model's layers, and the longest sequence that is computed as the model computes it."""

    name: str
    windows: tuple[int, ...] = ()
    longest: int = FAR
    reason: str = "its masks are examined no further"

    def require(self, tokens: int, what: str) -> None:
        """Refuse a sequence that is too long."""
        if tokens > self.longest:
            raise PMCError(
                f"{self.name}: {self.reason}: sequences of more than {self.longest} tokens are not supported, and "
                f"{what} may take {tokens}: lower max_length, or shorten it"
            )

    @property
    def limited(self) -> bool:
        return self.longest < FAR

    @property
    def wide(self) -> list[int]:
        """The length of a sequence that reaches beyond the widest window, for checks; empty without a wide window."""
        return [min(w + 9, self.longest) for w in self.windows if w <= CHECKED][-1:]


def recognise(model: Any) -> Recognised:
    """Return the windows and the longest sequence of a causal language model, from its masks and configuration.

    Raises
    ------
    PMCError
        Layers that see, or share, what ours do not know, by the family's name.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    if other := set(kinds) - ATTENTIONS:
        raise PMCError(f"{name} has layers of {sorted(other)}: this family is not supported")
    if sparse := [key for key in vars(config) if key.startswith("index_topk") and getattr(config, key)]:
        raise PMCError(f"{name} has sparse attention ({sparse[0]}): this family is not supported")
    layers = _probed(model)
    if len(layers) != config.num_hidden_layers:
        raise PMCError(
            f"{name}: {len(layers)} of {config.num_hidden_layers} layers went through transformers' attention "
            "interface: this family is not supported"
        )
    if any(len(calls) > 1 for calls in layers.values()):
        raise PMCError(f"{name} calls its layers' attention more than once a pass: this family is not supported")
    windows, limits = set(), [rope_limit(config, name)]
    for [(mask, window)] in layers.values():
        if not mask:
            raise PMCError(f"{name} has a mask that is not causal, or not of positions alone: not supported")
        if mask != (window or FAR):
            limits.append((min(abs(mask), window or FAR), _different(mask, window)))
        elif window:
            windows.add(window)
    sliding = kinds.count("sliding_attention")
    if sum(bool(window) or mask != FAR for [(mask, window)] in layers.values()) < sliding:
        raise PMCError(f"{name} does not say how far its {sliding} sliding layers see: not supported")
    known = getattr(config, "max_position_embeddings", None)
    if known and not positions_are_computed(config):
        limits.append((known, "its table of positions ends there"))
    longest, reason = min(limits, key=lambda limit: limit[0])
    if longest < LEAST:
        raise PMCError(f"{name}: {reason}: sequences of more than {longest} tokens are not supported")
    return Recognised(name, tuple(sorted(windows)), longest, reason)


def positions_are_computed(config: Any) -> bool:
    """Return whether a model computes positions, for any length, instead of looking them up in a table."""
    return bool(getattr(config, "rope_parameters", None) or getattr(config, "alibi", False))


def rope_limit(config: Any, name: str) -> tuple[int, str]:
    """Return up to which length a configuration's rotary embedding does not depend on the longest sequence of a pass.

    Beyond it a long sequence would change a short one, and a rollout's earlier keys would be stale.
    """
    given = getattr(config, "rope_parameters", None) or {}
    limits = [(FAR, Recognised.reason)]
    for ropes in (given, *(r for r in given.values() if isinstance(r, dict))):
        kind = ropes.get("rope_type", "default")
        if kind == "dynamic":
            limits.append(
                (
                    config.max_position_embeddings,
                    "its dynamic rotary embedding depends on a pass's length beyond a limit",
                )
            )
        elif kind == "longrope":
            original = ropes.get("original_max_position_embeddings") or config.original_max_position_embeddings
            limits.append((original, "its longrope rotary embedding changes beyond a limit"))
        elif kind not in STATIC_ROPES:
            raise PMCError(f"{name} has a rotary embedding of type {kind!r}: not supported")
    return min(limits)


@contextmanager
def own_errors(model: Any) -> Iterator[None]:
    """Turn an error of the model's own code, under our attention, into a refusal that names the model."""
    try:
        yield
    except PMCError:
        raise
    except Exception as error:
        if not _raised_by(model, error):
            raise
        line = (str(error).splitlines() or [""])[0]
        raise PMCError(
            f"{type(model).__name__}: its own code fails when its attention is replaced ({type(error).__name__}: "
            f"{line}): this family is not supported"
        ) from error


def _raised_by(model: Any, error: Exception) -> bool:
    """Return whether a modelling file raised the error, itself or in a call of torch, and memory did not run out."""
    files = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = next((name for name in reversed(files) if name.partition(".")[0] != "torch"), "")
    own = {type(m).__module__ for m in model.modules()}
    return (last.startswith("transformers.") or last in own) and not isinstance(error, torch.OutOfMemoryError)


def _different(mask: int, window: int | None) -> str:
    if mask < 0:
        return "its mask is chunked, or no sliding window for another reason"
    return f"its mask and its layers disagree about their sliding window ({mask if mask < FAR else None}, {window})"


@torch.no_grad()
def _probed(model: Any) -> dict[int, list[Layer]]:
    """Return the mask and window of each layer in one pass."""
    weight = model.get_input_embeddings().weight
    ids = torch.zeros((1, 3), dtype=torch.int64, device=weight.device)
    layers: dict[int, list[Layer]] = {}
    with (
        patching.ONE_AT_A_TIME,
        eval_mode(model),
        patching.attention(model, PROBE),
        own_errors(model),
        torch.compiler.set_stance("force_eager"),
    ):
        positions = torch.arange(3, device=weight.device)[None]
        model(input_ids=ids, position_ids=positions, use_cache=False, probed_layers=layers)
    return layers


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    probed_layers: dict[int, list[Layer]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record a layer's mask and window, and return a tensor of an attention's shape."""
    patching.check_call(module, probed_layers, kwargs)
    assert probed_layers is not None
    reach = FAR
    if attention_mask is None:
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise PMCError(f"{type(module).__name__} sees what comes after a token: not supported")
    else:
        values = attention_mask.unique().tolist() if attention_mask.dtype == torch.int64 else []
        if len(values) != 1:
            raise PMCError(
                f"{type(module).__name__} makes or changes its mask by itself: this family is not supported"
            )
        reach = int(values[0])
    probed_layers.setdefault(module.layer_idx, []).append((reach, sliding_window or None))
    heads = query.shape[1] // value.shape[1]
    return value.repeat_interleave(heads, 1).transpose(1, 2).contiguous(), None


def _mask(mask_function: Callable[..., Any], q_length: int, kv_length: int, **options: Any) -> torch.Tensor:
    """Return a mask filled with the `_reach` of a mask function."""
    with torch.device(options.get("device", "cpu")):
        return torch.full((options.get("batch_size", 1), 1, q_length, kv_length), _reach(mask_function))


def _reach(mask_function: Callable[..., Any]) -> int:
    """Return which tokens a mask function lets a token see.

    n: itself and the n - 1 tokens before it. FAR: all before it. -n: all before it in sequences of up to n tokens,
    something else in longer ones. 0: something else.
    """
    zero, near, all_ = torch.tensor(0), torch.arange(2 * LEAST), torch.arange(2 * FAR)

    def seen(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        made = torch.as_tensor(mask_function(zero, zero, queries, keys))
        return made.bool().broadcast_to(torch.broadcast_shapes(queries.shape, keys.shape))

    try:
        window = int(seen(all_[:FAR], zero).long().cumprod(0).sum())  # the first tokens see all before them
        if (
            not (seen(near[:, None], near) <= (near <= near[:, None])).all()
            or seen(torch.tensor(FAR - 1), all_[FAR:]).any()
        ):
            return 0
        for last in (FAR, FAR + 1, FAR + window // 2):  # one of them sees fewer tokens of a chunk
            if window < FAR and not torch.equal(
                seen(torch.tensor(last), all_), (all_ <= last) & (all_ > last - window)
            ):
                return -window
    except Exception:  # it depends on more than positions, such as image tokens
        return 0
    return window


AttentionMaskInterface.register(PROBE, _mask)
patching.register_attention(PROBE, _attention)
