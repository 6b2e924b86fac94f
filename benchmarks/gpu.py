"""Everything that needs a GPU, in one command and one JSON with the card's name.

    python -m benchmarks.gpu                       # correctness, compute-sanitizer, timings
    python -m benchmarks.gpu --quick               # two sizes and few rounds
    python -m benchmarks.gpu --short               # rollouts and steps of two shapes, the demo's task
    python -m benchmarks.gpu --json FILE
    python -m benchmarks.gpu --end-to-end --tofu DIR     # whole runs and a 3B shape: see gpu_runs.py

Correctness: weighted_nll and gather_logps against float64. Timings: forward + backward, frozen head and
forward alone, beside every peer that imports here, interleaved, with peak memory, TFLOP/s (6, 4 and
2 M D V) and the share of the card's dense bf16 peak.
"""

import argparse
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from pmc_fast.bench import measure
from pmc_fast.ops import gather_logps, weighted_nll

from . import harness

HEADS = {"Llama-3.2-3B": (128256, 3072), "Phi-1.5": (51200, 2048), "SmolLM2-135M": (49152, 576)}
SIZES = (256, 512, 1600, 3200, 16384)
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bf16, vendor's data sheets
FLOPS = {"forward+backward": 6, "frozen head": 4, "forward": 2, "log-probs": 2}
Contestant = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], None]


def check_correctness() -> str:
    """Run the kernels' tests on the card: every listed case against float64; SystemExit if one fails."""
    root = Path(__file__).parent.parent
    tests = (
        "tests/ops/test_weighted_nll.py",
        "tests/ops/test_kernels.py",
        "tests/ops/test_adamw.py",
        "tests/ops/test_scaled.py",
        "tests/ops/test_cuda_layers.py",
        "tests/models/test_fused_layers.py",
        "tests/ops/test_sampling.py",
        "tests/ops/test_decode_cuda.py",
        "tests/rollout/test_engine.py",
        "tests/rollout/test_rollout_graphs.py",
        "tests/data/test_packing.py",
        "tests/cuda_graphs/test_training.py",
    )
    command = [sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"benchmarks.gpu: the tests fail on this card:\n{done.stdout[-4000:]}")
    return done.stdout.strip().splitlines()[-1]


def check_real_sizes() -> list[dict[str, Any]]:
    """Compare with float64 on real heads: |ours - fp64| <= 3 |torch - fp64| + a last bit; raise on a miss."""
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for vocab, width, count in ((49152, 576, 500), (32003, 257, 77), (128256, 512, 64)):
            g = torch.Generator("cuda").manual_seed(count)
            hidden = torch.randn(count, width, device="cuda", generator=g).to(dtype)
            head = (torch.randn(vocab, width, device="cuda", generator=g) * width**-0.5).to(dtype)
            bias = torch.randn(vocab, device="cuda", generator=g).to(dtype)
            targets = torch.randint(vocab, (count,), device="cuda", generator=g)
            targets[3] = -100
            scale = torch.randn(count, device="cuda", generator=g)
            scale[5] = 0
            results = {}
            for name in ("exact", "torch", "ours", "chunked", "no sync"):
                wide = torch.float64 if name == "exact" else dtype
                h, w, b = (t.to(wide, copy=True).requires_grad_() for t in (hidden, head, bias))
                if name in ("exact", "torch"):
                    z = 20 * torch.tanh((F.linear(h, w, b)).to(torch.promote_types(wide, torch.float32)) / 20) / 0.9
                    logps = -F.cross_entropy(z, targets, reduction="none")
                    loss = -(scale * logps).sum()
                else:
                    workspace = vocab * head.element_size() * 128 if name == "chunked" else 1 << 30
                    chosen = torch.arange(count, device="cuda") if name == "no sync" else None
                    how = {"bias": b, "softcap": 20.0, "temperature": 0.9, "workspace": workspace}
                    loss, logps = weighted_nll(h, w, targets, scale, chosen, **how)  # type: ignore[arg-type]
                loss.backward()
                gradients = [t.grad.double() for t in (h, w, b) if t.grad is not None]
                results[name] = [logps.detach().double(), *gradients]
            for i, what in enumerate(("logps", "d_hidden", "d_head", "d_bias")):
                exact = results["exact"][i]
                theirs = (results["torch"][i] - exact).abs().max().item()
                bound = 3 * theirs + torch.finfo(dtype).eps * exact.abs().max().item()
                for name in ("ours", "chunked", "no sync"):
                    error = (results[name][i] - exact).abs().max().item()
                    row = {"dtype": str(dtype), "V": vocab, "D": width, "M": count, "what": what, "path": name,
                           "error": error, "torch_error": theirs}  # fmt: skip
                    rows.append(row)
                    if not error <= bound:
                        raise SystemExit(f"benchmarks.gpu: {row} is above {bound:.3e}")
    return rows


