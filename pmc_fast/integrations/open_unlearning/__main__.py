"""Runs src/train.py of the OpenUnlearning checkout in this directory, with `trainer=PMC` known to it.

Nothing in the checkout is changed: the handler is registered and the configuration found at run time.
"""

import inspect
import runpy
import sys
from importlib import import_module
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import Specifier
from packaging.version import Version

from ...errors import PMCError

CONFIGS = "pkg://pmc_fast.integrations.open_unlearning"
NEWER = (
    "pmc_fast needs its generation for transformers 5, pull request 191: git fetch "
    "https://github.com/locuslab/open-unlearning pull/191/head && git checkout FETCH_HEAD"
)


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
    pin = _older_pin(root / "requirements.txt")
    if pin:
        raise PMCError(f"this OpenUnlearning checkout requires {pin} (requirements.txt): {NEWER}")
    sys.path.insert(0, str(source))  # as `python src/train.py` does
    try:
        trainer = import_module("trainer")
    except ModuleNotFoundError as error:
        raise PMCError(
            f"OpenUnlearning's trainers can't be imported ({error}): install what its requirements.txt lists"
        ) from error
    except ImportError as error:  # older ones import what transformers 5 no longer has
        raise PMCError(
            f"OpenUnlearning's trainers can't be imported ({error}); if it is older than transformers 5: {NEWER}"
        ) from error
    if "processing_class" not in inspect.signature(trainer.load_trainer).parameters:
        raise PMCError(
            "this OpenUnlearning checkout is older than transformers 5 (load_trainer takes a tokenizer, not a "
            f"processing_class): {NEWER}"
        )
    from .handler import PMC

    trainer._register_trainer(PMC)


def _older_pin(requirements: Path) -> str | None:
    """Return the requirement of transformers that keeps it below 5, if there is one."""
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    for line in lines:
        try:
            wanted = Requirement(line.split("#")[0].strip())
        except InvalidRequirement:  # an option, a comment, a bare address
            continue
        if wanted.name.lower() == "transformers" and any(map(_below_5, wanted.specifier)):
            return str(wanted)
    return None


def _below_5(specifier: Specifier) -> bool:
    if specifier.operator not in ("==", "~=", "<=", "<"):
        return False
    version = Version(specifier.version.removesuffix(".*"))
    return version.major < 5 or (specifier.operator == "<" and version <= Version("5"))


def find_configuration() -> None:
    """Let Hydra find `trainer=PMC`, wherever its flags stand on the command line."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class PMCSearchPath(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("pmc_fast", CONFIGS)

    Plugins.instance().register(PMCSearchPath)


def main() -> None:
    """Run src/train.py with the command line's arguments."""
    try:
        register(Path.cwd())
        find_configuration()
    except PMCError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    runpy.run_path("src/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
