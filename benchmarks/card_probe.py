"""Where the milliseconds and the gigabytes go on one card: a line per number, printed and written as it is found.

    python -m benchmarks.card_probe memory step run head attention pass rollout decode lora trainer profile peers
        --shape 3b [--quick] [--epochs N] [--json FILE]

Needs no model files and no network: weights and tokens are random. Without a GPU it runs on the CPU, with `--shape tiny`
in seconds, to test itself. What each block measures stands in its docstring; `card.sh` runs them in order of use.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from . import card_attention, card_passes, card_rollouts, card_run, card_training
from .card import SHAPES, Probe

BLOCKS: dict[str, Callable[[Probe], None]] = {
    "memory": card_training.memory,
    "step": card_training.step,
    "run": card_run.run,
    "head": card_passes.head,
    "attention": card_attention.attention,
    "pass": card_passes.training_pass,
    "rollout": card_rollouts.rollout,
    "decode": card_rollouts.decode,
    "lora": card_training.lora,
    "trainer": card_run.trainer,
    "profile": card_rollouts.profile,
    "peers": card_rollouts.peers,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the blocks that were asked for; one that fails is named, and the others run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="+", choices=list(BLOCKS))
    parser.add_argument("--shape", default="3b", choices=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--epochs", type=int, default=card_run.EPOCHS, help="of run: fewer are extrapolated, and said so"
    )
    parser.add_argument("--json", type=Path, help="a file of results, written anew after each number")
    options = parser.parse_args(arguments)
    probe = Probe(options.shape, options.quick, options.json, options.epochs)
    where = torch.cuda.get_device_name() if probe.on_gpu else "CPU"
    print(f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, {options.shape}", flush=True)
    failed = 0
    for name in options.blocks:
        start = time.perf_counter()
        try:
            BLOCKS[name](probe)
        except Exception as error:
            failed += 1
            probe.say(name, f"FAILED: {type(error).__name__}", why=str(error)[:300].replace("\n", " "))
        probe.free()
        print(f"-- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
