"""`csrc/linear.cpp` on a decode step's rows against torch's best: SmolLM2-135M's layers and head in float32.

`layers.FEW_ROWS` follows from this.

torch's are its BLAS and oneDNN's linear layer, whose weights may also be packed beforehand: once a rollout, as training
changes them, and a second copy of the model. OMP_NUM_THREADS says on how many cores.
"""

import pytest
import torch

from pmc_fast.ops import native
from pmc_fast.ops.layers import fast_linear_serves

pytestmark = pytest.mark.skipif(not fast_linear_serves(torch.zeros(1, 1)), reason="linear needs AVX2")

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]  # [out, in]
SHAPES = {"6 layers": 6 * LAYER, "head": [(49152, 576)]}  # too many for the second-level cache
onednn = torch.ops.mkldnn._linear_pointwise


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    how = native.isa(), torch.get_num_threads()
    native.cpu().linear_f32(x.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), x.shape[0], *weight.shape[::-1], *how)
    return y


def packed(weight: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


@torch.no_grad()
@pytest.mark.parametrize("part", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 48, 64])
def test_linear(contest, rows, part):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES[part]]
    xs = [torch.randn(rows, w.shape[1]) for w in weights]
    ready = [packed(w, rows) for w in weights]
    contest(
        f"{part}, {rows} rows",
        {
            "pmc_fast": lambda: [linear(x, w) for x, w in zip(xs, weights, strict=True)],
            "torch": lambda: [torch.nn.functional.linear(x, w) for x, w in zip(xs, weights, strict=True)],
            "oneDNN": lambda: [onednn(x, w, None, "none", [], "") for x, w in zip(xs, weights, strict=True)],
            "oneDNN, packed": lambda: [onednn(x, w, None, "none", [], "") for x, w in zip(xs, ready, strict=True)],
            "packing": lambda: [packed(w, rows) for w in weights],
        },
        rounds=15,
        memory=False,
    )
