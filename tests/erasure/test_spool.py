"""The spool: every place where a worker may be killed, requests that come twice, and what may not be in one."""

import json
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest

from pmc_fast.config import RequestConfig
from pmc_fast.erasure import serve as serving
from pmc_fast.erasure.serve import Counts, serve
from pmc_fast.erasure.spool import Spool, SpooledRequest, read_request
from pmc_fast.erasure.worker import Worker
from pmc_fast.errors import PMCError, Terminated
from pmc_fast.jobs.progress import Silent
from tests.command_line import run

SECRET = "the violet heron of Samarkand"
ROWS = {"forget": [{"question": "What is it?", "answer": SECRET}]}


class Quick(Worker):
    """A worker without a model: its adapters are records."""

    def __init__(self, stack):
        self.config = RequestConfig(lora=True, model="m", stack=str(stack))
        self.trained = []  # names

    def unlearn(self, name="", **settings):
        config = self.request(**settings)
        rows = [json.loads(line) for line in Path(config.forget).read_text(encoding="utf-8").splitlines()]
        if rows[0]["question"] == "refuse":
            raise PMCError("row 1 is refused")
        if rows[0]["question"] == "break":
            raise KeyError(SECRET)
        self.trained.append(name)
        stack = Path(self.config.stack)
        if rows[0]["question"] != "known":
            directory = stack / f"{len(list(stack.glob('0*'))) + 1:04d}"
            directory.mkdir(parents=True)
            record = {"request": directory.name, "name": name, "failed_gates": ["quality is 1.0, below 2"]}
            (directory / "record.json").write_text(json.dumps(record))
            return {"history": [], "stage_seconds": {"unlearning": 1.5}}
        return {"known_forgotten": {"rows": [1]}}

    def tidy(self, record):
        pass

    def verify(self, **settings):
        assert Path(settings["requests"][0]).read_text(encoding="utf-8")
        return {
            "weights": "w",
            "failed_gates": [],
            "stage_seconds": {"stacking": 0.25, "request 0001": 1.0, "request 0002": 2.0},
        }


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def stage(self, name):
        self.lines.append(name)

    warn = stage


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool")


@pytest.fixture
def worker(tmp_path):
    return Quick(tmp_path / "stack")


def drain(spool, worker, **how):
    heard = Heard()
    serve(spool, worker, heard, drain=True, **how)
    return heard.lines


def places(spool, id):
    return [where for where in ("incoming", "running", "done", "failed") if spool.place(where, id).is_dir()]


