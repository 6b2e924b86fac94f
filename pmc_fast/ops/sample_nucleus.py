"""Draws from rows of logits: temperature, top-k, top-p, by an exponential race with keyed randomness."""

from dataclasses import dataclass

import numpy as np
import torch

from .. import native
from ..errors import PMCError


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
    logits : float32 or float64 Tensor [R, V]
        On the CPU; last dimension contiguous.
    cu_draws : int64 Tensor [R + 1]
        Draws cu_draws[r] to cu_draws[r + 1] are from row r.
    streams, samples, positions : int64 Tensor [D]
        Each draw's key; samples and positions below 2**32.
    temperature : float
        0 is greedy: the first arg-max, whatever top_k and top_p are.
    top_k : int
        0: all tokens.
    top_p : float
        In (0, 1]; the fewest likeliest tokens that hold this share of what top_k leaves.
    seed : int
    backend : {"reference", "cpu"}, optional
        Triton's comes with the rollout engine.

    Returns
    -------
    Draws
        A row with a NaN or +inf, or with nothing but -inf, gives token -1 and NaN.

    Raises
    ------
    PMCError
        Settings out of range, other dtypes or devices.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise PMCError(
            f"sample_nucleus: temperature {temperature}, top_k {top_k}, top_p {top_p}: need temperature >= 0, "
            "top_k >= 0 and 0 < top_p <= 1"
        )
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.float64) or logits.stride(1) != 1:
        raise PMCError(
            f"sample_nucleus: logits are {logits.dtype} on {logits.device}, strides {logits.stride()}: "
            "need float32 or float64 on the CPU, last dimension contiguous"
        )
    keys = [t.to(torch.int64).contiguous() for t in (cu_draws, streams, samples, positions)]
    rows, vocab = logits.shape
    draws = keys[1].shape[0]
    ends = keys[0]
    if (
        ends.shape != (rows + 1,)
        or any(k.shape != (draws,) for k in keys[1:])
        or int(ends[0]) != 0
        or int(ends[-1]) != draws
        or bool((ends.diff() < 0).any())
    ):
        raise PMCError(f"sample_nucleus: cu_draws must rise from 0 to {draws} over {rows} rows")
    if backend == "reference":
        return _reference(logits, *keys, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if backend not in (None, "cpu"):
        raise PMCError(f"sample_nucleus: backend {backend!r} is none of reference, cpu")
    tokens = torch.empty(draws, dtype=torch.int64)
    logps, mass = torch.empty(draws, dtype=torch.float64), torch.empty(rows, dtype=torch.float64)
    module = native.cpu()
    kernel = module.sample_nucleus_f32 if logits.dtype == torch.float32 else module.sample_nucleus_f64
    kernel(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocab,
        temperature,
        top_k,
        top_p,
        seed % 2**64,
        *(k.data_ptr() for k in keys),
        tokens.data_ptr(),
        logps.data_ptr(),
        mass.data_ptr(),
        module.best_isa(),
        torch.get_num_threads(),
    )
    return Draws(tokens, logps, mass)


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
    """Draw as above, one token at a time, by sorting and in float64."""
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
    return Draws(torch.tensor(tokens, dtype=torch.int64), torch.tensor(logps).double(), torch.tensor(masses).double())


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
    x = (seed * 0x9E3779B97F4A7C15 + stream) & mask
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
