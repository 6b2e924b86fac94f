"""Causal attention over sequences laid end to end, each isolated, and its entry in transformers' interface.

``sdpa`` calls torch's scaled_dot_product_attention sequence by sequence: any device, dtype, softcap and dropout.
``varlen`` is one call of torch's variable-length kernel, ``flash_attn`` and ``flash_attn_3`` one of the package of that
name, all on CUDA in half precision. Device, dtype and head size choose; ``backend=`` overrides it.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import dropout as dropped
from torch.nn.functional import scaled_dot_product_attention

from ..data.packing import Segments
from ..errors import PMCError
from . import patching

ATTENTION = "pmc_fast_packed"
BACKENDS = ("sdpa", "varlen", "flash_attn", "flash_attn_3")
PACKAGES = {"flash_attn": ("flash_attn", "pip install flash-attn"),
            "flash_attn_3": ("flash_attn_interface", "python setup.py install, in hopper/ of flash-attention's repository")}  # fmt: skip
HALF = (torch.bfloat16, torch.float16)
FLASH_KEYWORDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
                  "window_size", "softcap", "deterministic")  # fmt: skip
LARGEST_HEAD = (
    256  # of the CUDA kernels, whose head sizes are multiples of 8; FlashAttention-3's deterministic backward: 192
)


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Attend within each segment, causally, and from it to all of its prefix.

    Parameters
    ----------
    q : Tensor [T, H, D]
    k : Tensor [T, H_kv, D]
        H_kv divides H.
    v : Tensor [T, H_kv, E]
        E is D or, in families of latent attention, less.
    segments : Segments
        Cover all T tokens, in order.
    scale : float
        Of the products q k.
    softcap : float, optional
        Products x become softcap * tanh(x / softcap).
    window : int, optional
        A token sees itself and the window - 1 tokens before it.
    dropout : float
        Of attention weights.
    backend : {"sdpa", "varlen", "flash_attn", "flash_attn_3"}, optional
        By default, for half precision on CUDA: flash_attn_3 on sm_90 without dropout, else flash_attn, each if it is
        installed, else varlen without softcap and dropout. Otherwise, and for head sizes that these kernels do not
        have, sdpa.

    Returns
    -------
    Tensor [T, H, E]
        Differentiable in q, k and v.
    """
    chosen = _resolve(backend, q, softcap, dropout)
    if chosen == "sdpa":
        return _sdpa(q, k, v, segments, scale, softcap, window, dropout)
    size = v.shape[-1]
    v = patching.widened(v, k)  # these kernels support one size
    if segments.shared:
        keys = segments.keys(q.device)
        k, v = k[keys], v[keys]
    cu_q, cu_k = segments.cu_seqlens(q.device)
    longest = segments.longest
    left = -1 if window is None else window - 1
    if chosen == "varlen":
        made = _varlen(_varlen_attn(), q, k, v, cu_q, cu_k, longest, scale, left)
    else:
        made = _flash(chosen, q, k, v, cu_q, cu_k, longest, scale, left, softcap, dropout)
    return made[..., :size]


def _resolve(backend: str | None, q: torch.Tensor, softcap: float | None, dropout: float) -> str:
    if backend is not None and backend not in BACKENDS:
        raise PMCError(f"packed_attention: backend is {backend!r}: use one of {', '.join(BACKENDS)}")
    plain = not softcap and not dropout
    if backend is None:
        size = q.shape[-1]
        if q.device.type != "cuda" or q.dtype not in HALF or size > LARGEST_HEAD or size % 8:
            return "sdpa"
        ordered = not torch.are_deterministic_algorithms_enabled() or size <= 192
        if not dropout and ordered and _on_hopper(q.device) and _flash_attn("flash_attn_3") is not None:
            return "flash_attn_3"
        if _flash_attn("flash_attn") is not None:
            return "flash_attn"
        return "varlen" if plain else "sdpa"
    if backend == "varlen" and not plain:
        raise PMCError("packed_attention: backend 'varlen' has no softcap and no dropout: use sdpa or flash_attn")
    if backend == "flash_attn_3" and dropout:
        raise PMCError("packed_attention: backend 'flash_attn_3' has no dropout: use sdpa or flash_attn")
    return backend


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    softcap: float | None,
    window: int | None,
    dropout: float,
) -> torch.Tensor:
    # split instead of slices: the backward of each slice would fill a tensor of T rows
    pieces = [t.split(segments.lengths) for t in (q, k, v)]
    at = {s.begin: i for i, s in enumerate(segments)}
    out = []
    for i, s in enumerate(segments):
        own_q, own_k, own_v = (piece[i] for piece in pieces)
        if s.prefix:
            prefix = at[s.prefix_begin]  # a prefix is a segment of its own
            own_k = torch.cat([pieces[1][prefix], own_k])
            own_v = torch.cat([pieces[2][prefix], own_v])
        own_q, own_k, own_v = (t.transpose(0, 1)[None] for t in (own_q, own_k, own_v))
        sees_all = s.length == 1 and (window is None or s.prefix < window)
        causal = not softcap and not sees_all and not s.prefix and (window is None or s.length <= window)
        mask = None if sees_all or causal else segments.mask(i, window, q.device)
        if softcap:
            made = _softcapped(own_q, own_k, own_v, mask, scale, softcap, dropout)
        else:
            made = scaled_dot_product_attention(
                own_q,
                own_k,
                own_v,
                attn_mask=mask,
                is_causal=causal,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        out.append(made[0].transpose(0, 1))
    return torch.cat(out)


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    dropout: float,
) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    products = softcap * torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap)
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf)
    weights = products.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return dropped(weights, dropout) @ v