def sanitize() -> str:
    """Run the comparisons under compute-sanitizer where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed: not run"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--only-correctness"]
    # without torch's caching allocator: inside its blocks an access out of bounds goes unseen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"benchmarks.gpu: compute-sanitizer found errors:\n{done.stdout[-4000:]}")
    return done.stdout.strip().splitlines()[-1]


def ours(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, mode: str, workspace: int = 1 << 30
) -> None:
    """Compute as `weighted_nll` in this package does; rows are compacted, so there is no sync."""
    scale = torch.full(targets.shape, 1 / len(targets), device="cuda")
    rows = torch.arange(len(targets), device="cuda")
    loss, _ = weighted_nll(hidden, head, targets, scale, rows, workspace=workspace)
    if mode != "forward":
        loss.backward()


def log_probs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, mode: str) -> None:
    """Compute log-probs without gradients."""
    with torch.no_grad():
        gather_logps(hidden, head, targets, torch.arange(len(targets), device="cuda"))


def eager(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, mode: str) -> None:
    loss = F.cross_entropy(F.linear(hidden, head).float(), targets)
    if mode != "forward":
        loss.backward()


def peers() -> dict[str, Contestant]:
    """Return the fused losses that import here, each behind one signature."""
    found: dict[str, Contestant] = {"torch eager": eager, "torch.compile": torch.compile(eager)}

    def add(name: str, module: str, make: Callable[[Any], Callable[..., torch.Tensor]]) -> None:
        try:
            loss_of = make(importlib.import_module(module))
        except Exception as error:  # a peer that is absent, or built for other versions, is left out by name
            print(f"  {name}: left out ({type(error).__name__}: {error})")
            return

        def contestant(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, mode: str) -> None:
            loss = loss_of(hidden, head, targets)
            if mode != "forward":
                loss.backward()

        found[name] = contestant

    add("torch linear_cross_entropy", "torch.nn.functional", lambda m: m.linear_cross_entropy)
    add(
        "Liger",
        "liger_kernel.transformers.functional",
        lambda m: lambda h, w, t: m.liger_fused_linear_cross_entropy(h, w, t),
    )
    add("Cut Cross-Entropy", "cut_cross_entropy", lambda m: m.linear_cross_entropy)
    add("quack", "quack.linear_cross_entropy", lambda m: m.chunked_linear_cross_entropy)
    return found


def timings(quick: bool) -> Iterator[dict[str, Any]]:
    """Yield a contest for each head, size and mode."""
    contestants = {"pmc_fast": ours} | peers()
    for workspace in (256, 512):
        contestants[f"pmc_fast, {workspace} MiB"] = functools.partial(ours, workspace=workspace << 20)
    peak = next((p for name, p in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)
    for name, (vocab, width) in HEADS.items():
        for count in SIZES[1:3] if quick else SIZES:
            g = torch.Generator("cuda").manual_seed(0)
            hidden = torch.randn(count, width, device="cuda", generator=g, dtype=torch.bfloat16)
            head = torch.randn(vocab, width, device="cuda", generator=g, dtype=torch.bfloat16) * width**-0.5
            targets = torch.randint(vocab, (count,), device="cuda", generator=g)
            torch.compiler.reset()  # its limit of recompilations would end in plain eager
            for mode, factor in FLOPS.items():
                h = hidden.clone().requires_grad_(mode not in ("forward", "log-probs"))
                w = head.clone().requires_grad_(mode == "forward+backward")

                def once(
                    f: Contestant,
                    h: torch.Tensor = h,
                    w: torch.Tensor = w,
                    t: torch.Tensor = targets,
                    mode: str = mode,
                ) -> None:
                    f(h, w, t, mode)
                    h.grad = w.grad = None

                chosen = contestants
                if mode == "log-probs":
                    chosen = {"pmc_fast": log_probs}
                usable: dict[str, measure.Contestant] = {}
                for who, f in chosen.items():
                    try:
                        for _ in range(3):
                            once(f)
                        usable[who] = functools.partial(once, f)
                    except Exception as error:  # out of memory, or a shape that a peer refuses
                        print(f"  {who} on {name}, M {count}, {mode}: {type(error).__name__}")
                measured = [measure.time_round(usable, i) for i in range(measure.ROUNDS if quick else 20)]
                summary = measure.summarize(measured, {n: measure.peak_bytes(f) for n, f in usable.items()})
                outputs = sum(t.numel() * t.element_size() for t in (h, w) if t.requires_grad)
                for c in summary.values():
                    c["workspace_bytes"] = max(0, (c["peak_bytes"] or 0) - outputs)
                    c["tflops"] = factor * count * width * vocab / c["median_s"] / 1e12
                    c["of_peak"] = c["tflops"] / peak if peak else None
                if "pmc_fast" not in summary:
                    continue
                best = summary["pmc_fast"]
                print(
                    f"{name:14} M {count:6} {mode:17} {best['median_s'] * 1e3:8.2f} ms {best['tflops']:6.0f} TFLOP/s",
                    flush=True,
                )
                yield {
                    "name": f"{name}, M {count}, {mode}",
                    "facts": {"M": count, "V": vocab, "D": width},
                    "contestants": summary,
                }


def main() -> int:
    """Run it all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"two sizes a head, {measure.ROUNDS} rounds")
    parser.add_argument("--only-correctness", action="store_true")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu/CARD.json")
    parser.add_argument("--short", action="store_true", help="what README's table shows, in results/gpu.json")
    parser.add_argument("--end-to-end", action="store_true", help="whole runs instead, in a JSON of their own")
    parser.add_argument("--tofu", help="with --end-to-end: folder of TOFU's files (nothing is fetched)")
    parser.add_argument("--model", default="", help="with --end-to-end: one that knows TOFU (default: teach SmolLM2)")
    options = parser.parse_args()
    if options.end_to_end and not options.tofu:
        parser.error("--end-to-end needs --tofu DIR")
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: torch sees no CUDA device; the kernels' checks without one are in tests/",
            file=sys.stderr,
        )
        return 2
    from . import gpu_runs

    if options.short:
        shapes = {"Llama-3.2-3B": gpu_runs.LLAMA_3B, "SmolLM2-135M": gpu_runs.SMOLLM2}
        gpu_runs.run_short(options.json or harness.RESULTS / "gpu.json", "cuda", shapes)
        return 0
    if options.end_to_end:
        gpu_runs.on_card(options.tofu, options.model, options.json)
        return 0
    checks = check_real_sizes()
    print(f"correctness: {len(checks)} comparisons within bounds")
    if options.only_correctness:
        return 0
    tests = check_correctness()
    print(tests)
    sanitizer = sanitize()
    print(sanitizer)
    card = torch.cuda.get_device_name().replace(" ", "-")
    path = options.json or harness.RESULTS / "gpu" / f"{card}.json"
    facts = {"checks": checks, "tests": tests, "sanitizer": sanitizer}
    results: list[dict[str, Any]] = [{"name": "correctness", "facts": facts, "contestants": {}}]
    for contest in timings(options.quick):
        results.append(contest)
        harness.write(path, "gpu", results)  # after each: a run that is cut short keeps what it has
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