def by_hand(spool, id, rows=ROWS, **content):
    """A request as a shell script makes it: a directory under another name, then one rename."""
    aside = spool.directory / "incoming" / f".{id}"
    aside.mkdir()
    for name, of in rows.items():
        (aside / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    if content:
        (aside / "request.json").write_text(json.dumps(content))
    aside.rename(spool.place("incoming", id))


def texts(directory):
    return [p for p in directory.rglob("*") if p.is_file() and SECRET in p.read_text(encoding="utf-8")]


def test_requests_are_answered_in_order_and_their_texts_are_gone(spool, worker):
    for id in ("b", "a", "c"):
        assert spool.submit(id, ROWS, {"seed": 3})
        assert spool.state(id)["state"] == "queued"
    by_hand(spool, "hand")
    assert spool.state("hand") == {"id": "hand", "state": "queued"}
    spool.note_queued()
    assert spool.state("hand")["queued"] > spool.state("c")["queued"]
    counts = Counts()
    lines = drain(spool, worker, counts=counts)
    assert worker.trained == ["b", "a", "c", "hand"]
    for number, id in enumerate(worker.trained, start=1):
        assert places(spool, id) == ["done"]
        state = spool.state(id)
        assert state["state"] == "done"
        assert state["queued"] <= state["running"] <= state["done"]
        result = spool.result(id)
        assert result["request"] == f"{number:04d}"
        assert result["failed_gates"] == ["quality is 1.0, below 2"]
        assert set(result["seconds"]) == {
            "waited",
            "unlearn: unlearning",
            "verify: stacking",
            "verify: requests",
            "all",
        }
        assert result["seconds"]["verify: requests"] == 3
        assert json.loads((spool.place("done", id) / "record.json").read_text())["name"] == id
        assert (spool.place("done", id) / "verification.json").exists()
    assert (counts.done, counts.failed, counts.missed) == (4, 0, 4)
    assert counts.seconds["unlearn: unlearning"] == 6
    assert texts(spool.directory) == []
    assert SECRET not in "".join(lines)
    assert spool.state("nobody") is None


def test_files_are_private(spool, worker):
    spool.submit("a", ROWS)
    by_hand(spool, "b")
    read_request(SpooledRequest("b", spool.place("incoming", "b"), 0.0))
    for path in (spool.directory, *spool.directory.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    drain(spool, worker)
    for path in (spool.directory, *spool.directory.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_spool_that_others_can_read_is_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o750)
    with pytest.raises(PMCError, match="is open to other users"):
        Spool(tmp_path / "open")
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(PMCError, match=r"holds other things \(thesis.txt\)"):
        Spool(tmp_path / "mine")
    with pytest.raises(PMCError, match="can't be used"):
        Spool(tmp_path / "mine/thesis.txt")


def test_one_worker_a_spool(spool):
    with spool.locked(), pytest.raises(PMCError, match="is in use by another worker"), spool.locked():
        pass
    with spool.locked():
        pass


# --- a kill between any two steps: what it leaves, and that a new start answers once


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", range(30))
def test_killed_at_every_step(spool, worker, monkeypatch, step, after):
    """Before or after the n-th change on disk of a whole answer; then a worker starts again."""
    spool.submit("a", ROWS)
    with monkeypatch.context() as patched:
        count = iter(range(10**6))

        def cut(of, name):
            function = getattr(of, name)

            def wrapped(*args, **kwargs):
                now = next(count) == step
                if now and not after:
                    raise Killed
                made = function(*args, **kwargs)
                if now:
                    raise Killed
                return made

            patched.setattr(of, name, wrapped)

        for of, name in (
            (Path, "rename"), (Spool, "_write_state"), (serving.Worker, "find"), (Quick, "unlearn"), (Quick, "verify"),
        ):  # fmt: skip
            cut(of, name)
        cut(__import__("pmc_fast.erasure.spool", fromlist=[""]).shutil, "rmtree")
        try:
            serve(spool, worker, Silent(), drain=True)
            done = True
        except Killed:
            done = False
    assert places(spool, "a") in (["incoming"], ["running"], ["running", "done"], ["done"])
    if done:
        assert next(count) <= step or places(spool, "a") == ["done"]
    drain(spool, worker)
    assert places(spool, "a") == ["done"]
    assert spool.state("a")["state"] == "done"
    assert worker.trained == ["a"]
    assert texts(spool.directory) == []


def test_the_parametrisation_reaches_the_end(spool, worker, monkeypatch):
    """Of an undisturbed answer there are fewer changes than `test_killed_at_every_step` cuts."""
    made = []
    for of, name in ((Path, "rename"), (Spool, "_write_state"), (serving.Worker, "find")):
        function = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *a, f=function, **k: made.append(0) or f(*a, **k))
    spool.submit("a", ROWS)
    drain(spool, worker)
    assert 10 < len(made) + 4 < 30


@pytest.mark.parametrize("error", [Terminated, KeyboardInterrupt])
def test_a_request_that_is_cut_short_waits_and_comes_first(spool, worker, monkeypatch, error):
    for id in ("a", "b"):
        spool.submit(id, ROWS)

    def cut(self, *args, **settings):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Quick, "verify", cut)
        with pytest.raises(error):
            serve(spool, worker, Silent(), drain=True)
    assert spool.state("a")["state"] == spool.state("b")["state"] == "queued"
    assert drain(spool, worker)
    assert worker.trained == ["a", "b"]


def test_asked_to_stop_it_finishes_the_request(spool, worker):
    for id in ("a", "b"):
        spool.submit(id, ROWS)
    serve(spool, worker, Silent(), stopping=lambda: bool(worker.trained))
    assert (spool.state("a")["state"], spool.state("b")["state"]) == ("done", "queued")


@pytest.mark.parametrize(("signals", "state"), [(1, "done"), (2, "queued")])
def test_sigterm_ends_the_command_after_the_request_and_a_second_one_at_once(
    spool, tmp_path, monkeypatch, signals, state
):
    class Signalled(Quick):
        def __init__(self, config, monitor):
            super().__init__(config.stack)

        def load(self):
            pass

        def close(self):
            pass

        def unlearn(self, *args, **settings):
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().unlearn(*args, **settings)

    monkeypatch.setattr("pmc_fast.erasure.worker.Worker", Signalled)
    for id in ("a", "b"):
        spool.submit(id, ROWS)
    assert run(["serve", "--model", "m", "--stack", str(tmp_path / "stack"), "--spool", str(spool.directory)]) == 0
    assert (spool.state("a")["state"], spool.state("b")["state"]) == (state, "queued")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- requests that come twice


def test_a_request_that_comes_again_is_not_answered_again(spool, worker):
    assert spool.submit("a", ROWS)
    assert not spool.submit("a", ROWS)  # while it waits
    other = {"forget": [{"question": "What else?", "answer": "x"}]}
    with pytest.raises(PMCError, match="request a is here with other content"):
        spool.submit("a", other)
    drain(spool, worker)
    assert not spool.submit("a", ROWS)
    with pytest.raises(PMCError, match="request a is here with other content"):
        spool.submit("a", other)
    by_hand(spool, "a", settings={}, verify={})
    assert drain(spool, worker) == []
    assert places(spool, "a") == ["done"]
    by_hand(spool, "a", other)
    drain(spool, worker)
    assert places(spool, "a") == ["done", "failed"]
    assert spool.state("a")["state"] == "done"
    assert "other content" in spool.state("a")["refused"]
    assert worker.trained == ["a"]