def _varlen(
    function: Callable[..., Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest: tuple[int, int],
    scale: float,
    left: int,
) -> torch.Tensor:
    """Call torch's varlen_attn, whose keywords differ between releases."""
    knows = _parameters(function)
    how: dict[str, Any] = {}
    if "scale" in knows:
        how["scale"] = scale
    else:  # torch 2.10 scales by 1 / sqrt(D) alone
        q = q * (scale * math.sqrt(q.shape[-1]))
    if "window_size" in knows:
        how["window_size"] = (left, 0)
    elif left >= 0:
        raise PMCError(f"packed_attention: torch {torch.__version__} has no sliding window in varlen_attn: update it")
    else:
        how["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in knows:
            how["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    return function(q, k, v, cu_q, cu_k, *longest, **how)


def _flash(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest: tuple[int, int],
    scale: float,
    left: int,
    softcap: float | None,
    dropout: float,
) -> torch.Tensor:
    """Call a flash-attn package's function, by keywords: their order differs between releases of version 3."""
    function = _flash_attn(backend)
    if function is None:
        raise PMCError(
            f"packed_attention: backend is {backend!r}, but it is not installed, or too old: {PACKAGES[backend][1]}"
        )
    window, ordered = (left, -1 if left < 0 else 0), torch.are_deterministic_algorithms_enabled()
    how = dict(zip(FLASH_KEYWORDS, (cu_q, cu_k, *longest, scale, True, window, softcap or 0.0, ordered), strict=True))
    made = function(q, k, v, **how, **({"dropout_p": dropout} if dropout else {}))
    return made[0] if isinstance(made, tuple) else made  # before 2025-08, version 3 returned the logsumexp too


@functools.cache  # asked in every layer
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _flash_attn(backend: str) -> Callable[..., Any] | None:
    """Return a package's function, or None without it or if it can't be called so: early releases of both differ."""
    try:
        function: Callable[..., Any] = importlib.import_module(PACKAGES[backend][0]).flash_attn_varlen_func
        inspect.signature(function).bind(*"qkv", **dict.fromkeys(FLASH_KEYWORDS))
    except (ImportError, AttributeError, TypeError):
        return None
    return function


@functools.cache
def _on_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@torch.compiler.disable  # the number of sequences and their lengths change with every step
def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, **how: Any) -> torch.Tensor:
    return packed_attention(q, k, v, segments, **how)


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
    packed_segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a pack [1, T], with the signature of transformers' attention interface."""
    patching.check_call(module, packed_segments, kwargs)
    assert packed_segments is not None
    low = _autocast_dtype(query.device.type)
    made = _attend(
        *(t[0].transpose(0, 1).to(low if t.dtype == torch.float32 else t.dtype) for t in (query, key, value)),
        packed_segments,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        window=sliding_window,
        dropout=dropout,
    )
    return made[None], None


def _autocast_dtype(device_type: str) -> torch.dtype:
    """Return the dtype to which autocast casts float32 in torch's own attention; rotary embeddings return float32."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32


patching.register_attention(ATTENTION, attention)
