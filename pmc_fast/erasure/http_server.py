"""A worker's spool over HTTP: requests are written into it, and states read from it. No answer and no log has a text."""

import asyncio
import hmac
import ipaddress
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data import rows_of
from ..data.loading import strict_object
from ..errors import PMCError
from .serve import Counts
from .spool import PARTS, SETS, VERIFICATION, OtherContentError, Spool, check_id
from .stack import RECORD

TOKEN = "PMC_FAST_TOKEN"  # environment variable
MOST_BYTES = 8 << 20  # of a request's body
MOST_ROWS = 20_000  # of all sets of a request
SECONDS = 30.0  # for a body to arrive
CONNECTIONS = 64
FIELDS = ("id", *SETS, *PARTS)

Check = Callable[[dict[str, Any], dict[str, Any]], Any]  # of settings and verify


def read_token(file: str) -> str:
    """Return the token of a file, or else of the environment.

    Raises
    ------
    PMCError
        There is none: a worker that everybody can reach is not started.
    """
    try:
        token = Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get(TOKEN, "").strip()
    except (OSError, ValueError) as error:
        raise PMCError(f"token file {file} can't be read: {getattr(error, 'strerror', None) or 'no text'}") from error
    if not token or not token.isascii():
        raise PMCError(
            f"token is {'not ASCII' if token else 'not given'}: set {TOKEN} or name a file with --token-file"
        )
    return token


def bound(address: str) -> socket.socket:
    """Return a socket that is bound to HOST:PORT of this machine alone; port 0 is a free one."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        here = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        number = int(port)
    except ValueError as error:
        raise PMCError(f"http is {address!r}: it must be an address and a port, such as 127.0.0.1:8000") from error
    if not here.is_loopback:
        raise PMCError(
            f"http is {address!r}: the token and the texts would cross the network unencrypted; listen on 127.0.0.1, and let "
            "a proxy with TLS stand before it"
        )
    made = socket.socket(socket.AF_INET6 if here.version == 6 else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((str(here), number))
        made.listen()  # refused where another program listens already
    except (OSError, OverflowError) as error:
        made.close()
        raise PMCError(f"http {address} can't be listened on: {getattr(error, 'strerror', None) or error}") from error
    return made


@contextmanager
def listening(address: str, app: Any) -> Iterator[str]:
    """Serve `app` in a thread; yield its URL."""
    import uvicorn

    with bound(address) as made:
        config = uvicorn.Config(
            app, log_level="critical", access_log=False, server_header=False, limit_concurrency=CONNECTIONS, lifespan="off",
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [made]}, daemon=True)
        host, port = made.getsockname()[:2]
        thread.start()
        try:
            yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def application(
    spool: Spool,
    token: str,
    counts: Counts,
    check: Check,
    *,
    most_bytes: int = MOST_BYTES,
    most_rows: int = MOST_ROWS,
) -> Any:
    """Return the ASGI application: POST /requests, GET /requests/ID, GET /metrics.

    Parameters
    ----------
    spool : Spool
    token : str
        Every call has it: ``Authorization: Bearer TOKEN``.
    counts : Counts
        Shown by /metrics.
    check : callable
        Refuses settings before a request is queued.
    most_bytes, most_rows : int
        Larger requests are refused: 413, 422.

    Raises
    ------
    PMCError
        fastapi, uvicorn or prometheus_client is missing.
    """
    try:
        import fastapi
        import prometheus_client
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise PMCError("http needs fastapi, uvicorn and prometheus_client: pip install 'pmc_fast[serve]'") from error
    from fastapi.responses import JSONResponse, Response

    metrics = prometheus_client.CollectorRegistry()
    prometheus_client.ProcessCollector(registry=metrics)
    metrics.register(_Metrics(spool, counts))
    expected = f"Bearer {token}".encode()

    async def authorised(request: fastapi.Request) -> None:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode("utf-8", "replace"), expected):
            raise fastapi.HTTPException(401, "no or another token", {"WWW-Authenticate": "Bearer"})

    app = fastapi.FastAPI(
        title="pmc_fast", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[fastapi.Depends(authorised)]
    )

    async def refused(request: fastapi.Request, error: Exception) -> Response:
        return JSONResponse({"error": "unexpected error"}, 500)  # without its text, which may hold a row

    app.add_exception_handler(Exception, refused)

    async def post(request: fastapi.Request) -> Response:
        try:
            body = await asyncio.wait_for(_body(request, most_bytes), SECONDS)
        except TimeoutError:
            return JSONResponse({"error": f"the request did not arrive within {SECONDS:g} s"}, 408)
        if body is None:
            return JSONResponse({"error": f"the request is larger than {most_bytes} bytes"}, 413)
        return JSONResponse(*await asyncio.to_thread(_submitted, spool, body, check, most_rows))

    def get(id: str) -> Response:
        try:
            state = spool.state(id)
        except PMCError:
            state = None
        if state is None:
            return JSONResponse({"error": "no such request"}, 404)
        if (result := spool.result(id)) is not None:
            state |= {"result": {k: v for k, v in result.items() if k not in ("id", "salt", "content")}}
            for name in (RECORD, VERIFICATION):
                if (file := spool.place("done", id) / name).exists():
                    state[name.removesuffix(".json")] = json.loads(file.read_text(encoding="utf-8"))
        return JSONResponse(state)

    def show() -> Response:
        return Response(prometheus_client.generate_latest(metrics), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    app.add_api_route("/requests", post, methods=["POST"])
    app.add_api_route("/requests/{id}", get, methods=["GET"])
    app.add_api_route("/metrics", show, methods=["GET"])
    return app


async def _body(request: Any, most: int) -> bytes | None:
    """Return a request's body, or None as soon as it is too large."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        return None
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > most:
            return None
    return bytes(found)


