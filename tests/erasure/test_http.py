"""Requests over HTTP: authentication, limits, what is queued, and that no answer holds a text."""

import json
import threading
from functools import partial

import pytest

from pmc_fast.erasure import http_server
from pmc_fast.erasure.serve import Counts, check, serve
from pmc_fast.erasure.spool import Spool
from pmc_fast.errors import PMCError
from pmc_fast.jobs.progress import Silent
from tests.erasure.test_spool import ROWS, SECRET, Quick, texts

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")
TOKEN = "a-token-of-the-test"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


class Site:
    def __init__(self, tmp_path, **limits):
        from starlette.testclient import TestClient

        self.spool, self.counts = Spool(tmp_path / "spool"), Counts()
        self.worker = Quick(tmp_path / "stack")
        app = http_server.application(self.spool, TOKEN, self.counts, partial(check, self.worker), **limits)
        self.client = TestClient(app, headers=AUTH, raise_server_exceptions=False)

    def post(self, **content):
        return self.client.post("/requests", json=content)

    def drain(self):
        serve(self.spool, self.worker, Silent(), drain=True, counts=self.counts)


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_request_is_queued_answered_and_told(site):
    made = site.post(id="a", **ROWS, settings={"seed": 3}, verify={"slack": 10})
    assert made.status_code == 202
    assert made.json()["state"] == "queued"
    assert site.client.get("/requests/a").json()["state"] == "queued"
    site.drain()
    told = site.client.get("/requests/a").json()
    assert told["state"] == "done"
    assert told["result"]["request"] == "0001"
    assert not {"salt", "content"} & set(told["result"])
    assert told["record"]["name"] == "a"
    assert told["verification"]["weights"] == "w"
    assert texts(site.spool.directory) == []
    unnamed = site.post(**ROWS).json()["id"]
    assert site.client.get(f"/requests/{unnamed}").json()["state"] == "queued"


def test_the_same_request_again_is_not_another_one(site):
    assert site.post(id="a", **ROWS).status_code == 202
    assert site.post(id="a", **ROWS).status_code == 200
    assert site.post(id="a", forget=[{"question": "else?"}]).status_code == 409
    site.drain()
    again = site.post(id="a", **ROWS)
    assert (again.status_code, again.json()["state"]) == (200, "done")
    assert site.worker.trained == ["a"]


@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer x"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é".encode()}]
)
def test_without_the_token_nothing_is_told(site, header):
    site.client.headers.pop("authorization")
    for call in (
        partial(site.client.post, "/requests", json=ROWS), partial(site.client.get, "/requests/a"),
        partial(site.client.get, "/metrics"),
    ):  # fmt: skip
        assert call(headers=header).status_code == 401
    assert site.spool.queued() == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "must be an object"),
        ({"forget": []}, "forget is not given"),
        ({**ROWS, SECRET: 1}, "nothing else"),
        ({"forget": [SECRET]}, "forget must be a list of objects"),
        ({"forget": SECRET}, "forget must be a list of objects"),
        ({"forget": [{"answer": SECRET}]}, "forget, row 1 has no question"),
        ({**ROWS, "retain": [{"question": SECRET}]}, "retain, row 1 has no answer"),
        ({**ROWS, "settings": []}, "must be objects"),
        ({**ROWS, "settings": {"num_samples": 0}}, "num_samples is 0"),
        ({**ROWS, "settings": {"retain": "/etc/passwd"}}, "retain is a list of rows"),
        ({**ROWS, "settings": {"general": ["/etc/passwd"]}}, "general is the worker's"),
        ({**ROWS, "settings": {"model": "/etc"}}, "model is the worker's"),
        ({**ROWS, "verify": {"stack": "x"}}, "verify has stack"),
        ({**ROWS, "id": "../x"}, "is none"),
        ({**ROWS, "id": 7}, "id must be a string"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_without_a_text(site, content, words):
    made = site.client.post("/requests", content=json.dumps(content))
    assert made.status_code == 422
    assert words in made.json()["error"]
    assert SECRET not in made.text
    assert site.spool.queued() == []


def test_bodies_that_are_no_json(site):
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'{"forget": [{"question": "a", "question": "b"}]}'):
        made = site.client.post("/requests", content=body)
        assert (made.status_code, made.json()) == (422, {"error": "the request is not JSON"})


