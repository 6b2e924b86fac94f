"""The GPU's GEMMs (cuBLAS through torch) and row kernel (Triton), for `nll_chunked`."""

import torch

from .native import triton_kernels
from .nll_chunked import Logits


class Cuda:
    """Computes in the inputs' dtype with float32 accumulation; d(head) of several chunks adds up in float32."""

    def __init__(self) -> None:
        self._kernel = triton_kernels("nll_rows")

    def chunk_rows(self, rows: int, head: torch.Tensor, workspace: int) -> int:
        size = max(1, workspace // (head.shape[0] * head.element_size()))
        chunks = max(1, -(-rows // size))
        equal = -(-rows // chunks)
        return max(1, min(size, -(-equal // 128) * 128))  # of equal size, in whole GEMM tiles

    def logits_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        return hidden.dtype

    def logits(self, hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden, head.T, out=out)

    def d_hidden(self, d_logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return d_logits @ head

    def d_head(
        self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        if dtype == hidden.dtype:
            return d_logits.T @ hidden if total is None else total.addmm_(d_logits.T, hidden)
        if not hidden.is_cuda:  # in Triton's interpreter: torch's CPU GEMMs know no out_dtype
            return self.d_head(d_logits.to(dtype), hidden.to(dtype), total, dtype)
        if total is None:
            return torch.mm(d_logits.T, hidden, out_dtype=dtype)
        return torch.addmm(total, d_logits.T, hidden, out_dtype=dtype, out=total)

    def nll_rows(
        self,
        logits: torch.Tensor,
        cu_targets: torch.Tensor,
        targets: torch.Tensor,
        row_scale: torch.Tensor,
        logps: torch.Tensor,
        bias: torch.Tensor | None,
        how: Logits,
        grad: bool,
    ) -> None:
        self._kernel.nll_rows(
            logits, cu_targets, targets, row_scale, logps, bias, how.temperature, how.softcap, how.logit_scale, grad
        )
