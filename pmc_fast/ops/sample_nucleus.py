"""Sampling from rows of logits: temperature, top-k, top-p, then an exponential race with keyed randomness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import PMCError
from . import native
from .dispatch import resolve_backend

DTYPES = {  # dtypes of logits
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}


SEED_FACTOR = 0x9E3779B97F4A7C15  # of stream_key in csrc/philox.h


@dataclass(frozen=True, slots=True)
class Draws:
    """What `sample_nucleus` returns."""

    tokens: torch.Tensor  # int64 [D]
    logps: torch.Tensor  # float64 [D]: of the full softmax at temperature 1
    nucleus_mass: torch.Tensor  # float64 [R]: share of softmax(logits / temperature) that was kept


def sample_nucleus(
    logits: torch.Tensor,
    cu_draws: torch.Tensor,
    streams: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    backend: str | None = None,
) -> Draws:
    """Draw tokens, any number from each row.

    Hugging Face generate's order: temperature, then top_k (ties with the k-th kept), then top_p on what
    is left, then a draw: arg-max over the kept tokens v of p_v / E_v, with E_v exponential. E_v is a
    function of (seed, stream, sample, position, v) alone, so which token a sample gets depends on its
    row's distribution and not on the batch, its order or the device.

    Parameters
    ----------
    logits : Tensor [R, V]
        On the CPU float32 or float64, on CUDA float32, bfloat16 or float16, computed in float32; last
        dimension contiguous.
    cu_draws : int64 Tensor [R + 1]
        Draws cu_draws[r] to cu_draws[r + 1] are from row r. Not checked on CUDA, where that would be a
        host sync: a draw that no row owns gives token -1 and NaN.
    streams, samples, positions : int64 Tensor [D]
        Each draw's key; samples and positions below 2**32. On the device of logits, as cu_draws.
    temperature : float
        0 is greedy: the first arg-max, whatever top_k and top_p are.
    top_k : int
        0: all tokens.
    top_p : float
        In (0, 1]; keeps the fewest likeliest tokens that hold this share of what top_k leaves.
    seed : int
    backend : {"reference", "cpu", "cuda"}, optional
        By default the device of logits decides.

    Returns
    -------
    Draws
        A row with a NaN or +inf, or with nothing but -inf, gives token -1 and NaN.

    Raises
    ------
    PMCError
        Settings out of range, other dtypes or devices.

    Notes
    -----
    On CUDA there is no host sync, and what is launched depends on shapes and settings alone: it can be
    captured in a CUDA graph.
    """
    check_settings(temperature, top_k, top_p)
    chosen = resolve_backend(backend, logits.device)
    if logits.dim() != 2 or logits.dtype not in DTYPES[chosen] or logits.stride(1) != 1:
        dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[chosen])
        raise PMCError(
            f"sample_nucleus: logits are {logits.dtype} on {logits.device}, strides {logits.stride()}: "
            f"backend {chosen!r} needs {dtypes}, [R, V], last dimension contiguous"
        )
    keys = [t.to(torch.int64).contiguous() for t in (cu_draws, streams, samples, positions)]
    if any(k.device != logits.device for k in keys):
        raise PMCError(
            f"sample_nucleus: logits are on {logits.device}, draws on {', '.join(str(k.device) for k in keys)}"
        )
    _check_draws(keys, logits.shape[0], values=chosen != "cuda")
    if chosen == "reference":
        return _reference(logits, *keys, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    draws = Draws(
        torch.empty_like(keys[1]),
        torch.empty_like(keys[1], dtype=torch.float64),
        torch.empty(logits.shape[0], dtype=torch.float64, device=logits.device),
    )
    if chosen == "cuda":
        out, numbers = (draws.tokens, draws.logps, draws.nucleus_mass), launch_settings(temperature, top_k, top_p)
        native.triton_kernels("sampling").sample_nucleus(logits, *keys, *out, numbers, seed)
    else:
        _on_cpu(logits, keys, draws, temperature, top_k, top_p, seed)
    return draws


def sample_nucleus_static(
    logits: torch.Tensor, keys: Sequence[torch.Tensor], settings: torch.Tensor, out: Draws
) -> None:
    """Draw as `sample_nucleus` does, with settings and results in memory: for CUDA graphs.

    A replay draws by what `settings` then holds. Nothing is checked: callers take these tensors from one place.

    Parameters
    ----------
    logits : Tensor [R, V]
    keys : int64 Tensors
        `cu_draws`, `streams`, `samples` and `positions` as in `sample_nucleus`. The seed is in the streams: see `seeded`.
    settings : float64 Tensor [6]
        What `launch_settings` returns, on the device of logits.
    out : Draws
        Written.
    """
    if logits.is_cuda:
        written = out.tokens, out.logps, out.nucleus_mass
        native.triton_kernels("sampling").sample_nucleus(logits, *keys, *written, settings, 0)
        return
    _, top_k, top_p, _, greedy, temperature = settings.numpy().tolist()
    if greedy:
        temperature, top_k, top_p = 0.0, 0, 1.0
    _on_cpu(logits, keys, out, temperature, int(top_k), top_p, 0)


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Refuse settings that are out of range."""
    if not (0 <= temperature < float("inf") and top_k >= 0 and 0 < top_p <= 1):
        raise PMCError(
            f"sample_nucleus: temperature {temperature}, top_k {top_k}, top_p {top_p}: need temperature >= 0, "
            "top_k >= 0 and 0 < top_p <= 1"
        )


