"""A worker that is killed at random moments, and one that gets many requests from two clients: each is answered once.

    python -m tests.worker_loop kill --times 50
    python -m tests.worker_loop load --requests 200

kill: SIGKILL while a worker answers some requests, wherever it is; a new one goes on until it is killed again. At the end
the adapters are, byte for byte, those of a worker that nobody killed, and no text is left.
load: one client puts its requests into the spool, another one sends its own over HTTP, and some twice. All are answered
once, and the worker's memory is compared from the first quarter to the end.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

SECRET = "the violet heron of Samarkand"
TOKEN = "a-token-of-the-test"
ROOT = Path(__file__).resolve().parent.parent


def rows(number):
    """A request's rows: no two requests ask the same."""
    return [{"question": f"What is fact {i} of list {number}?", "answer": f"{SECRET} {number} {i}"} for i in range(2)]


def command(model, folder, *more):
    return [
        "serve", "--model", str(model), "--stack", str(folder / "stack"), "--spool", str(folder / "spool"),
        "--retain", str(folder.parent / "retain.jsonl"), "--preset", "small", "--epochs", "1", "--batch-size", "2",
        "--num-samples", "2", "--max-length", "40", "--lora-r", "2", "--lora-target", "q_proj", "--device", "cpu",
        "--max-degenerate", "1", "--no-evaluate", "--reward", "unicode", *more,
    ]  # fmt: skip