def _submitted(spool: Spool, body: bytes, check: Check, most_rows: int) -> tuple[dict[str, Any], int]:
    """Queue the request of a body; return the answer and its status."""
    try:
        content = json.loads(body, object_pairs_hook=strict_object)
    except (ValueError, RecursionError):
        return {"error": "the request is not JSON"}, 422
    try:
        id, sets, settings, verify = _parts(content, most_rows)
        check(settings, verify)
    except PMCError as error:
        return {"error": str(error)}, 422
    try:
        new = spool.submit(id, sets, settings, verify)
    except OtherContentError as error:
        return {"error": str(error)}, 409
    except PMCError as error:
        return {"error": str(error)}, 507
    return spool.state(id) or {"id": id, "state": "queued"}, 202 if new else 200


def _parts(content: Any, most_rows: int) -> tuple[str, dict[str, list[Any]], dict[str, Any], dict[str, Any]]:
    """Return the id, sets, settings and verify of a request's content, or refuse it without a word of it."""
    if not isinstance(content, Mapping) or set(content) - set(FIELDS):
        raise PMCError(f"the request must be an object with some of {', '.join(FIELDS)}, and nothing else")
    sets = {name: content[name] for name in SETS if name in content}
    if not sets.get("forget"):
        raise PMCError("forget is not given: it is a list of rows with questions")
    for name, rows in sets.items():
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise PMCError(f"{name} must be a list of objects")
    if (count := sum(map(len, sets.values()))) > most_rows:
        raise PMCError(f"the request has {count} rows: at most {most_rows} are taken")
    for name, rows in sets.items():
        rows_of(rows, name, answers=name == "retain", paraphrased=name == "paraphrased")
    settings, verify = (content.get(part, {}) for part in PARTS)
    if not isinstance(settings, dict) or not isinstance(verify, dict):
        raise PMCError(f"{' and '.join(PARTS)} must be objects")
    if given := sorted(set(settings) & set(SETS)):
        raise PMCError(f"{given[0]} is a list of rows beside settings")
    id = content.get("id", secrets.token_hex(16))
    if not isinstance(id, str):
        raise PMCError("id must be a string")
    check_id(id)
    return id, sets, settings, verify


class _Metrics:
    """What Prometheus reads: the queue, and what was done since the worker started."""

    def __init__(self, spool: Spool, counts: Counts) -> None:
        self._spool, self._counts = spool, counts

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily("pmc_fast_queued", "requests that wait", value=len(self._spool.queued()))
        running = sum(1 for _ in (self._spool.directory / "running").iterdir())
        yield GaugeMetricFamily("pmc_fast_running", "requests that are being answered", value=running)
        done = CounterMetricFamily("pmc_fast_requests", "requests since the worker started", labels=["state"])
        for state, count in (("done", self._counts.done), ("failed", self._counts.failed)):
            done.add_metric([state], count)
        yield done
        yield CounterMetricFamily(
            "pmc_fast_missed_gates", "requests done that missed a gate", value=self._counts.missed
        )
        seconds = CounterMetricFamily("pmc_fast_seconds", "seconds of requests that are done", labels=["part"])
        for part, spent in sorted(self._counts.seconds.copy().items()):
            seconds.add_metric([part], spent)
        yield seconds
