"""The product that gives a weight's gradient, added to what is there."""

import torch


def weight_gradient(
    d_out: torch.Tensor, x: torch.Tensor, total: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return d_out.T @ x, accumulated and added in float32 or wider and rounded once.

    Parameters
    ----------
    d_out : Tensor [M, N]
    x : Tensor [M, K]
        Of d_out's dtype.
    total : Tensor [N, K], optional
        The product is added to it, in place: no tensor of its size is made, unless it is narrower than d_out.
    dtype : torch.dtype, optional
        Of a result without `total`; by default d_out's.

    Returns
    -------
    Tensor [N, K]
        `total`, or a new one.
    """
    dtype = (dtype or d_out.dtype) if total is None else total.dtype
    if dtype == d_out.dtype:
        return d_out.T @ x if total is None else total.addmm_(d_out.T, x)
    if torch.finfo(dtype).bits < torch.finfo(d_out.dtype).bits:
        made = d_out.T @ x
        return made.to(dtype) if total is None else total.add_(made)
    if not (d_out.is_cuda and dtype == torch.float32):  # torch's CPU products know no out_dtype
        return weight_gradient(d_out.to(dtype), x.to(dtype), total)
    if total is None:
        return torch.mm(d_out.T, x, out_dtype=dtype)
    return torch.addmm(total, d_out.T, x, out_dtype=dtype, out=total)
