"""The environment of a result: machine, versions, code, and what this build of pmc_fast can use."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = (
    "pmc_fast", "pmc_fast_cuda", "torch", "triton", "transformers", "tokenizers", "numpy", "flash_attn", "flash_attn_3",
    "datasets", "peft",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on; None where absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """Return the processor, the instructions that torch uses, usable cores, memory in GiB, system, and GPU or None."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def code() -> dict[str, str | None]:
    """Return the installed version (None: a checkout that is not installed), a hash of the code's files, its commit."""
    package = Path(__file__).resolve().parents[1]
    files = sorted(
        Path(directory, name)
        for directory, _, names in os.walk(package, followlinks=True)  # kernels is a link in a checkout
        for name in names
        if name.endswith((".py", ".so", ".pyd", ".jinja"))
    )
    content = hashlib.sha256()
    for file in files:
        content.update(
            f"{file.relative_to(package).as_posix()}\0".encode() + hashlib.sha256(file.read_bytes()).digest()
        )
    return {"version": versions()["pmc_fast"], "sha256": content.hexdigest(), "commit": commit()}


def commit() -> str | None:
    """Return the commit of the git checkout that this code is in, with -dirty where files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of someone else's
        return None


def capabilities() -> dict[str, str]:
    """Return each optional part and whether it is installed, or how to install it."""
    import torch

    from ..errors import PMCError
    from ..ops.dispatch import why_refused
    from ..ops.native import ISAS, cuda, isa

    try:
        native = f"built, uses {ISAS[isa()]} instructions"
    except PMCError as error:
        native = str(error)
    cuda_module = {}
    if torch.version.cuda:  # others have no use for it
        try:
            cuda_module = {"CUDA module": f"built, {cuda().__name__}"}
        except PMCError as error:
            cuda_module = {"CUDA module": str(error)}
    extras = {"cli": "datasets", "lora": "peft", "reference": "rouge_score"}
    present = {
        extra: "installed" if importlib.util.find_spec(module) else f"missing: pip install 'pmc_fast[{extra}]'"
        for extra, module in extras.items()
    }
    gpu = why_refused(torch.device("cuda"))
    return (
        {"C++ module": native}
        | cuda_module
        | ({"GPU": gpu} if gpu else {})
        | {f"extra {name}": state for name, state in present.items()}
    )
