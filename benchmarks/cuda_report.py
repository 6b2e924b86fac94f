"""Reports what the kernels of the built CUDA module take on each chip that it was compiled for.

    make cuda-report                         # or: python -m benchmarks.cuda_report [--json FILE]

No GPU is needed. Exits 1 if the module was not built though nvcc is there, lacks a chip or the PTX for later
ones, or if a kernel spills or takes more shared memory than the chip has.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

# opt-in shared memory a block may take, bytes (CUDA programming guide, technical specifications)
CHIPS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TYPES = {"f": "f32", "d": "f64", "NS_8BFloat16E": "bf16"}
SIZES = {"f32": 4, "f64": 8, "bf16": 2}
KERNELS = {
    "append": r"append_kernelI(?P<type>\w+?)EEv",
    "attention": r"decode_attention_kernelI(?P<type>\w+?)Li(?P<longest>\d+)ELi(?P<heads>\d)E",
    "attention mma": r"decode_attention_mma_kernelILi(?P<longest>\d+)E",  # bfloat16 alone
}
BUILD = "PMC_FAST_CUDA=1 pip install -e ."


def cuobjdump(*arguments: str) -> str:
    """Run the tool that comes with Triton: nvcc may be installed without it."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def usages(module: str) -> Iterator[tuple[int, str, str, int, int, dict[str, int]]]:
    """Yield (chip, kernel, type, longest head, heads a unit, registers and stack a thread and static shared memory)."""
    chip = 0
    for line in cuobjdump("--dump-resource-usage", module).splitlines():
        if found := re.match(r"arch = sm_(\d+)", line):
            chip = int(found[1])
        elif found := re.match(r" Function (\S+):", line):
            symbol = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            for kernel, pattern in KERNELS.items():
                if match := re.search(pattern, symbol):
                    longest, heads = (int(match.groupdict().get(of) or 0) for of in ("longest", "heads"))
                    used = {"registers": registers, "stack": stack + local, "shared": shared}
                    dtype = TYPES[match.groupdict().get("type", "NS_8BFloat16E")]
                    yield chip, kernel, dtype, longest, heads, used


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table into this file")
    options = parser.parse_args(arguments)
    spec = importlib.util.find_spec("pmc_fast._cuda")
    if spec is None or spec.origin is None:
        nvcc = shutil.which("nvcc")
        print(f"the CUDA module is not built: {f'{nvcc} is there: {BUILD}' if nvcc else 'nvcc is absent'}")
        return 1 if nvcc else 0
    from pmc_fast.ops import native

    rows: list[dict[str, Any]] = []
    faults = []
    print(
        f"{'kernel':20} {'head':>6} {'heads':>5} {'chip':6} {'registers':>9} {'stack':>6} {'warps':>6} {'shared KiB':>10}"
    )
    for chip, kernel, dtype, longest, heads, used in sorted(usages(spec.origin), key=lambda u: u[1:5] + u[:1]):
        name = f"{kernel} {dtype}"
        warps = 8
        if kernel != "append":
            of, mma = native.cuda(), "mma" in kernel
            block = (
                of.decode_attention_mma_block(longest) if mma else of.decode_attention_block(longest, SIZES[dtype])
            )
            warps, dynamic = block
            used["shared"] += dynamic
        rows.append({"kernel": name, "head": longest, "heads": heads, "chip": f"sm_{chip}", "warps": warps} | used)
        print(
            f"{name:20} {f'<={longest}' if longest else 'any':>6} {heads or 'any':>5} sm_{chip:<3} {used['registers']:9} "
            f"{used['stack']:6} {warps:6} {used['shared'] / 1024:10.1f}"
        )
        if used["stack"]:
            faults.append(f"{name} on sm_{chip} spills: {used['stack']} bytes of stack")
        if not 0 < used["shared"] + (kernel == "append") <= CHIPS[chip]:
            faults.append(f"{name} on sm_{chip} takes {used['shared']} bytes of shared memory of {CHIPS[chip]}")
        if used["registers"] * warps * 32 > 1 << 16:
            faults.append(f"{name} on sm_{chip} takes {used['registers']} registers in {warps} warps of 65536 in all")
    for chip in CHIPS:
        found = {r["kernel"] for r in rows if r["chip"] == f"sm_{chip}"}
        faults += [
            f"{kernel} {dtype} is not compiled for sm_{chip}"
            for kernel in KERNELS for dtype in SIZES
            if f"{kernel} {dtype}" not in found and (dtype == "bf16" or "mma" not in kernel)
        ]  # fmt: skip
    if f"sm_{max(CHIPS)}.ptx" not in cuobjdump("--list-ptx", spec.origin):
        faults.append(f"no PTX of sm_{max(CHIPS)} for later chips")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(rows)} compiled, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