def launch_settings(temperature: float, top_k: int, top_p: float) -> tuple[float, ...]:
    """Return the settings as the CUDA kernels take them: 1 / temperature, top_k, top_p, log_tail, greedy, temperature."""
    if temperature == 0:
        return (1.0, 1, 1.0, 0.0, 1, 1.0)
    # tokens below half of (1 - top_p) / V of the mass hold less than 1 - top_p: the half is for rounding
    log_tail = math.log(0.5 * (1 - top_p)) if top_p < 1 else 0.0
    return (1 / temperature, min(top_k, 2**31 - 1), float(top_p), log_tail, 0, float(temperature))


def seeded(stream: int, seed: int) -> int:
    """Return the stream that with seed 0 gives the random numbers of a stream with a seed: an int64."""
    mixed = (seed * SEED_FACTOR + stream) % 2**64
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _on_cpu(
    logits: torch.Tensor,
    keys: Sequence[torch.Tensor],
    out: Draws,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    module = native.cpu()
    kernel = module.sample_nucleus_f32 if logits.dtype == torch.float32 else module.sample_nucleus_f64
    arrays = (*keys, out.tokens, out.logps, out.nucleus_mass)
    kernel(
        logits.data_ptr(), logits.stride(0), *logits.shape, temperature, top_k, top_p, seed % 2**64,
        *(t.data_ptr() for t in arrays), out.tokens.shape[0], native.isa(), torch.get_num_threads(),
    )  # fmt: skip


def _check_draws(keys: list[torch.Tensor], rows: int, *, values: bool) -> None:
    ends, draws = keys[0], keys[1].numel()
    valid = ends.shape == (rows + 1,) and all(k.shape == (draws,) for k in keys[1:])
    if valid and values:
        valid = int(ends[0]) == 0 and int(ends[-1]) == draws and not bool((ends.diff() < 0).any())
    if not valid:
        raise PMCError(f"sample_nucleus: cu_draws must rise from 0 to {draws} over {rows} rows")


def _reference(
    logits: torch.Tensor,
    cu_draws: torch.Tensor,
    streams: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Draws:
    """Draw as above, one token at a time, by sorting and in float64, on the CPU."""
    device = logits.device
    logits, cu_draws, streams, samples, positions = (t.cpu() for t in (logits, cu_draws, streams, samples, positions))
    tokens, logps, masses = [], [], []
    for r, row in enumerate(logits.double()):
        begin, end = int(cu_draws[r]), int(cu_draws[r + 1])
        if row.isnan().any() or row.max().abs() == torch.inf:
            tokens += [-1] * (end - begin)
            logps += [float("nan")] * (end - begin)
            masses.append(float("nan"))
            continue
        kept, p, mass = kept_tokens(row, temperature, top_k, top_p)
        masses.append(mass)
        for d in range(begin, end):
            token = int(kept[0])
            if temperature > 0:
                key = _stream_key(seed, int(streams[d]))
                uniform = _uniforms(key, kept.numpy(), int(positions[d]), int(samples[d]))
                token = int(kept[int(np.argmax(p.numpy() / -np.log(uniform)))])
            tokens.append(token)
            logps.append(float(row.log_softmax(0)[token]))
    return Draws(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.tensor(logps, dtype=torch.float64, device=device),
        torch.tensor(masses, dtype=torch.float64, device=device),
    )


def kept_tokens(
    row: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return the kept tokens of a float64 row in order of token, their probabilities, and their mass.

    Probabilities are of softmax(row / temperature) over all tokens, so they sum to the mass.
    """
    if temperature == 0:
        first = int((row == row.max()).nonzero()[0])
        return torch.tensor([first]), torch.ones(1, dtype=row.dtype), 1.0
    p = torch.softmax(row / temperature, 0)
    keep = p > 0
    if 0 < top_k < len(p):
        keep &= row >= row.topk(top_k).values[-1]
    if top_p < 1:
        left = torch.where(keep, p, 0)
        order = torch.sort(left, descending=True, stable=True).indices
        held = left[order].cumsum(0) - left[order]
        keep = torch.zeros_like(keep).scatter_(0, order, held < top_p * left.sum()) & keep
    tokens = keep.nonzero()[:, 0]
    return tokens, p[tokens], float(p[tokens].sum())


def _stream_key(seed: int, stream: int) -> int:
    """Compute what stream_key in csrc/philox.h does."""
    mask = 2**64 - 1
    x = (seed * SEED_FACTOR + stream) & mask
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x


def _uniforms(key: int, tokens: np.ndarray, position: int, sample: int) -> np.ndarray:
    """Compute a uniform number in (0, 1) for each token, as csrc/philox.h does."""
    low = np.uint64(0xFFFFFFFF)
    words = [np.full(len(tokens), w, dtype=np.uint64) for w in (0, position, sample, 0)]
    words[0] = tokens.astype(np.uint64)
    keys = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    for _ in range(10):
        a, b = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
        words = [
            (b >> np.uint64(32)) ^ words[1] ^ keys[0],
            b & low,
            (a >> np.uint64(32)) ^ words[3] ^ keys[1],
            a & low,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & low, (keys[1] + np.uint64(0xBB67AE85)) & low]
    bits = (words[1] << np.uint64(32)) | words[0]
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
