"""The GPU's GEMMs (cuBLAS through torch) and row kernel (Triton), for `nll_chunked`."""

import torch

from .native import triton_kernels
from .nll_chunked import Logits
from .products import weight_gradient


class Cuda:
    """Computes in the inputs' dtype with float32 accumulation; d(head) of several chunks adds up in float32."""

    def __init__(self) -> None:
        self._kernel = triton_kernels("nll_rows")

    @staticmethod
    def most_rows(head: torch.Tensor, workspace: int) -> int:
        return max(1, workspace // (head.shape[0] * head.element_size()))

    @staticmethod
    def keeps(hidden: torch.Tensor, head: torch.Tensor, workspace: int) -> bool:
        # a factor such as a loss scale would overflow float16's hidden rows
        return hidden.dtype != torch.float16 and hidden.shape[0] <= Cuda.most_rows(head, workspace)

    def chunk_rows(self, rows: int, head: torch.Tensor, workspace: int) -> int:
        size = self.most_rows(head, workspace)
        chunks = max(1, -(-rows // size))
        equal = -(-rows // chunks)
        return max(1, min(size, -(-equal // 128) * 128))  # of equal size, in whole GEMM tiles

    @staticmethod
    def logits_dtype(hidden: torch.Tensor) -> torch.dtype:
        return hidden.dtype

    def logits(self, hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden, head.T, out=out)

    def d_hidden(self, d_logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return d_logits @ head

    def d_head(
        self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return weight_gradient(d_logits, hidden, total, dtype)

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