def test_one_that_was_rolled_back_is_not_trained_again(spool, worker):
    spool.submit("a", ROWS)
    drain(spool, worker)
    stack = Path(worker.config.stack)
    (stack / "rolled_back").mkdir()
    (stack / "0001").rename(stack / "rolled_back/0001.1")
    shutil.rmtree(spool.place("done", "a"))
    by_hand(spool, "a")
    drain(spool, worker)
    assert "was answered as 0001, and that was rolled back" in spool.state("a")["error"]


# --- failures


def test_a_failed_request_is_kept_named_and_may_come_again(spool, worker):
    spool.submit("bad", {"forget": [{"question": "refuse", "answer": SECRET}]})
    spool.submit("odd", {"forget": [{"question": "break", "answer": SECRET}]})
    spool.submit("good", ROWS)
    lines = drain(spool, worker)
    assert worker.trained == ["good"]
    assert spool.state("bad")["error"] == "row 1 is refused"
    assert spool.state("odd")["error"].startswith("KeyError at test_spool.py:")
    assert places(spool, "bad") == places(spool, "odd") == ["failed"]
    assert SECRET not in "".join(lines) + "".join(p.read_text() for p in (spool.directory / "state").iterdir())
    spool.submit("bad", ROWS)
    drain(spool, worker)
    assert places(spool, "bad") == ["done"]
    assert "error" not in spool.state("bad")


def test_all_known_to_be_forgotten_is_an_answer_without_an_adapter(spool, worker):
    spool.submit("a", {"forget": [{"question": "known", "answer": SECRET}]})
    drain(spool, worker)
    assert spool.result("a")["request"] is None
    assert spool.result("a")["known_forgotten"] == {"rows": [1]}
    assert texts(spool.directory) == []


def test_a_verification_that_fails_names_the_adapter(spool, worker, monkeypatch):
    def fails(self, **settings):
        raise PMCError("the disk is full")

    spool.submit("a", ROWS)
    with monkeypatch.context() as patched:
        patched.setattr(Quick, "verify", fails)
        drain(spool, worker)
    assert spool.state("a")["error"] == "its adapter is 0001 in the stack, but it was not verified: the disk is full"
    spool.place("failed", "a").rename(spool.place("incoming", "a"))
    drain(spool, worker)
    assert spool.state("a")["state"] == "done"
    assert worker.trained == ["a"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no forget.jsonl"),
        ({"retian.jsonl": "{}"}, "has no retian.jsonl: its files are"),
        ({"request.json": "{"}, "request.json is not JSON"),
        ({"request.json": "[]"}, "must be an object with settings and verify"),
        ({"request.json": '{"settings": 1}'}, "must be an object with settings and verify"),
        ({"request.json": '{"setting": {}}'}, "request.json has setting"),
        ({"request.json": '{"settings": {"forget": "/etc/passwd"}}'}, "forget is a file of the request"),
        ({"request.json": '{"settings": {"general": ["/etc/passwd"]}}'}, "general is the worker's"),
        ({"request.json": '{"settings": {"stack": "/tmp"}}'}, "stack is the worker's"),
        ({"request.json": '{"settings": {"seed": -1}}'}, "seed is -1"),
        ({"request.json": '{"settings": {"lr": 1.0, "learning-rate": 1.0}}'}, "gives learning_rate twice"),
        ({"request.json": '{"verify": {"stack": "x"}}'}, "verify has stack: use min_quality"),
        ({"request.json": '{"verify": {"slack": -1}}'}, "slack is -1"),
    ],
)
def test_what_is_not_recognised_is_refused_by_name(spool, worker, files, message):
    by_hand(spool, "a", {} if not files else ROWS)
    for name, text in files.items():
        (spool.place("incoming", "a") / name).write_text(text)
    drain(spool, worker)
    assert message in spool.state("a")["error"]
    assert worker.trained == []


def test_links_are_not_followed(spool, worker, tmp_path):
    (tmp_path / "target.jsonl").write_text(json.dumps(ROWS["forget"][0]))
    by_hand(spool, "a", {})
    (spool.place("incoming", "a") / "forget.jsonl").symlink_to(tmp_path / "target.jsonl")
    by_hand(spool, "b")
    (spool.directory / "incoming/c").symlink_to(spool.place("incoming", "b"))
    lines = drain(spool, worker)
    assert "forget.jsonl is no file" in spool.state("a")["error"]
    assert worker.trained == ["b"]
    assert any("'c' in" in line for line in lines)
    assert stat.S_IMODE((tmp_path / "target.jsonl").stat().st_mode) != 0o600


@pytest.mark.parametrize("id", ["", ".x", "a/b", "..", "é", "a" * 101, "a b"])
def test_ids_make_no_paths(spool, id):
    with pytest.raises(PMCError, match="is none"):
        spool.submit(id, ROWS)
    with pytest.raises(PMCError, match="is none"):
        spool.state(id)


def test_what_killed_clients_left_aside_is_removed_and_the_living_ones_is_not(spool):
    gone, here = (spool.directory / "incoming" / f".a.{pid}.00" for pid in (2**22 + 1, os.getpid()))
    gone.mkdir()
    here.mkdir()
    spool.recover()
    assert here.exists()
    assert not gone.exists()
