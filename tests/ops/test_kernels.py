"""Triton kernels without a GPU: all of them compiled for every chip."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_shipped_configuration_compiles_for_every_chip(tmp_path):
    """No spills, and shared memory within the chip's limit: `make kernels-report` fails otherwise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--json", str(tmp_path / "table.json")],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-10:]) + done.stderr[-2000:]
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {row["chip"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert len(rows) == 5 * (24 + 6 + 12 + 12 + 12 + 2 + 66) + 4 * 12  # the last in 8 bits, which sm_80 does not have
