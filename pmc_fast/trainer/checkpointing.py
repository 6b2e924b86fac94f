"""Checkpoints that are whole or not there: written aside, sealed with a manifest, checked before they are used."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import PMCError
from ..utils.files import one_error, sync

MANIFEST = "pmc_manifest.json"
STATE = "pmc_state.json"
ASIDE = ".unfinished"


@contextmanager
def sealed(directory: Path, state: dict[str, Any], fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Yield a directory to write into; at the end it is sealed and takes the place of `directory`.

    Parameters
    ----------
    directory : Path
        checkpoint-N of a run; its name is also that of the yielded directory.
    state : dict
        JSON-ready; what `load` returns.
    fingerprint : dict
        JSON-ready; names what must be equal for the checkpoint to be continued.
    """
    with one_error(f"checkpoint {directory}"):
        aside = directory.parent / ASIDE
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            (aside / directory.name).mkdir(mode=0o700)  # it holds the initial answers
            yield aside
            written = aside / directory.name
            (written / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = sorted(p for p in written.rglob("*") if p.is_file())
            entries = {
                str(p.relative_to(written)): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files
            }
            manifest = {"fingerprint": fingerprint, "files": entries}
            (written / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in [*files, written / MANIFEST]:
                path.chmod(0o600)
                sync(path)
            shutil.rmtree(directory, ignore_errors=True)
            written.rename(directory)
            sync(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def load(directory: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint and return its state.

    Raises
    ------
    PMCError
        It is not there, was not finished, is damaged, or belongs to another run.
    """
    if not directory.is_dir():
        raise PMCError(f"checkpoint {directory} does not exist")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise PMCError(
            f"checkpoint {directory} has no sound {MANIFEST}: it was not finished, or pmc_fast did not write it"
        ) from error
    for name, entry in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            raise PMCError(
                f"checkpoint {directory} is damaged: {name} is not what was written; use the one before it"
            )
    if not any(name.startswith("rng_state") for name in files):
        raise PMCError(f"checkpoint {directory} holds the model alone (save_only_model): a run can't go on from it")
    for name, value in fingerprint.items():
        if name not in manifest["fingerprint"]:
            raise PMCError(f"checkpoint {directory} is of an older pmc_fast: it does not say of which {name} it is")
        if manifest["fingerprint"][name] != value:
            raise PMCError(f"checkpoint {directory} belongs to another run: its {name} differ from this one's")
    return json.loads((directory / STATE).read_text(encoding="utf-8"))


def newest(
    directory: Path, fingerprint: dict[str, Any], warn: Callable[[str], None] = lambda text: None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest sound checkpoint of this run in `directory` and its state.

    `warn` hears why newer ones were passed over.
    """
    steps = {
        int(p.name.rsplit("-", 1)[1]): p for p in directory.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()
    }
    for _, path in sorted(steps.items(), reverse=True):
        try:
            return path, load(path, fingerprint)
        except PMCError as error:
            warn(str(error))
    return None


def digest(content: Any) -> str:
    """Return a hash of JSON-ready content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return a file's hash, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
