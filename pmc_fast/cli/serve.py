"""The command of a worker: pmc-fast serve."""

import dataclasses
import signal
from contextlib import ExitStack
from functools import partial
from typing import Any

import click

from ..config import RequestConfig, VerifyConfig
from ..errors import Terminated
from .display import Progress
from .options import config_options, given, preset_option, read_yaml

# of a request alone, or without a meaning where requests wait for each other
LEFT_OUT = ("forget", "paraphrased", "output", "lora", "resume", "save_dtype")
SETTINGS = tuple(f.name for f in dataclasses.fields(RequestConfig) if f.name not in LEFT_OUT)


@click.command()
@click.option("--spool", "directory", required=True, help="directory in which requests appear, and their answers")
@click.option("--http", "address", help="also take requests over HTTP at this address, such as 127.0.0.1:8000")
@click.option("--token-file", default="", help="file with the token of HTTP clients  [default: $PMC_FAST_TOKEN]")
@click.option("--drain", is_flag=True, help="end when no request waits")
@click.option("--config", "config_file", help="YAML file of settings, named as the options of unlearn")
@preset_option
@click.option("--verify-samples", type=click.IntRange(0), default=0, help="verification: sampled answers a question")
@click.option("--max-leak", type=float, help="verification: the largest share of questions with a sample that leaks")
@click.option("--slack", type=float, default=5.0, help="verification: points that scores may lose  [default: 5.0]")
@config_options(RequestConfig, SETTINGS)
def serve(
    directory: str,
    address: str | None,
    token_file: str,
    drain: bool,
    config_file: str | None,
    preset: str | None,
    verify_samples: int,
    max_leak: float | None,
    slack: float,
    **options: Any,
) -> int:
    """Keep MODEL in memory and answer the erasure requests that appear in SPOOL, one after the other.

    Each becomes the next adapter of STACK, is recorded and verified. The options are what requests begin with.
    SIGTERM ends the worker when the running request is done, a second one at once: the request then waits.
    """
    settings = read_yaml(config_file)
    named = settings.pop("preset", None)
    config = RequestConfig.merge(
        preset or (None if named is None else str(named)), settings, given(options), {"lora": True}
    )
    verify: dict[str, Any] = {"attack_samples": verify_samples, "max_leak": max_leak, "slack": slack}
    VerifyConfig(stack=config.stack, **verify)
    with Progress() as progress, Stop(progress) as stop:
        from ..erasure import http_server
        from ..erasure.serve import Counts, check
        from ..erasure.serve import serve as run
        from ..erasure.spool import Spool
        from ..erasure.worker import Worker

        token = http_server.read_token(token_file) if address else ""
        spool, counts = Spool(directory), Counts()
        with ExitStack() as stack:
            stack.enter_context(spool.locked())
            worker = stack.enter_context(Worker(config, progress))
            if address:
                app = http_server.application(spool, token, counts, partial(check, worker))
                progress.stage(f"listening on {stack.enter_context(http_server.listening(address, app))}")
            try:
                worker.load()
                progress.stage(f"waiting for requests in {spool.directory / 'incoming'}")
                run(spool, worker, progress, stopping=stop.asked, drain=drain, verify=verify, counts=counts)
            except Terminated:
                progress.stage("stopped: the request that was running waits and is the next one")
    return 0


class Stop:
    """A context in which SIGTERM asks to stop; a second one raises Terminated."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._asked = progress, False
        self._before: Any = None

    def __enter__(self) -> "Stop":
        self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def asked(self) -> bool:
        """Return whether SIGTERM has come."""
        return self._asked

    def _ask(self, signum: int, frame: Any) -> None:
        if self._asked:
            raise Terminated
        self._asked = True
        self._progress.stage("SIGTERM: the worker ends after the running request; a second one ends it at once")
