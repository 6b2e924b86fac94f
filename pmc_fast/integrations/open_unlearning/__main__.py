"""Runs src/train.py of the OpenUnlearning checkout in this directory, with `trainer=PMC` known to it.

Nothing in the checkout is changed: the handler is registered and the configuration found at run time.
"""

import inspect
import runpy
import sys
from importlib import import_module
from pathlib import Path

from ...errors import PMCError

CONFIGS = "pkg://pmc_fast.integrations.open_unlearning"


def register(root: Path) -> None:
    """Put the checkout's src/ on sys.path and the handler into its registry.

    Raises
    ------
    PMCError
        There is no checkout in `root`, or it is not of the generation that runs on transformers 5.
    """
    source = root / "src"
    if not ((source / "train.py").is_file() and (source / "trainer").is_dir()):
        raise PMCError(f"{root} has no src/train.py: run this in the root of an OpenUnlearning checkout")
    sys.path.insert(0, str(source))  # as `python src/train.py` does
    try:
        trainer = import_module("trainer")
    except ImportError as error:  # older ones import what transformers 5 no longer has
        raise PMCError(
            f"OpenUnlearning's trainers can't be imported ({error}): install its requirements, and if it is older than "
            "transformers 5, update the checkout"
        ) from error
    if "processing_class" not in inspect.signature(trainer.load_trainer).parameters:
        raise PMCError(
            "this OpenUnlearning checkout is older than transformers 5 (load_trainer takes a tokenizer, not a "
            "processing_class): update it"
        )
    from .handler import PMC

    trainer._register_trainer(PMC)


def main() -> None:
    """Run src/train.py with the command line's arguments."""
    try:
        register(Path.cwd())
    except PMCError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.argv.append(f"hydra.searchpath=[{CONFIGS}]")
    runpy.run_path("src/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
