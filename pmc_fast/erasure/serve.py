"""A worker's loop: takes requests from a spool, answers and verifies them, until it is told to stop."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import RequestConfig, VerifyConfig
from ..errors import PMCError
from ..jobs.progress import Monitor
from ..utils.text import printable
from .spool import VERIFICATION, Spool, SpooledRequest, read_request
from .stack import RECORD
from .worker import Worker

POLL = 0.2  # seconds between looks at an empty spool
# settings that a request can't have: paths on the worker's machine, and what its operator answers for
WITHHELD = (
    "general", "side_effects_text", "resume", "checkpoint_steps", "evaluate", "allow_control_tokens", "report_to",
)  # fmt: skip
VERIFIED = ("min_quality", "min_utility", "slack", "attack_samples", "max_leak")  # settings of a verification


@dataclass(slots=True)
class Counts:
    """What a worker did since it started."""

    done: int = 0
    failed: int = 0
    missed: int = 0  # done, but a gate was missed
    seconds: dict[str, float] = field(default_factory=dict)  # in all, by part


def serve(
    spool: Spool,
    worker: Worker,
    monitor: Monitor,
    *,
    stopping: Callable[[], bool] = lambda: False,
    drain: bool = False,
    verify: dict[str, Any] | None = None,
    counts: Counts | None = None,
) -> None:
    """Answer the requests of a locked spool one after the other.

    Parameters
    ----------
    spool : Spool
    worker : Worker
    monitor : Monitor
        Shows which request begins and how it ended.
    stopping : callable
        Asked between requests: True ends the loop.
    drain : bool
        End when no request waits.
    verify : dict, optional
        Settings of verifications, which a request's own replace.
    counts : Counts, optional
        Counted up.

    Notes
    -----
    Whatever ends a request from outside (Terminated, KeyboardInterrupt) leaves it first in the queue. A request whose
    adapter is in the stack already, since a worker was killed after that, is only verified.
    """
    counts = counts or Counts()
    spool.recover()
    while not stopping():
        for name in spool.odd_names():
            monitor.warn(f"{name!r} in {spool.directory / 'incoming'} is no request's directory and is left alone")
        request = spool.take()
        if request is not None:
            _answer(spool, worker, request, monitor, verify or {}, counts)
        elif drain:
            return
        else:
            time.sleep(POLL)


def _answer(
    spool: Spool, worker: Worker, request: SpooledRequest, monitor: Monitor, verify: dict[str, Any], counts: Counts
) -> None:
    monitor.stage(f"request {request.id}")
    try:
        result, files = answer(worker, request, verify)
    except PMCError as error:
        why = str(error)
    except Exception as error:  # ours, or a library's: its text may hold a row
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}, which is no refusal: report it"
    except BaseException:
        spool.put_back(request)
        raise
    else:
        spool.finish(request, result, files)
        counts.done += 1
        counts.missed += bool(result["failed_gates"])
        for part, seconds in result["seconds"].items():
            counts.seconds[part] = counts.seconds.get(part, 0.0) + seconds
        monitor.stage(f"request {request.id}: done in {result['seconds']['all']:.1f} s")
        for missed in result["failed_gates"]:
            monitor.warn(f"request {request.id}: gate missed: {missed}")
        return
    spool.fail(request, why)
    counts.failed += 1
    monitor.warn(f"request {request.id} failed: {why}")
    worker.check_device()


def answer(worker: Worker, request: SpooledRequest, verify: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Unlearn and verify a request; return its result, and the content of its answer's other files.

    ``seconds`` has those of each stage; ``waited``, the time before the first; and ``all``, since the request arrived.
    """
    seconds = {"waited": time.time() - request.arrived}
    settings, own = read_request(request)
    settings = check(worker, settings, own)
    record = worker.find(request.id)
    if record is None:
        # an earlier start that was killed may have left a checkpoint
        resume = {"resume": "auto"} if worker.config.checkpoint_steps else {}
        made = worker.unlearn(request.id, **settings, **resume)
        record = worker.find(request.id)
        if record is None:  # every question is known to be forgotten
            seconds["all"] = time.time() - request.arrived
            known = {"request": None, "failed_gates": [], "known_forgotten": made["known_forgotten"]}
            return known | {"seconds": seconds}, {}
        seconds |= _parts("unlearn", made["stage_seconds"])
    else:
        worker.tidy(record)
    files = [settings[name] for name in ("forget", "paraphrased") if name in settings]
    retain = {"retain": settings["retain"]} if "retain" in settings else {}
    try:
        verified = worker.verify(requests=files, **retain, **verify | own)
    except PMCError as error:
        raise PMCError(
            f"its adapter is {record['request']} in the stack, but it was not verified: {error}"
        ) from error
    seconds |= _parts("verify", verified["stage_seconds"])
    seconds["all"] = time.time() - request.arrived
    result = {
        "request": record["request"],
        "weights": verified["weights"],
        "failed_gates": [*record["failed_gates"], *verified["failed_gates"]],
        "seconds": seconds,
    }
    return result, {RECORD: json.dumps(record, indent=1), VERIFICATION: json.dumps(verified, indent=1)}


def _parts(what: str, stages: dict[str, float]) -> dict[str, float]:
    """Return seconds by names that are the same for all requests: what is counted of them must stay small."""
    found: dict[str, float] = {}
    for name, seconds in stages.items():
        part = f"{what}: {'requests' if name.startswith('request ') else name}"
        found[part] = found.get(part, 0.0) + seconds
    return found


def check(worker: Worker, settings: dict[str, Any], verify: dict[str, Any]) -> dict[str, Any]:
    """Return a request's settings by the names of their fields.

    Raises
    ------
    PMCError
        One of them, or of the verification's, is unknown, out of range or not the request's to set.
    """
    settings = RequestConfig.by_field(settings, "the request")
    if own := sorted(set(settings) & set(WITHHELD)):
        raise PMCError(f"{own[0]} is the worker's: leave it out of the request")
    worker.request(**settings)
    if unknown := sorted(set(verify) - set(VERIFIED)):
        raise PMCError(f"verify has {printable(unknown[0])}: use {', '.join(VERIFIED)}")
    VerifyConfig(stack=worker.config.stack, **verify)
    return settings
