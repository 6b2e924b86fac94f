"""Erasure requests as directories that are moved by renames alone, so that a kill loses none and repeats none.

    SPOOL/incoming/ID/   a request that waits: request.json, forget.jsonl, retain.jsonl, paraphrased.jsonl
    SPOOL/running/ID/    the one that is being answered
    SPOOL/done/ID/       its answer: result.json, record.json, verification.json; no text
    SPOOL/failed/ID/     one that could not be answered, as it came
    SPOOL/state/ID.json  queued, running, done or failed, and why

Where a request's directory stands is its state; the state file follows and is corrected after a kill. An answer appears
before the request's texts are removed.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.loading import strict_object
from ..errors import PMCError
from ..utils.files import lock, one_error, sync, write_file, written_aside
from ..utils.text import printable

SETTINGS, RESULT, VERIFICATION = "request.json", "result.json", "verification.json"
SETS = ("forget", "retain", "paraphrased")  # each a file, NAME.jsonl
STATES = ("incoming", "running", "done", "failed")
PARTS = ("settings", "verify")  # of request.json
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LONGEST = 500  # characters of an error


class OtherContentError(PMCError):
    """Another request has the id."""

    def __init__(self, id: str) -> None:
        super().__init__(f"request {id} is here with other content: choose another id")


@dataclass(frozen=True, slots=True)
class SpooledRequest:
    """A request that is to be answered now."""

    id: str
    directory: Path
    arrived: float  # seconds since the epoch


class Spool:
    """A directory of requests. Clients `submit` and read `state`; one worker takes requests and answers them.

    Parameters
    ----------
    directory : str or Path

    Raises
    ------
    PMCError
        It can't be used, or others than its owner can read it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._states = threading.Lock()
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.directory.stat().st_mode & 0o077:
                raise PMCError(f"spool {directory} is open to other users, and holds texts: chmod 700 {directory}")
            if others := {p.name for p in self.directory.iterdir()} - {*STATES, "state"}:
                raise PMCError(
                    f"spool {directory} holds other things ({printable(min(others))}): name a new directory"
                )
            for name in (*STATES, "state"):
                (self.directory / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise PMCError(f"spool {directory} can't be used: {error.strerror}") from error
        self._warned: set[str] = set()

    def place(self, where: str, id: str) -> Path:
        """Return the directory of a request in one of `STATES`."""
        return self.directory / where / id

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only worker, until the process ends."""
        handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock(handle, f"spool {self.directory} is in use by another worker: stop it first")
            yield
        finally:
            os.close(handle)

    # --- clients

    def submit(
        self,
        id: str,
        sets: Mapping[str, Sequence[Mapping[str, Any]]],
        settings: Mapping[str, Any] | None = None,
        verify: Mapping[str, Any] | None = None,
    ) -> bool:
        """Queue a request; it appears at once and whole.

        Parameters
        ----------
        id : str
            Up to 100 letters, digits, dots, hyphens and underscores. One request has one id: sent again it is not answered
            again.
        sets : mapping of str to rows
            ``forget``, and ``retain`` and ``paraphrased`` if there are any: rows as files have them.
        settings, verify : mapping, optional
            As of request.json.

        Returns
        -------
        bool
            False if the request is here already.

        Raises
        ------
        PMCError
            A bad id, another request with this id (`OtherContentError`), or an error in writing.
        """
        check_id(id)
        if unknown := sorted(set(sets) - set(SETS)):
            raise PMCError(f"{printable(unknown[0])} is no part of a request: use {', '.join(SETS)}")
        files = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in sets.items()}
        files[SETTINGS] = json.dumps({"settings": settings or {}, "verify": verify or {}})
        aside = self.directory / "incoming" / f".{id}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            with one_error(f"request {id}"):
                aside.mkdir(mode=0o700)
                for name, text in files.items():
                    write_file(aside / name, text, private=True)
                while not self._known(id, aside):
                    self._write_state(id, "queued")
                    try:
                        aside.rename(self.place("incoming", id))
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                            raise
                        continue  # somebody else sent it at the same time
                    sync(self.directory / "incoming")
                    return True
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return False

    def _known(self, id: str, directory: Path) -> bool:
        """Return whether the request in `directory` is here; refuse another one with its id. Failed ones may come again."""
        own, same = _content(directory, ""), True
        for where in ("incoming", "running"):
            with suppress(FileNotFoundError):  # it moves on, in this order
                same = _content(self.place(where, id), "") == own
                if same:
                    return True
                break
        if self._answered(id, directory):  # else what was read may have been half removed
            return True
        if not same:
            raise OtherContentError(id)
        return False

    def _answered(self, id: str, directory: Path) -> bool:
        """Return whether the request in `directory` has its answer here; refuse another one with its id."""
        result = self.result(id)
        if result is not None and result["content"] != _content(directory, result["salt"]):
            raise OtherContentError(id)
        return result is not None

    def state(self, id: str) -> dict[str, Any] | None:
        """Return a request's state file, or what it will say; None if there is no such request."""
        check_id(id)
        try:
            return json.loads((self.directory / "state" / f"{id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {"id": id, "state": "queued"} if self.place("incoming", id).is_dir() else None

    def result(self, id: str) -> dict[str, Any] | None:
        """Return the result of a request that is done."""
        try:
            return json.loads((self.place("done", id) / RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def queued(self) -> list[str]:
        """Return the ids of requests that wait, the first one first; names that are no ids are left out."""
        found = [(_renamed(e), e.name) for e in os.scandir(self.directory / "incoming") if _is_request(e)]
        said = {id: (self.state(id) or {}).get("queued", at) for at, id in found}
        return [id for _, at, id in sorted((said[id], at, id) for at, id in found)]

    def odd_names(self) -> list[str]:
        """Return names in incoming that are no request's, each once."""
        entries = os.scandir(self.directory / "incoming")
        names = {e.name for e in entries if not e.name.startswith(".") and not _is_request(e)}
        new = sorted(names - self._warned)
        self._warned |= names
        return new

    # --- the worker

    def recover(self) -> None:
        """Finish the moves that a killed worker began, and remove what killed clients left aside."""
        for aside in (self.directory / "incoming").glob(".*.*.*"):
            pid = aside.name.rsplit(".", 2)[1]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(aside, ignore_errors=True)
        for directory in (self.directory / "running").iterdir():
            if self.result(directory.name) is not None:
                self._write_state(directory.name, "done")
                shutil.rmtree(directory)
            else:
                self._write_state(directory.name, "queued")

    def take(self) -> SpooledRequest | None:
        """Move the next request to running/ and return it. One that was cut short comes first."""
        self.note_queued()
        for directory in sorted((self.directory / "running").iterdir()):
            return self._begin(directory)
        for id in self.queued():
            source, directory = self.place("incoming", id), self.place("running", id)
            if self.result(id) is not None:
                self._repeated(id)
                continue
            shutil.rmtree(self.place("failed", id), ignore_errors=True)  # it comes again
            try:
                source.rename(directory)
            except FileNotFoundError:
                continue  # taken back
            sync(self.directory / "running")
            return self._begin(directory)
        return None

    def _begin(self, directory: Path) -> SpooledRequest:
        id = directory.name
        self._write_state(id, "running")
        return SpooledRequest(id, directory, (self.state(id) or {}).get("queued", time.time()))

    def _repeated(self, id: str) -> None:
        """Put away a request whose id is answered."""
        incoming = self.place("incoming", id)
        self._write_state(id, "done")
        try:
            self._answered(id, incoming)
            shutil.rmtree(incoming)
        except PMCError as error:
            shutil.rmtree(self.place("failed", id), ignore_errors=True)
            incoming.rename(self.place("failed", id))
            self._write_state(id, "done", refused=str(error))

    def note_queued(self) -> None:
        """Write the state files of requests that were moved here by hand."""
        for id in self.queued():
            known = self.state(id) or {}
            if known.get("state") == "failed" or "queued" not in known:
                self._write_state(id, "queued")

    def finish(self, request: SpooledRequest, result: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Write a request's answer and remove its texts."""
        salt = secrets.token_hex(16)
        known = {"id": request.id, **result, "salt": salt, "content": _content(request.directory, salt)}
        with written_aside(self.place("done", request.id)) as directory:
            directory.chmod(0o700)
            for name, text in {RESULT: json.dumps(known, indent=1), **files}.items():
                write_file(directory / name, text, private=True)
        sync(self.directory / "done")
        self._write_state(request.id, "done")
        shutil.rmtree(request.directory)

    def fail(self, request: SpooledRequest, why: str) -> None:
        """Put a request that could not be answered away, as it came."""
        target = self.place("failed", request.id)
        shutil.rmtree(target, ignore_errors=True)
        request.directory.rename(target)
        sync(self.directory / "failed")
        self._write_state(request.id, "failed", error=printable(" ".join(why.split()))[:_LONGEST])

    def put_back(self, request: SpooledRequest) -> None:
        """Let a request wait that was cut short; it stays the next one."""
        self._write_state(request.id, "queued")

    def _write_state(self, id: str, state: str, **more: str) -> None:
        with self._states:
            known = self.state(id) or {}
            again = state == "queued" and known.get("state") not in ("queued", "running")
            times: dict[str, Any] = {} if again else {n: known[n] for n in ("queued", "running") if n in known}
            content: dict[str, Any] = {"id": id, "state": state, state: time.time(), **times, **more}
            write_file(self.directory / "state" / f"{id}.json", json.dumps(content), private=True)


def check_id(id: str) -> None:
    """Refuse what is no id, so that no path can be made of it."""
    if not _ID.fullmatch(id):
        raise PMCError(
            f"id {printable(id[:40])!r} is none: use up to 100 letters, digits, dots, hyphens and underscores, not a dot first"
        )


def read_request(request: SpooledRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a request's settings, its files among them, and those of its verification; make its files private.

    Raises
    ------
    PMCError
        A file that is no part of a request, or a request.json of another form.
    """
    request.directory.chmod(0o700)
    known = {SETTINGS, *(f"{name}.jsonl" for name in SETS)}
    for path in sorted(request.directory.iterdir()):
        if path.name not in known:
            raise PMCError(f"a request has no {printable(path.name)}: its files are {', '.join(sorted(known))}")
        if path.is_symlink() or not path.is_file():
            raise PMCError(f"{path.name} is no file")
        path.chmod(0o600)
    content: Any = {}
    if (file := request.directory / SETTINGS).exists():
        try:
            content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=strict_object)
        except (ValueError, RecursionError) as error:
            raise PMCError(f"{SETTINGS} is not JSON") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(part, {}), dict) for part in PARTS):
        raise PMCError(f"{SETTINGS} must be an object with {' and '.join(PARTS)}, each an object")
    if unknown := sorted(content.keys() - set(PARTS)):
        raise PMCError(f"{SETTINGS} has {printable(unknown[0])}: use {' and '.join(PARTS)}")
    sets = {name: str(path) for name in SETS if (path := request.directory / f"{name}.jsonl").exists()}
    if "forget" not in sets:
        raise PMCError("the request has no forget.jsonl")
    settings = content.get("settings", {})
    if given := sorted(settings.keys() & set(SETS)):
        raise PMCError(f"{given[0]} is a file of the request, {given[0]}.jsonl, and no setting")
    return settings | sets, content.get("verify", {})


def _content(directory: Path, salt: str) -> str:
    """Return a hash of a request's files; the directory may be moved meanwhile."""
    found = hashlib.sha256(salt.encode())
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in sorted(os.listdir(handle)):
            found.update(f"{name}\0".encode() + hashlib.sha256(_read(name, handle)).digest())
    finally:
        os.close(handle)
    return found.hexdigest()


def _read(name: str, directory: int) -> bytes:
    """Return a file's content; what is no file, or was removed meanwhile, has none."""
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError:
        return b""
    with open(handle, "rb") as file:
        return file.read() if stat.S_ISREG(os.fstat(handle).st_mode) else b""


def _is_request(entry: os.DirEntry[str]) -> bool:
    return _ID.fullmatch(entry.name) is not None and entry.is_dir(follow_symlinks=False)


def _renamed(entry: os.DirEntry[str]) -> float:
    """Return when a directory got its name."""
    try:
        return entry.stat(follow_symlinks=False).st_ctime
    except FileNotFoundError:
        return 0.0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