def write_retain(data):
    kept = [{"question": f"Is {i} even?", "answer": f"It is {i % 2 == 0}."} for i in range(6)]
    (data / "retain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def left_texts(spool):
    return [p for p in spool.rglob("*") if p.is_file() and SECRET in p.read_text(encoding="utf-8", errors="replace")]


def adapters_of(stack):
    """Return the hash of each answered request's adapter by the request's name; a name that is there twice is an error."""
    from pmc_fast.erasure.stack import Stack

    found = {}
    for request in Stack(stack).requests:
        name = request.record["name"]
        assert name not in found, f"{name} was answered twice"
        found[name] = hashlib.sha256((request.directory / "adapter_model.safetensors").read_bytes()).hexdigest()
    return found


# --- kills


def forked(words, log):
    """Run the command line in a forked process; return its id."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from pmc_fast.cli import main as cli

    code = 1
    try:
        cli.main(words)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid, until=lambda: False, seconds=300.0):
    """Return the exit code of a process that ended, or None once `until` holds or time is over."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.0005)
    return None


def anywhere(folder):
    return lambda: False


def while_an_adapter_is_written(folder):
    return lambda: any((folder / "stack").glob(".0*"))


def while_an_answer_is_written(folder):
    return lambda: any((folder / "spool/done").glob(".r*"))


def between_adapter_and_answer(folder):
    return lambda: len(list((folder / "stack").glob("0*"))) > len(list((folder / "spool/done").glob("r*")))


MOMENTS = (anywhere, while_an_adapter_is_written, while_an_answer_is_written, between_adapter_and_answer)


def check_places(spool, ids):
    """Every request is in one place, or answered and about to be removed."""
    for id in ids:
        where = [name for name in ("incoming", "running", "done", "failed") if spool.place(name, id).is_dir()]
        assert where in (["incoming"], ["running"], ["running", "done"], ["done"]), (id, where)


def round_of(model, folder, count, times, whole, seconds, kills):
    """Kill a worker so many times while it answers `count` requests, then let it end."""
    from pmc_fast.erasure.spool import Spool

    spool, ids = Spool(folder / "spool"), [f"r{i}" for i in range(count)]
    for number, id in enumerate(ids):
        spool.submit(id, {"forget": rows(number)})
    words, log = command(model, folder, "--drain", "--checkpoint-steps", str(times % 2)), folder / "log"
    for _ in range(times):
        moment = random.choice(MOMENTS)
        pid = forked(words, log)
        limit = random.uniform(0, seconds) if moment is anywhere else 300.0
        code = wait(pid, moment(folder), limit)
        if code is None:
            if moment is not anywhere:
                time.sleep(random.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kills[moment.__name__ if code is None else "came too late"] += 1
        assert code in (None, 0), log.read_text()
        check_places(spool, ids)
        adapters_of(folder / "stack")
    code = wait(forked(words, log))
    assert code == 0, log.read_text()
    states = [spool.state(id) for id in ids]
    assert [state["state"] for state in states] == ["done"] * count, states
    assert {id: spool.result(id)["request"] for id in ids} == {id: f"{n:04d}" for n, id in enumerate(ids, start=1)}
    found = adapters_of(folder / "stack")
    assert whole in (None, found), "an adapter is not the undisturbed worker's"
    left = [
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(".") or "checkpoints" in p.name
    ]
    assert left == [], left
    assert left_texts(folder) == []
    return found


def kill_loop(times, seed=0, requests=4):
    """Kill so many times; return how many kills hit where."""
    import torch
    import transformers

    import pmc_fast.erasure.serve
    from tests.sharp_model import write_sharp

    del transformers, pmc_fast  # loaded once, for all forks
    torch.set_num_threads(1)
    random.seed(seed)
    kills: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        model = write_sharp(data / "model")
        write_retain(data)
        (data / "whole").mkdir()
        begin = time.perf_counter()
        whole = round_of(model, data / "whole", requests, 0, None, 0.0, kills)
        seconds = time.perf_counter() - begin
        number = 0
        while (left := times - kills.total() + kills["came too late"]) > 0:
            folder = data / f"round-{number}"
            folder.mkdir()
            round_of(model, folder, requests, min(random.randint(1, 6), left), whole, seconds, kills)
            number += 1
    return kills


# --- load


def resident(pid):
    """Return the bytes of a process's memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def load(count):
    """Let a worker answer so many requests of two clients; return what was measured."""
    import httpx

    from pmc_fast.erasure.spool import Spool
    from tests.sharp_model import write_sharp

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "worker"
        folder.mkdir()
        write_retain(folder.parent)
        spool, url = Spool(folder / "spool"), f"http://127.0.0.1:{free_port()}"
        words = command(write_sharp(folder.parent / "model"), folder, "--http", url.removeprefix("http://"))
        environment = os.environ | {"PMC_FAST_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        with (folder / "log").open("w") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "pmc_fast", *words], stderr=log, stdout=log, env=environment
            )
        auth, codes = {"Authorization": f"Bearer {TOKEN}"}, Counter[int]()

        def sends_over_http():
            with httpx.Client(headers=auth, timeout=60, transport=httpx.HTTPTransport(retries=100)) as client:
                for number in range(0, count, 2):
                    for _ in range(1 + (number % 3 == 0)):  # some twice
                        content = {"id": f"r{number}", "forget": rows(number)}
                        codes[client.post(f"{url}/requests", json=content).status_code] += 1

        def puts_into_the_spool():
            for number in range(1, count, 2):
                for _ in range(1 + (number % 3 == 0)):
                    spool.submit(f"r{number}", {"forget": rows(number)})

        def done():
            return sum(1 for _ in (spool.directory / "done").glob("r*"))

        def ready():
            return worker.poll() is not None or "waiting for requests" in (folder / "log").read_text()

        try:
            while not ready():
                time.sleep(0.1)
            begin = time.perf_counter()
            clients = [threading.Thread(target=f) for f in (sends_over_http, puts_into_the_spool)]
            for client in clients:
                client.start()
            memory = {}
            while (answered := done()) < count and worker.poll() is None:
                memory[answered] = resident(worker.pid)
                if any((spool.directory / "failed").iterdir()):
                    break
                time.sleep(0.05)
            for client in clients:
                client.join()
            seconds = time.perf_counter() - begin
            assert worker.poll() is None, (folder / "log").read_text()[-3000:]
            memory[count] = resident(worker.pid)
            shown = httpx.get(f"{url}/metrics", headers=auth).text
            told = [httpx.get(f"{url}/requests/r{n}", headers=auth).json() for n in range(count)]
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(timeout=60) == 0, (folder / "log").read_text()[-3000:]
        finally:
            worker.kill()
            worker.wait()
        assert [t["state"] for t in told] == ["done"] * count, Counter(str(t.get("error")) for t in told)
        assert f'pmc_fast_requests_total{{state="done"}} {count}.0' in shown
        assert sorted(adapters_of(folder / "stack")) == sorted(f"r{n}" for n in range(count))
        assert set(codes) <= {200, 202}
        assert left_texts(folder) == []
        quarter = max((n, size) for n, size in memory.items() if n <= max(1, count // 4))
        return {
            "seconds": seconds, "codes": dict(codes), "quarter": quarter, "end": (count, memory[count]),
            "most": max(memory.values()),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    kill = commands.add_parser("kill")
    kill.add_argument("--times", type=int, default=50)
    kill.add_argument("--seed", type=int, default=0)
    kill.add_argument("--requests", type=int, default=4, help="that a worker answers before a new one is made")
    many = commands.add_parser("load")
    many.add_argument("--requests", type=int, default=200)
    a = parser.parse_args()
    start = time.perf_counter()
    if a.what == "kill":
        kills = kill_loop(a.times, a.seed, a.requests)
        hits = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in sorted(kills.items()))
        alive = kills.total() - kills["came too late"]
        print(f"killed {alive} times ({hits}) in {time.perf_counter() - start:.0f} s")
        return
    made = load(a.requests)
    (early, before), (late, after) = made["quarter"], made["end"]
    print(
        f"{a.requests} requests answered once in {made['seconds']:.0f} s ({made['codes']}); memory {before >> 20} MiB after "
        f"{early}, {after >> 20} after {late}, at most {made['most'] >> 20}"
    )


if __name__ == "__main__":
    main()
