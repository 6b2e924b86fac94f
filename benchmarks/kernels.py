"""Compiles every shipped Triton configuration ahead of time and reports what it takes on each chip.

    make kernels-report                      # or: python -m benchmarks.kernels [--json FILE]

No GPU is needed. Exits 1 if a configuration spills or exceeds the chip's shared memory.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are imported: they must be compiled here

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmc_fast.kernels import (
    adamw,
    fp8_rows,
    layers,
    nll_rows,
    sampling,
    scaled,
)

# opt-in shared memory a block may take, bytes (CUDA programming guide, technical specifications)
CHIPS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
DTYPES = ("fp32", "bf16", "fp16")
FLAGS = (False, True)
FP8, FP8_CHIP = "fp8e4nv", 89  # the first chip that has it


def shipped() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Yield (name, kernel, types of its arguments, constexprs, options) of all that can be launched."""
    for dtype, bias, softcap, grad in itertools.product(DTYPES, FLAGS, FLAGS, FLAGS):
        config = nll_rows.CONFIGS["softcap" if softcap else "plain"]
        types = {
            "logits_ptr": f"*{dtype}", "stride": "i32", "rows": "i32", "vocab": "i32", "bias_ptr": f"*{dtype}",
            "cu_targets_ptr": "*i64", "targets_ptr": "*i64", "row_scale_ptr": "*fp32", "logps_ptr": "*fp32",
            "inverse_temperature": "fp32", "softcap": "fp32", "logit_scale": "fp32",
        }  # fmt: skip
        flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "GRAD": grad}
        name = _name("nll_rows", dtype, flags)
        constexprs = flags | {"BLOCK_V": config["BLOCK_V"]}
        options = {name: config[name] for name in ("num_warps", "maxnreg")}
        yield name, nll_rows.nll_rows_kernel, types, constexprs, options
        if bias == softcap == grad:  # vocabularies such as 50257 launch another variant
            yield f"{name} any size", nll_rows.nll_rows_kernel, types, constexprs, options
    yield from _sampling()
    # gradients to the types of their inputs: float16's are float32 until then, and so are a bias's
    for x, y in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "fp16"), ("fp32", "bf16")):
        for size, kind in (("", "i32"), (" any size", "i32"), (" over int32", "i64")):
            block = dict(scaled.CONFIGS["default"])
            options = {"num_warps": block.pop("num_warps")}
            types = {"x_ptr": f"*{x}", "factor_ptr": "*fp32", "y_ptr": f"*{y}", "size": kind}
            yield f"scaled {x} {y}{size}", scaled.scaled_kernel, types, block, options
    for low in ("bf16", "fp16"):
        block = dict(adamw.CONFIGS["default"])
        options = {"num_warps": block.pop("num_warps")}
        numbers = (
            "beta1", "beta2", "rest1", "rest2", "shrink", "decay", "step_size", "root_correction2", "eps",
        )  # fmt: skip
        types = {"table_ptr": "*i64", **dict.fromkeys(numbers, "fp32")}
        yield f"adamw {low}", adamw.adamw_kernel, types, {"LOW": adamw.LOW[low]} | block, options
    for low, width in itertools.product(DTYPES, (576, 4096, 14336, 28672)):
        block = fp8_rows.config(width)
        options = {"num_warps": block.pop("num_warps")}
        types = {
            "x_ptr": f"*{low}", "y_ptr": f"*{FP8}", "scale_ptr": "*fp32", "width": "i32", "x_stride": "i32",
        }  # fmt: skip
        yield f"fp8_rows {low} {width}", fp8_rows.fp8_rows_kernel, types, block, options
    yield from _layers()


def _sampling() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    for dtype, size, memory in itertools.product(DTYPES, ("", " any size"), FLAGS):
        select, race = (dict[str, Any](sampling.CONFIGS[kernel]) for kernel in ("select", "race"))
        name = f"{dtype}{' settings' if memory else ''}{size}"
        settings = {"settings_ptr": "*fp64"} if memory else {}
        for config in (select, race):
            config.update({} if memory else {"settings_ptr": None})
        types = {
            "logits_ptr": f"*{dtype}", "stride": "i32", "vocab": "i32", "list_ptr": "*i32", "capacity": "i32",
            "limits_ptr": "*i32", "sums_ptr": "*fp32", "mass_ptr": "*fp64", "inverse_temperature": "fp32",
            "top_k": "i32", "top_p": "fp32", "log_tail": "fp32", "greedy": "i32",
        }  # fmt: skip
        options = {"num_warps": select.pop("num_warps")}
        yield f"sampling select {name}", sampling.select_kernel, types | settings, select, options
        types = {
            "logits_ptr": f"*{dtype}", "stride": "i32", "vocab": "i32", "rows": "i32", "list_ptr": "*i32",
            "capacity": "i32", "limits_ptr": "*i32", "sums_ptr": "*fp32", "cu_draws_ptr": "*i64",
            "streams_ptr": "*i64", "samples_ptr": "*i64", "positions_ptr": "*i64", "tokens_ptr": "*i64",
            "logps_ptr": "*fp64", "temperature": "fp64", "seed": "u64",
        }  # fmt: skip
        options = {"num_warps": race.pop("num_warps")}
        yield f"sampling race {name}", sampling.race_kernel, types | settings, race, options