def test_limits_of_size(tmp_path):
    site = Site(tmp_path, most_bytes=1000, most_rows=3)
    assert site.post(forget=[{"question": f"{i}?"} for i in range(3)]).status_code == 202
    made = site.post(forget=[{"question": f"{i}?"} for i in range(4)])
    assert (made.status_code, made.json()["error"]) == (422, "the request has 4 rows: at most 3 are taken")
    assert site.post(forget=[{"question": "x" * 1000}]).status_code == 413

    def parts():
        for _ in range(100):
            yield b" " * 100

    assert site.client.post("/requests", content=parts()).status_code == 413  # whose length nobody said
    assert len(site.spool.queued()) == 1


def test_errors_of_the_program_tell_nothing(site, monkeypatch):
    def fails(*args):
        raise KeyError(SECRET)

    monkeypatch.setattr(http_server, "_parts", fails)
    made = site.post(**ROWS)
    assert made.status_code == 500
    assert SECRET not in made.text
    assert site.client.get("/requests/nobody").status_code == 404
    assert site.client.get("/requests/..%2Fx").status_code == 404
    assert site.client.get("/docs").status_code == 404


def test_metrics_count_what_was_done(site):
    site.post(id="a", **ROWS)
    site.post(id="b", forget=[{"question": "refuse"}])
    shown = site.client.get("/metrics").text
    assert "pmc_fast_queued 2.0" in shown
    site.drain()
    shown = site.client.get("/metrics").text
    for line in (
        "pmc_fast_queued 0.0", 'pmc_fast_requests_total{state="done"} 1.0', 'pmc_fast_requests_total{state="failed"} 1.0',
        "pmc_fast_missed_gates_total 1.0", 'pmc_fast_seconds_total{part="unlearn: unlearning"} 1.5',
    ):  # fmt: skip
        assert line in shown
    assert SECRET not in shown


def test_it_listens_on_this_machine_alone_and_stops(site, capfd):
    def fails(*args):
        raise KeyError(SECRET)

    with http_server.listening("127.0.0.1:0", site.client.app) as url:
        with (
            pytest.raises(PMCError, match="can't be listened on"),
            http_server.listening(url.removeprefix("http://"), None),
        ):
            pass
        assert httpx.post(f"{url}/requests", json={"id": "a", **ROWS}, headers=AUTH).status_code == 202
        assert httpx.get(f"{url}/requests/a", headers=AUTH).json()["state"] == "queued"
        assert httpx.get(f"{url}/requests/a").status_code == 401
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(http_server, "_parts", fails)
            assert httpx.post(f"{url}/requests", json=ROWS, headers=AUTH).status_code == 500
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/requests/a", headers=AUTH)
    written = capfd.readouterr()
    assert SECRET not in written.out + written.err
    assert TOKEN not in written.out + written.err


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0.0.0.0:8000", "would cross the network unencrypted"),
        ("192.168.1.1:80", "would cross the network unencrypted"),
        ("8000", "must be an address and a port"),
        ("127.0.0.1:x", "must be an address and a port"),
        ("127.0.0.1:99999", "can't be listened on"),
    ],
)
def test_addresses_that_are_refused(address, message):
    with pytest.raises(PMCError, match=message):
        http_server.bound(address)


def test_no_token_no_worker(tmp_path, monkeypatch):
    monkeypatch.delenv(http_server.TOKEN, raising=False)
    with pytest.raises(PMCError, match="token is not given: set PMC_FAST_TOKEN"):
        http_server.read_token("")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(PMCError, match="token is not given"):
        http_server.read_token(str(tmp_path / "empty"))
    with pytest.raises(PMCError, match="can't be read"):
        http_server.read_token(str(tmp_path / "none"))
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert http_server.read_token(str(tmp_path / "token")) == TOKEN
    monkeypatch.setenv(http_server.TOKEN, "x")
    assert http_server.read_token("") == "x"


def test_many_clients_at_once_lose_nothing_and_repeat_nothing(site):
    """Eight threads send the same twenty ids while a worker answers."""
    answers: list[tuple[str, int]] = []

    def send():
        answers.extend((f"r{n}", site.post(id=f"r{n}", **ROWS).status_code) for n in range(20))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        site.drain()
    site.drain()
    assert sorted(site.worker.trained) == sorted(f"r{n}" for n in range(20))
    assert {code for _, code in answers} <= {200, 202}
    assert all(site.spool.state(f"r{n}")["state"] == "done" for n in range(20))
    assert texts(site.spool.directory) == []
