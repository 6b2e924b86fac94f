"""The demo: a real language model forgets real facts.

    python -m examples.demo             # 5 to 9 minutes on two cores
    python -m examples.demo --short     # a few steps, to see that everything runs

SmolLM2-135M-Instruct is first taught 80 question-answer pairs about invented authors (TOFU,
locuslab/TOFU, MIT), then unlearns the 20 of examples/tofu/forget20.jsonl from their questions alone.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from .demo_model import ROOT, finetuned_model

FULL = ["--preset", "fast"]
SHORT = ["--preset", "fast", "--epochs", "0.4", "--num-samples", "2", "--max-length", "100"]
OUTPUT = ROOT / "demo_output"


def command(output: Path, extra: list[str]) -> list[str]:
    """Return the demo's main job as a user would type it."""
    return [
        "pmc-fast", "unlearn",
        "--model", str(finetuned_model().relative_to(ROOT)),
        "--forget", "examples/tofu/forget20.jsonl",
        "--retain", "examples/tofu/retain60.jsonl",
        "--paraphrased", "examples/tofu/forget20.jsonl",
        "--general", "examples/tofu/real_authors30.jsonl",
        "--general", "examples/tofu/world_facts30.jsonl",
        "--output", str(output),
        *extra,
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few steps only; CI runs this")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the result goes")
    arguments, extra = parser.parse_known_args()
    words = command(arguments.output, (SHORT if arguments.short else FULL) + extra)
    if arguments.output == OUTPUT:
        shutil.rmtree(OUTPUT, ignore_errors=True)
    print("$", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "pmc_fast", *words[1:]], cwd=ROOT)
    if done.returncode:
        return done.returncode
    print(f"open {arguments.output / 'report.html'} in a browser")
    made = json.loads((arguments.output / "report.json").read_text())
    before, after = made["before"]["sets"], made["after"]["sets"]
    known = min(before[name]["rouge_l_recall"] for name in ("forget", "retain"))
    short = after["forget"]["degenerate"]
    print(f"the model knew the facts: recall {known:.3f} (must be above 0.95)")
    print(f"forget answers under 3 words: {short:.0%} (at most 10%), mean {after['forget']['mean_words']:.1f} words")
    return 0 if known > 0.95 and (short <= 0.1 or arguments.short) else 1


if __name__ == "__main__":
    sys.exit(main())
