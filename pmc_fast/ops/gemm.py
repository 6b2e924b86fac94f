"""Float32 matrix products on a CPU with AVX-512, faster there than torch's."""

import torch

from ..errors import PMCError
from . import native

AVX512 = 2  # csrc/simd.h


def gemm_serves(*tensors: torch.Tensor) -> bool:
    """Return whether `gemm` takes these: float32 on a CPU with AVX-512."""
    good = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)
    return good and native.isa() >= AVX512


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    add: bool = False,
) -> torch.Tensor:
    """Compute a @ b + bias.

    Parameters
    ----------
    a : float32 Tensor [M, K]
        Rows or columns contiguous, as b's; others are copied first.
    b : float32 Tensor [K, N]
    bias : float32 Tensor [N], optional
    out : float32 Tensor [M, N], optional
        Where to write; its rows must be contiguous, with any stride between them.
    add : bool
        Add to what is in `out`, instead of a bias.

    Returns
    -------
    Tensor [M, N]
        `out`, if given; not differentiable.
    """
    if not all(t is None or gemm_serves(t) for t in (a, b, bias, out)):
        raise PMCError("gemm: need float32 tensors on a CPU with AVX-512")
    if a.dim() != 2 or b.dim() != 2:
        raise PMCError(f"gemm: a is {tuple(a.shape)} and b {tuple(b.shape)}: need two matrices")
    (m, k), n = a.shape, b.shape[1]
    c = a.new_empty(m, n) if out is None else out
    if b.shape[0] != k or c.shape != (m, n) or (bias is not None and (add or bias.shape != (n,))):
        raise PMCError(f"gemm: a is {tuple(a.shape)}, b {tuple(b.shape)} and out {tuple(c.shape)}: they do not fit")
    if _row_stride(c) is None or (add and out is None):
        raise PMCError("gemm: out must have contiguous rows, and be given to add to it")
    (a, a_transposed, lda), (b, b_transposed, ldb) = _as_stored(a), _as_stored(b)
    bias = None if bias is None else bias.contiguous()
    native.cpu().gemm_f32(
        a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr(),
        (m, n, k), (lda, ldb, _row_stride(c)), a_transposed, b_transposed, add, torch.get_num_threads(),
    )  # fmt: skip
    return c


def _row_stride(t: torch.Tensor) -> int | None:
    """Return the stride between rows, or None if a row is not contiguous or overlaps the next."""
    rows, size = t.shape
    if size > 1 and t.stride(1) != 1:
        return None
    if rows <= 1:  # a single row's stride may be anything
        return size
    return t.stride(0) if t.stride(0) >= size else None


def _as_stored(t: torch.Tensor) -> tuple[torch.Tensor, bool, int]:
    """Return a matrix that the C++ can read, whether it is stored transposed, and the stride between its rows."""
    for transposed, view in ((False, t), (True, t.T)):
        stride = _row_stride(view)
        if stride is not None:
            return t, transposed, stride
    return t.contiguous(), False, t.shape[1]