def _layers() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    # x's type, the weight's or cosines', the result's; the last as under autocast
    for x, weight, y in (*((dtype,) * 3 for dtype in DTYPES), ("bf16", "fp32", "fp32")):
        sizes = ("", " any size") if x == weight == "bf16" else ("",)
        for width, size in itertools.product((64, 576, 4096, 8192), sizes):
            config = layers.norm_config(width)
            options = {"num_warps": config.pop("num_warps")}
            name = f"{x} {weight} {width}{size}"
            types = {
                "x_ptr": f"*{x}", "weight_ptr": f"*{weight}", "y_ptr": f"*{y}", "rstd_ptr": "*fp32", "rows": "i32",
                "width": "i32", "eps": "fp32", "offset": "fp32",
            }  # fmt: skip
            flags = {"ROUND": True, "RSTD": True}
            yield f"rms_norm {name}", layers.rms_norm_kernel, types, flags | config, options
            types = {
                "dy_ptr": f"*{y}", "x_ptr": f"*{x}", "weight_ptr": f"*{weight}", "rstd_ptr": "*fp32",
                "dx_ptr": f"*{x}", "parts_ptr": "*fp32", "rows": "i32", "width": "i32", "offset": "fp32",
            }  # fmt: skip
            flags = {"ROUND": True, "NEED_X": True, "NEED_WEIGHT": True}
            yield f"rms_norm back {name}", layers.rms_norm_backward_kernel, types, flags | config, options
        for (heads, dim), back, size in itertools.product(((9, 64), (32, 128)), FLAGS, sizes):
            config = layers.rotary_config(heads, dim // 2)
            options = {"num_warps": config.pop("num_warps")}
            read, written = (y, x) if back else (x, y)
            pointers = {f"{n}_ptr": f"*{read}" for n in ("q", "k")} | {
                f"{n}_ptr": f"*{weight}" for n in ("cos", "sin")
            }
            pointers |= {f"{n}_out_ptr": f"*{written}" for n in ("q", "k")}
            sizes_of = (
                "q_heads",
                "k_heads",
                "half",
                "q_row_stride",
                "q_head_stride",
                "k_row_stride",
                "k_head_stride",
            )
            types = pointers | dict.fromkeys(sizes_of, "i32")
            name = _name("rotary", f"{x} {weight} {heads} x {dim}", {"BACKWARD": back}) + size
            yield name, layers.rotary_kernel, types, {"BACKWARD": back} | config, options
        if x == weight:
            block = {"BLOCK": layers.CONFIGS["silu_mul"]}
            pointers = dict.fromkeys(("gate_ptr", "up_ptr", "y_ptr"), f"*{x}")
            types = pointers | dict.fromkeys(("width", "blocks", "gate_stride", "up_stride"), "i32")
            yield f"silu_mul {x}", layers.silu_mul_kernel, types, block, {"num_warps": 4}
            pointers = dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "d_gate_ptr", "d_up_ptr"), f"*{x}")
            flags = {"NEED_GATE": True, "NEED_UP": True}
            types = pointers | {"size": "i32"}
            yield f"silu_mul back {x}", layers.silu_mul_backward_kernel, types, flags | block, {"num_warps": 4}


def _name(kernel: str, dtype: str, flags: dict[str, bool]) -> str:
    return " ".join([kernel, dtype, *(flag.removeprefix("HAS_").lower() for flag, on in flags.items() if on)])


def compile_one(
    kernel: Any,
    types: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, int],
    chip: int,
    divisible: bool = True,
) -> dict[str, Any]:
    """Compile for a chip; return registers and stack a thread, and shared memory."""
    signature = types | dict.fromkeys(constexprs, "constexpr")
    # what a launch would specialise on: aligned pointers, and sizes and strides that 16 divides
    names = list(kernel.arg_names)
    free = {p.name for p in kernel.params if not p.do_not_specialize}
    aligned = [n for n, t in types.items() if t.startswith("*") or (t == "i32" and divisible and n in free)]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature={n: signature[n] for n in names}, constexprs=constexprs, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert usage, done.stdout
    return int(usage[1]), int(usage[2])


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if something shipped does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table into this file")
    options = parser.parse_args(arguments)
    rows, faults = [], []
    print(f"{'kernel':36} {'chip':6} {'registers':>9} {'stack':>6} {'shared KiB':>10}")
    for name, kernel, types, constexprs, launch in shipped():
        for chip, limit in CHIPS.items():
            if f"*{FP8}" in types.values() and chip < FP8_CHIP:
                continue
            used = compile_one(kernel, types, constexprs, launch, chip, divisible="any size" not in name)
            rows.append({"kernel": name, "chip": f"sm_{chip}"} | used)
            print(
                f"{name:36} sm_{chip:<3} {used['registers']:9} {used['stack']:6} {used['shared'] / 1024:10.1f}",
                flush=True,
            )
            if used["stack"]:
                faults.append(f"{name} on sm_{chip} spills: {used['stack']} bytes of stack")
            if used["shared"] > limit:
                faults.append(f"{name} on sm_{chip} takes {used['shared']} bytes of shared memory of {limit}")
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(rows)} compiled, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
