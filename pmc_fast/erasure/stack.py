"""A model's adapters in the order of their requests, in a directory that changes by renames alone.

    STACK/0001/     adapter_model.safetensors, adapter_config.json, record.json, report.json, report.html
    STACK/0002/     trained on the model with 0001 in its weights
    STACK/rolled_back/

A request exists once its directory has its name, which is one rename; rolling it back is another. There is no index: the
order follows from names and records. Each record holds the hash of the one before it, which so stands for all before, and a
change to one of them, or its absence, is found.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import PMCError
from ..jobs.earlier_runs import entry
from ..models import loading
from ..utils.files import FileHashes, lock, sync
from . import adapters

RECORD, PRIVATE, ROLLED_BACK = "record.json", "private.jsonl", "rolled_back"
_NAME = re.compile(r"\d{4,}")
_UNFINISHED = re.compile(r"\.\d{4,}\.\d+")


@dataclass(frozen=True, slots=True)
class ErasureRequest:
    """A completed erasure request: its directory and its record."""

    directory: Path
    record: dict[str, Any]
    record_sha256: str

    @property
    def name(self) -> str:
        return self.directory.name

    def link(self) -> dict[str, str]:
        """Return this request's entry in the records of later ones."""
        return {
            "request": self.name,
            "adapter": self.record["files"][adapters.WEIGHTS],
            "record": self.record_sha256,
            "weights": self.record["model"]["after"],
        }


