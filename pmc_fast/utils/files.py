"""Files and directories that are written completely or not at all, and their hashes."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import PMCError


def check_output(output: str, needed_bytes: int) -> Path:
    """Refuse an output directory that the result can't be written to, before any work starts."""
    if not output:
        raise PMCError("output is not given: --output names the directory to write")
    if output.startswith("~"):  # no shell expands it in a configuration file, or in --output=~/...
        raise PMCError(f"output {output} begins with ~: write the path out")
    path = Path(output).resolve()  # a link's target: rename would replace the link or fail on it
    if path == Path.cwd().resolve() or path in Path.cwd().resolve().parents:
        raise PMCError(f"output {output} is the directory that you are in, or above it: name a new one")
    longest = _longest_name()
    if len(os.fsencode(path.name)) > longest:
        raise PMCError(
            f"output {output[:40]}... has a name of {len(os.fsencode(path.name))} bytes: at most {longest}"
        )
    if path.is_mount():
        raise PMCError(f"output {output} is a mount point: name a directory inside it")
    if path.exists() and not path.is_dir():
        raise PMCError(f"output {output} is a file: name a new or empty directory")
    if path.is_dir() and any(path.iterdir()):
        raise PMCError(f"output {output} is not empty: name a new or empty directory")
    parent = next(p for p in path.parents if p.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PMCError(f"output {output} can't be written: no permission in {parent}")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise PMCError(f"output {output} needs {needed_bytes / 1e9:.2f} GB but {parent} has {free / 1e9:.2f} free")
    return path


def _longest_name() -> int:
    """Return the most bytes of a name from which names of temporary files and checkpoints are made."""
    return os.pathconf("/", "PC_NAME_MAX") - len(f"..{os.getpid()}.checkpoints")


@contextmanager
def claimed(output: str) -> Iterator[None]:
    """Lock an output directory and what stands beside it, such as checkpoints.

    The lock is a file beside it, `.NAME.lock`. It is released when the process ends, even if it is killed.

    Raises
    ------
    PMCError
        Another process has locked it.
    """
    path = Path(output).resolve()
    lock = path.with_name(f".{path.name}.lock")
    created = [p for p in lock.parents if not p.exists()]
    with one_error(f"output {output}"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise PMCError(
                    f"output {output} is being written by another run: wait for it, or name another"
                ) from None
            if lock.exists() and lock.stat().st_ino == os.fstat(handle).st_ino:
                break  # else its last holder has just removed it
            os.close(handle)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)
        with suppress(OSError):
            for parent in created:
                parent.rmdir()  # of a run that wrote nothing


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that is renamed to it when the block ends without an error.

    Temporary directories of killed processes for the same `path` are removed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with one_error(f"output {path}"):
            _remove_abandoned(path)
            aside.mkdir(parents=True)
            descriptor = os.open(aside, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # tells `_remove_abandoned` that the process is alive
                yield aside
                for file in aside.rglob("*"):
                    if file.is_file():
                        sync(file)
                aside.rename(path)  # an empty directory of that name is replaced
            finally:
                os.close(descriptor)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def lock(handle: int, refusal: str) -> None:
    """Lock an open file or directory until it is closed or its process ends; PMCError if another one has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise PMCError(refusal) from error


def check_new_files(files: Mapping[str, str | None]) -> None:
    """Refuse files to be written, by their purpose, that exist, have the same name or no directory."""
    seen: dict[Path, str] = {}
    for kind, file in files.items():
        if not file:
            continue
        path = Path(file).absolute()
        if path.exists() or not path.parent.is_dir():
            raise PMCError(f"{kind} file {file} exists, or its directory does not: name a new one")
        longest = _longest_name()
        if len(os.fsencode(path.name)) > longest:
            raise PMCError(f"{kind} file {file[:40]}... has too long a name: at most {longest} bytes")
        if path in seen:
            raise PMCError(f"{seen[path]} file and {kind} file are both {file}: name two")
        seen[path] = kind


def write_file(file: str | Path, text: str, *, private: bool = False) -> None:
    """Write a file completely or not at all, in place of the one that is there.

    Parameters
    ----------
    file : str or Path
    text : str
    private : bool
        The file has mode 0600 from its first byte on.
    """
    path = Path(file).absolute()
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with one_error(str(file)):
            aside.unlink(missing_ok=True)  # of a killed process with the same number
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
            with open(descriptor, "w", encoding="utf-8") as handle:
                handle.write(text)
                handle.flush()
                os.fsync(descriptor)
            aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def one_error(what: str) -> Iterator[None]:
    """Turn errors in writing `what`, such as a full disk, into a PMCError."""
    try:
        yield
    except Exception as error:
        # safetensors and torch.save raise errors of other classes
        own = any(words in str(error).lower() for words in ("os error", "inline_container", "iostream"))
        if isinstance(error, PMCError) or not (isinstance(error, OSError) or own):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "space" in str(error)
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise PMCError(f"{what} was not written: {reason}") from error


def _remove_abandoned(path: Path) -> None:
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if not aside.name.rsplit(".", 1)[1].isdigit() or not aside.is_dir() or aside.is_symlink():
            continue
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside, ignore_errors=True)
        except BlockingIOError:
            pass  # its process is alive
        finally:
            os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(content: Any) -> str:
    """Return the SHA-256 of JSON-ready content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """SHA-256 of files, for a process that asks again and again: a file that has not changed since is not read again.

    As in git's index, a file has changed if its inode, size, or time of modification or change has.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], str]] = {}

    def sha256(self, path: Path) -> str:
        s = path.stat()
        state = s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
        known, found = self._known.get(path, (None, ""))
        if known != state:
            found = file_sha256(path)
            self._known[path] = state, found
        return found
