"""Where a training pass's time goes on a card: the head and its parts, packs with and without CUDA graphs."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from pmc_fast.data.packing import Pack
from pmc_fast.models.context import autocast
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.ops import weighted_nll
from pmc_fast.ops.dispatch import triton_interprets
from pmc_fast.ops.scaled import scaled

from .card import Probe

ROW_KERNELS = (  # BLOCK_V, num_warps, maxnreg, programs a multiprocessor (0: one a row, as was measured before)
    (2048, 8, 80, 0), (2048, 8, 80, 1), (2048, 8, 80, 2), (4096, 16, 128, 1), (8192, 16, 128, 1), (8192, 32, 64, 0),
    (8192, 32, 64, 1),
)  # fmt: skip


def head(probe: Probe) -> None:
    """Measure weighted_nll forward and backward, its products alone, and the row kernel at several sizes."""
    for count in (40,) if probe.tiny else (400, 1600, 3000):
        _head(probe, count)
        probe.free()


def _head(probe: Probe, count: int) -> None:
    vocab, width = probe.shape["vocab_size"], probe.shape["hidden_size"]
    hidden = torch.randn(count, width, device=probe.device).to(probe.low).requires_grad_()
    weight = (torch.randn(vocab, width, device=probe.device) * width**-0.5).to(probe.low)
    targets = torch.randint(vocab, (count,), device=probe.device)
    rows = torch.arange(count, device=probe.device)
    scale = torch.full((count,), 1 / count, device=probe.device)

    def once() -> None:
        hidden.grad = weight.grad = None
        weighted_nll(hidden, weight, targets, scale, rows)[0].backward()

    for trained in (True, False):
        weight.requires_grad_(trained)
        measured = probe.wall(once)
        tflops = (6 if trained else 4) * count * width * vocab / measured["ms"] / 1e9
        probe.say("head", f"M {count}, {'trained' if trained else 'frozen'}", **measured, tflops=tflops)
    h, w = hidden.detach(), weight.detach()
    logits = torch.empty(count, vocab, device=probe.device, dtype=probe.low)
    one = torch.ones((), device=probe.device)
    parts: dict[str, Callable[[], Any]] = {
        "logits": lambda: torch.mm(h, w.T, out=logits),
        "d_hidden": lambda: logits @ w,
        "d_head": lambda: logits.T @ h,
        "scaled": lambda: scaled(w, one),
    }
    probe.say("head", f"M {count}, parts (ms)", **{name: probe.card_ms(call) for name, call in parts.items()})
    if probe.on_gpu or triton_interprets():
        _row_kernel(probe, h, w, targets, scale, logits)


def _row_kernel(
    probe: Probe,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    scale: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    from pmc_fast.kernels import nll_rows

    count = len(targets)
    offsets = torch.arange(count + 1, device=probe.device)
    logps = torch.zeros(count, device=probe.device)
    floor = 2 * logits.numel() * logits.element_size()  # read once, written once
    kept = nll_rows.CONFIGS["plain"]
    try:
        for block, warps, registers, programs in ROW_KERNELS:
            sizes = {"BLOCK_V": block, "num_warps": warps, "maxnreg": registers, "programs": programs}
            nll_rows.CONFIGS["plain"] = sizes
            torch.mm(hidden, weight.T, out=logits)
            call = lambda: nll_rows.nll_rows(logits, offsets, targets, scale, logps, None, 1.0, 0.0, 1.0, True)  # noqa: E731
            ms = probe.card_ms(call)
            each = f"{programs} a multiprocessor" if programs else "one a row"
            shipped = ", shipped" if sizes == kept else ""
            probe.say(
                "head", f"M {count}, rows, {block} x {warps} warps, {each}{shipped}", ms=ms, tb_s=floor / ms / 1e9
            )
    finally:
        nll_rows.CONFIGS["plain"] = kept


def training_pass(probe: Probe) -> None:
    """Measure a packed forward and backward of 8 + 8 sequences with and without CUDA graphs, and the optimizer's step."""
    for mode, (dtype, low) in probe.modes().items():
        probe.free()
        with probe.unless_out_of_memory("pass", mode):
            _passes(probe, mode, dtype, low)


def _passes(probe: Probe, mode: str, dtype: torch.dtype, low: torch.dtype | None) -> None:
    model = probe.model(dtype).train()

    def once(packed: PackedPass, made: Pack, scale: torch.Tensor) -> None:
        model.zero_grad()
        with autocast(probe.device, low):
            loss, _ = packed(made, scale)
        loss.backward()

    for graphs in (True, False) if probe.on_gpu else (False,):
        packed = PackedPass(model, cuda_graphs=graphs)
        for name, (made, scale) in probe.packs().items():
            measured = probe.wall(functools.partial(once, packed, made, scale))
            probe.say("pass", f"{mode}, graphs {graphs}, {name}", tokens=len(made), **measured, **probe.memory())
        del packed
        probe.free()
    optimizer = probe.optimizer(model, masters=dtype == torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    probe.say("pass", f"optimizer, {mode}", **probe.wall(optimizer.step, 7, 2), **probe.memory())