class Stack:
    """The requests of one model, read and checked.

    Parameters
    ----------
    directory : str or Path
    hashes : FileHashes, optional
        Where somebody reads the stack often.

    Raises
    ------
    PMCError
        A request is missing, was changed, or is of another stack; the directory holds other files.
    """

    def __init__(self, directory: str | Path, hashes: FileHashes | None = None) -> None:
        self.directory, self._hashes = Path(directory), hashes or FileHashes()
        if self.directory.exists() and not self.directory.is_dir():
            raise PMCError(f"stack {directory} is a file: name a directory")
        entries = {p.name for p in self.directory.iterdir()} if self.directory.exists() else set()
        names = sorted((n for n in entries if _NAME.fullmatch(n)), key=int)
        if not names and any(not n.startswith(".") and n != ROLLED_BACK for n in entries):
            raise PMCError(f"stack {directory} holds other things: name a new or empty directory, or a stack")
        self.requests: list[ErasureRequest] = []
        for name in names:
            if int(name) != len(self.requests) + 1:
                raise PMCError(
                    f"stack {directory}: request {self.next_name} is missing but {name} was trained upon it: "
                    "put it back; requests are rolled back from the last one on (pmc-fast rollback)"
                )
            self.requests.append(self._read(name))

    @property
    def next_name(self) -> str:
        return f"{len(self.requests) + 1:04d}"

    @property
    def next_directory(self) -> Path:
        return self.directory / self.next_name

    def require_requests(self) -> None:
        """Refuse a stack without requests."""
        if not self.requests:
            raise PMCError(f"stack {self.directory} has no requests: `pmc-fast unlearn --lora` makes the first")

    def links(self) -> list[dict[str, str]]:
        """Return the entries of all requests."""
        return [request.link() for request in self.requests]

    def last_link(self) -> list[dict[str, str]]:
        """Return the entry of the last request, if any, for the next record: its hash stands for all before it."""
        return [request.link() for request in self.requests[-1:]]

    def earlier(self) -> list[dict[str, Any]]:
        """Return an entry per request and per run that made the base model; see `earlier_runs.check`."""
        entries: list[dict[str, Any]] = []
        for request in self.requests:
            data = request.record["data"]
            # the first record holds the base model's; one of format 2 all those before it, too
            entries = [*(data.get("earlier") or entries), entry(f"request {request.name}", data)]
        return entries

    def _read(self, name: str) -> ErasureRequest:
        directory = self.directory / name
        try:
            content = (directory / RECORD).read_bytes()
            record = json.loads(content)
            files, before = record["files"], record["stack"]["before"]
            record["model"]["after"], files[adapters.WEIGHTS], files[adapters.CONFIG]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PMCError(f"request {directory} has no sound {RECORD}: restore it from a copy") from error
        for file, sha256 in files.items():
            if not (directory / file).is_file() or self._hashes.sha256(directory / file) != sha256:
                raise PMCError(f"request {directory} is damaged: {file} is not what was written; restore it")
        if before != self.last_link() and before != self.links():  # of all before it, up to format 2
            raise PMCError(
                f"request {directory} was made upon other requests than those before it: their order or content changed"
            )
        return ErasureRequest(directory, record, hashlib.sha256(content).hexdigest())

    @contextmanager
    def model(self, given: str) -> Iterator[str]:
        """Yield the base model's path: `given`, else that in the last record, which errors then name."""
        last = self.requests[-1]
        recorded = last.record["model"]["source"]
        with nullcontext() if given else as_recorded(last, "the model", recorded, "--model"):
            yield given or recorded

    @property
    def weights(self) -> str:
        """The recorded hash of the weights with all requests in them."""
        return self.requests[-1].record["model"]["after"]

    @property
    def param_dtype(self) -> loading.ParamDtype | None:
        """The dtype of the parameters that all requests were trained upon and measured with."""
        return self.requests[-1].record["settings"].get("param_dtype", "float32") if self.requests else None

    def apply(
        self,
        model: Any,
        before: Callable[[ErasureRequest], None] = lambda request: None,
        device: torch.device | None = None,
    ) -> str:
        """Merge the requests' adapters into the base model's float32 weights, in place; return the hash of the weights.

        `before` is called with each request before its adapter is merged, and `device` computes the sums.

        Raises
        ------
        PMCError
            The model is not the stack's base model, or the weights are not those that the last request was measured
            with.
        """
        base = loading.weights_hash(model)
        if not self.requests:
            return base
        recorded = self.requests[0].record["model"]["before"]
        if base != recorded:
            raise PMCError(
                f"stack {self.directory} is of another model: its weights hash to {recorded[:12]}, this one's to "
                f"{base[:12]}"
            )
        for request in self.requests:
            before(request)
            adapters.merge(model, adapters.read(request.directory), device)
        weights, recorded = loading.weights_hash(model), self.requests[-1].record["model"]["after"]
        if weights != recorded:
            raise PMCError(
                f"stack {self.directory}: the weights with {self.requests[-1].name} hash to {weights[:12]}, its record says "
                f"{recorded[:12]}"
            )
        return weights

    def check_last(self, name: str = "") -> ErasureRequest:
        """Return the last request; refuse `name` if it is another's."""
        last = self.requests[-1]
        if name and name != last.name:
            if name not in {r.name for r in self.requests}:
                raise PMCError(f"request {name!r} is not in stack {self.directory}: its last one is {last.name}")
            raise PMCError(
                f"request {name} can't be dropped: {last.name} was trained upon it; roll back {last.name} first"
            )
        return last

    def roll_back(self) -> Path:
        """Move the last request to rolled_back/; return its new path."""
        last = self.requests[-1]
        kept = self.directory / ROLLED_BACK
        kept.mkdir(exist_ok=True)
        number = sum(1 for p in kept.iterdir() if p.name.startswith(f"{last.name}.")) + 1
        target = kept / f"{last.name}.{number}"
        try:
            last.directory.rename(target)
        except OSError as error:
            raise PMCError(f"request {last.name} was not rolled back: {error.strerror}") from error
        sync(kept)
        sync(self.directory)
        self.requests.pop()
        return target


def checkpoints_of(stack: Path, weights: str) -> Path:
    """Return the directory of the checkpoints of the request that is trained on weights with this hash."""
    path = stack.resolve()
    return path.with_name(f"{path.name}.checkpoints.{weights[:12]}")


@contextmanager
def as_recorded(request: ErasureRequest, name: str, value: str, flag: str) -> Iterator[None]:
    """Add to errors about a path from a request's record where it comes from and how to give another."""
    try:
        yield
    except PMCError as error:
        raise PMCError(
            f"{error} ({name} is what request {request.name}'s record says, {value!r}, typed in the directory that it was "
            f"made from: say where it is now with {flag})"
        ) from error


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """Lock a stack's directory, creating it if it does not exist; unfinished requests of killed runs are removed.

    Raises
    ------
    PMCError
        Another process has locked it, or it can't be created.
    """
    path = Path(directory)
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise PMCError(f"stack {directory} can't be used: {error.strerror}") from error
    try:
        lock(handle, f"stack {directory} is in use by another process: wait for it")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PMCError(f"stack {directory} can't be written: no permission")
        for entry in path.iterdir():
            if _UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        yield
    finally:
        if created:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty
        os.close(handle)
