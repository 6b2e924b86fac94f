"""The CPU's GEMMs (torch's) and row kernel (C++), for `nll_chunked`."""

import torch

from . import native
from .nll_chunked import Logits
from .products import weight_gradient

CHUNK_BYTES = 64 << 20  # logits held at once: larger chunks are no faster
VOCAB_BLOCK = 8192  # rows of a bfloat16 or float16 head made float32 at a time


class Cpu:
    """Computes in float32 (or float64) whatever the inputs are: low-precision GEMMs are slow on most CPUs."""

    @staticmethod
    def most_rows(head: torch.Tensor, workspace: int) -> int:
        return max(1, min(workspace, CHUNK_BYTES) // (head.shape[0] * Cpu.logits_dtype(head).itemsize))

    @staticmethod
    def keeps(hidden: torch.Tensor, head: torch.Tensor, workspace: int) -> bool:
        return hidden.shape[0] <= Cpu.most_rows(head, workspace)

    def chunk_rows(self, rows: int, head: torch.Tensor, workspace: int) -> int:
        size = self.most_rows(head, workspace)
        chunks = max(1, -(-rows // size))
        return max(1, -(-rows // chunks))  # of equal size

    @staticmethod
    def logits_dtype(hidden: torch.Tensor) -> torch.dtype:
        return torch.promote_types(hidden.dtype, torch.float32)

    def logits(self, hidden: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
        hidden = hidden.to(out.dtype)
        for block in _blocks(head, out.dtype):
            torch.mm(hidden, head[block].to(out.dtype).T, out=out[:, block])

    def d_hidden(self, d_logits: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        total = None
        for block in _blocks(head, d_logits.dtype):
            part = d_logits[:, block] @ head[block].to(d_logits.dtype)
            total = part if total is None else total.add_(part)
        assert total is not None  # a head has rows
        return total

    def d_head(
        self, d_logits: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return weight_gradient(d_logits, hidden.to(d_logits.dtype), total)

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
        isa: int | None = None,
    ) -> None:
        module = native.cpu()
        kernel = module.nll_rows_f64 if logits.dtype == torch.float64 else module.nll_rows_f32
        wide = None if bias is None else bias.to(logits.dtype).contiguous()
        kernel(
            logits.data_ptr(), logits.stride(0), *logits.shape, 0 if wide is None else wide.data_ptr(),
            how.temperature, how.softcap, how.logit_scale,
            cu_targets.data_ptr(), targets.data_ptr(), row_scale.data_ptr(), logps.data_ptr(), targets.shape[0],
            grad, native.isa() if isa is None else isa, torch.get_num_threads(),
        )  # fmt: skip


def _blocks(head: torch.Tensor, dtype: torch.dtype) -> list[slice]:
    """Return the whole head, or blocks of its rows where they must be converted first."""
    step = head.shape[0] if head.dtype == dtype else VOCAB_BLOCK
    return [slice(begin, begin + step) for begin in range(0, head.shape[0], step)]
