"""Which backend serves: an unknown name is refused by every op, and so is a device that a backend can't read."""

import sys
from types import ModuleType

import pytest
import torch

from pmc_fast.errors import PMCError
from pmc_fast.ops import gather_logps, native, sample_nucleus, weighted_nll
from pmc_fast.ops.adamw import Settings, adamw
from pmc_fast.ops.decode_attention import StepIndex, decode_attention
from pmc_fast.ops.dispatch import resolve_backend
from pmc_fast.ops.layers import rms_norm, rotary, silu_mul
from pmc_fast.ops.scaled import scaled

X, IDS = torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
ROW = X.view(1, 1, 4)  # one row of one head
INDEX = StepIndex(*(torch.tensor(t, dtype=torch.int32) for t in ([0], [1], [0, 0], [0], [0, 1], [0, 1], [0])))
OPS = {
    "weighted_nll": lambda how: weighted_nll(X, X, IDS, X[:, 0], backend=how),
    "gather_logps": lambda how: gather_logps(X, X, IDS, backend=how),
    "sample_nucleus": lambda how: sample_nucleus(
        X, torch.tensor([0, 1]), IDS, IDS, IDS, temperature=1.0, backend=how
    ),
    "decode_attention": lambda how: decode_attention(
        ROW, ROW, ROW, ROW.clone(), ROW.clone(), INDEX, scale=1.0, backend=how
    ),
    "scaled": lambda how: scaled(X, torch.tensor(2.0), backend=how),
    "adamw": lambda how: adamw(
        *([t.clone()] for t in (X.half(), X, X, X, X.half())),
        settings=Settings(1, 0.1, (0.9, 0.99), 1e-8, 0.0, True),
        backend=how,
    ),
    "rms_norm": lambda how: rms_norm(X, X[0], 1e-6, backend=how),
    "silu_mul": lambda how: silu_mul(X, X, backend=how),
    "rotary": lambda how: rotary(X[None, None], X[None, None], X[None], X[None], backend=how),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ["fused", "", "CPU", "cpu ", "cuda:0", "triton", "mps"])
def test_every_op_refuses_an_unknown_backend(op, name):
    with pytest.raises(PMCError, match=f"backend is '{name}': use one of reference, cpu, cuda"):
        OPS[op](name)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_backends(op):
    OPS[op]("cpu")
    if op in ("rms_norm", "silu_mul", "rotary"):  # torch's own layers are their reference
        with pytest.raises(PMCError, match=f"{op}: there is no backend 'reference'"):
            OPS[op]("reference")
    else:
        OPS[op]("reference")


def test_a_backend_that_can_not_read_a_devices_memory_is_refused(monkeypatch):
    monkeypatch.setattr("pmc_fast.ops.dispatch.triton_interprets", lambda: False)
    for name, device in (("cuda", "cpu"), ("cpu", "cuda"), ("cpu", "meta")):
        with pytest.raises(PMCError, match=f"'{name}' can't serve tensors on {device}"):
            resolve_backend(name, torch.device(device))
    with pytest.raises(PMCError, match="device meta has no kernels"):
        resolve_backend(None, torch.device("meta"))


@pytest.mark.parametrize("name", ["mps", "xpu", "hpu", "meta"])
def test_other_devices_have_no_kernels(name):
    with pytest.raises(PMCError, match=f"device {name} has no kernels: move to cpu or cuda, or use backend='ref"):
        resolve_backend(None, torch.device(name))
    assert resolve_backend("reference", torch.device(name)) == "reference"


def test_rocm_is_refused_by_name_where_cuda_would_serve(monkeypatch):
    """Torch calls AMD's GPUs cuda too."""
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    device = torch.device("cuda:1")
    refused = r"built for ROCm, which is not supported \(inline PTX, nvcc\): use cpu"
    for name in (None, "cuda"):
        with pytest.raises(PMCError, match=f"device cuda:1: torch .*{refused}, or backend='reference'"):
            resolve_backend(name, device)
    assert resolve_backend("reference", device) == "reference"
    assert resolve_backend(None, torch.device("cpu")) == "cpu"
    with pytest.raises(PMCError, match=f"CUDA module can't be used: .*{refused}"):  # not: install the CUDA toolkit
        native.cuda.__wrapped__()


def test_cuda_attention_refuses_the_memory_of_the_cpu(monkeypatch):
    """Triton's interpreter reads it, CUDA C++ does not."""
    monkeypatch.setattr("pmc_fast.ops.dispatch.triton_interprets", lambda: True)
    with pytest.raises(PMCError, match="decode_attention: backend 'cuda' can't serve tensors on cpu"):
        OPS["decode_attention"]("cuda")


@pytest.mark.parametrize(("theirs", "works"), [("0.1.0", True), ("0.0.9", False)])
def test_the_cuda_wheel_serves_its_own_version_alone(monkeypatch, theirs, works):
    """Where the package was built without nvcc."""
    wheel = ModuleType("pmc_fast_cuda._cuda")
    monkeypatch.setitem(sys.modules, "pmc_fast._cuda", None)
    monkeypatch.setitem(sys.modules, "pmc_fast_cuda", ModuleType("pmc_fast_cuda"))
    monkeypatch.setitem(sys.modules, "pmc_fast_cuda._cuda", wheel)
    monkeypatch.setattr(native.metadata, "version", {"pmc_fast": "0.1.0", "pmc_fast_cuda": theirs}.__getitem__)
    if works:
        assert native.cuda.__wrapped__() is wheel
        return
    with pytest.raises(
        PMCError, match=r"pmc_fast_cuda is 0\.0\.9, but pmc_fast is 0\.1\.0: .*pmc_fast_cuda==0\.1\.0"
    ):
        native.cuda.__wrapped__()


def test_a_missing_cuda_module_names_both_ways_to_have_one(monkeypatch):
    for name in ("pmc_fast._cuda", "pmc_fast_cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PMCError, match=r"missing .*'pmc_fast\[cuda\]'.*PMC_FAST_CUDA=1 pip install"):
        native.cuda.__wrapped__()
