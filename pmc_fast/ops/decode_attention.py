"""Attention of a decode step's rows over a pool of keys and values that token histories share."""

from dataclasses import dataclass, fields
from functools import cached_property

import torch

from ..errors import PMCError
from . import native
from .dispatch import resolve_backend

DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
VARIANTS = ("fma", "mma")  # of the CUDA kernel
VARIANT = "fma"  # mma has not run on a card: benchmarks.card_probe attention compares them
MMA_STEP = 16  # head sizes that mma serves are multiples
MMA_TILE_ROWS = 0  # rows that read a prompt together, 0: chosen for the card; results do not depend on it


@dataclass(frozen=True)
class StepIndex:
    """Which pool slots each row sees; int32 tensors. Rows of one prompt are neighbours and form a block."""

    slots: torch.Tensor  # [R]: where the row's own key and value go
    prefix_len: torch.Tensor  # [R]: how many slots of its block's prefix it sees
    cu_suffix: torch.Tensor  # [R + 1]
    suffix: torch.Tensor  # slots behind the prefix, row by row
    cu_rows: torch.Tensor  # [B + 1]
    cu_prefix: torch.Tensor  # [B + 1]
    prefix: torch.Tensor  # slots of each block's prompt

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Return the arrays' addresses, then the numbers of rows and blocks, as the kernels take them."""
        tensors = [getattr(self, f.name) for f in fields(self)]
        rows, blocks = self.slots.shape[0], self.cu_rows.shape[0] - 1
        good = all(t.dtype == torch.int32 and t.dim() == 1 and t.is_contiguous() for t in tensors)
        good = good and self.prefix_len.shape[0] == rows == self.cu_suffix.shape[0] - 1
        good = good and self.cu_prefix.shape[0] - 1 == blocks >= 0
        if good and self.slots.device.type == "cpu":  # on CUDA it would cost a host sync
            ends = (int(cu.numpy()[-1]) for cu in (self.cu_suffix, self.cu_prefix))  # not a torch operation
            good = all(end <= len(slots) for end, slots in zip(ends, (self.suffix, self.prefix), strict=True))
        if not good:
            raise PMCError("StepIndex: arrays must be int32, contiguous, and as long as rows, blocks and offsets say")
        return (*(t.data_ptr() for t in tensors), rows, blocks)

    def to(self, device: torch.device) -> "StepIndex":
        """Return a copy on `device`."""
        return StepIndex(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def visible(self, row: int, block: int, window: int | None = None) -> torch.Tensor:
        """Return the slots that a row sees, in the order of their positions."""
        prefix = self.prefix[int(self.cu_prefix[block]) :][: int(self.prefix_len[row])]
        suffix = self.suffix[int(self.cu_suffix[row]) : int(self.cu_suffix[row + 1])]
        return torch.cat([prefix, suffix]).long()[-window if window else 0 :]


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    index: StepIndex,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    backend: str | None = None,
    variant: str | None = None,
) -> torch.Tensor:
    """Write each row's key and value to its slot, then let each row attend to the slots that it sees.

    Parameters
    ----------
    q : Tensor [R, heads, dim]
        float32, float64 or bfloat16; last dimension contiguous, as for k and v.
    k, v : Tensor [R, kv_heads, dim]
        Of this step's tokens; all are in the pool before any row reads.
    k_pool, v_pool : Tensor [slots, kv_heads, dim]
        Contiguous, of q's dtype; changed in place.
    index : StepIndex
        On the same device.
    scale : float
        Factor of the products of queries and keys.
    softcap : float, optional
        z becomes softcap * tanh(z / softcap) before the softmax.
    window : int, optional
        A row sees this many last positions, its own included.
    backend : {"reference", "cpu", "cuda"}, optional
    variant : {"fma", "mma"}, optional
        Of the CUDA kernel, VARIANT by default. mma multiplies on tensor cores; it serves bfloat16 and head sizes that
        are multiples of 16, and fma everything else. Both are as exact.

    Returns
    -------
    Tensor [R, heads, dim]
        Contiguous. Scores and sums are float32 (float64 for float64 inputs). Not differentiable.

    Raises
    ------
    PMCError
        Other dtypes, layouts or variants.
    """
    variant = VARIANT if variant is None else variant
    if variant not in VARIANTS:
        raise PMCError(f"decode_attention: variant {variant!r}: use one of {', '.join(VARIANTS)}")
    backend = resolve_backend(backend, q.device)
    if backend == "reference":
        return _reference(q, k, v, k_pool, v_pool, index, scale, softcap, window)
    if backend == "cuda" and q.device.type != "cuda":  # Triton's interpreter does not run CUDA C++
        raise PMCError(f"decode_attention: backend 'cuda' can't serve tensors on {q.device}: use cpu or reference")
    good = all(t.dim() == 3 for t in (q, k, v, k_pool, v_pool))
    good = good and all(t.dtype == q.dtype and t.stride(2) == 1 for t in (q, k, v, k_pool, v_pool))
    good = good and k.shape == v.shape and k_pool.is_contiguous() and v_pool.is_contiguous()
    good = good and v_pool.shape == k_pool.shape and k_pool.shape[1:] == k.shape[1:] and k.shape[1] > 0 < k.shape[2]
    good = good and index.slots.shape == q.shape[:1] and index.slots.device == q.device
    if not good or q.dtype not in DTYPES or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise PMCError(
            f"decode_attention: q is {q.dtype} {tuple(q.shape)}, k {k.dtype} and v {v.dtype} {tuple(k.shape)}, the pool "
            f"{k_pool.dtype} {tuple(k_pool.shape)}: need one type of float32, float64 or bfloat16 (under autocast give the "
            "engine autocast_dtype), heads a multiple of k's, one head size, and a contiguous pool"
        )
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    module = native.cpu() if backend == "cpu" else native.cuda()
    arguments = (
        *((t.data_ptr(), t.stride(0), t.stride(1)) for t in (q, k, v)),
        k_pool.data_ptr(), v_pool.data_ptr(), out.data_ptr(), (q.shape[1], k.shape[1], q.shape[2]),
        scale, softcap or 0.0, window or 0, index.addresses,
    )  # fmt: skip
    kernel = getattr(module, kernel_name(backend, variant, q.dtype, q.shape[2]))
    if backend == "cpu":
        kernel(*arguments, k_pool.shape[0], native.isa(), torch.get_num_threads())
    else:
        tiles = (MMA_TILE_ROWS,) if "mma" in kernel.__name__ else ()
        with torch.cuda.device(q.device):  # launches go to the current device, whatever the stream
            try:
                kernel(*arguments, torch.cuda.current_stream(q.device).cuda_stream, *tiles)
            except ValueError as error:
                raise PMCError(str(error)) from error
    return out


def kernel_name(backend: str, variant: str, dtype: torch.dtype, dim: int) -> str:
    """Return the name of the compiled function that serves such tensors."""
    mma = backend == "cuda" and variant == "mma" and dtype == torch.bfloat16 and dim % MMA_STEP == 0
    return f"decode_attention_{'mma_' if mma else ''}{DTYPES[dtype]}"


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    index: StepIndex,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend one row after another, in float64."""
    k_pool[index.slots.long()] = k
    v_pool[index.slots.long()] = v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for block in range(index.cu_rows.shape[0] - 1):
        for row in range(int(index.cu_rows[block]), int(index.cu_rows[block + 1])):
            seen = index.visible(row, block, window)
            keys = k_pool[seen].double().repeat_interleave(group, 1)  # [n, heads, dim]
            values = v_pool[seen].double().repeat_interleave(group, 1)
            z = torch.einsum("hd,nhd->hn", q[row].double(), keys) * scale
            z = softcap * torch.tanh(z / softcap) if softcap else z
            out[row] = torch.einsum("hn,nhd->hd", z.softmax(-1), values).to(q.dtype)
    return out
