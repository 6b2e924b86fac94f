"""A worker: requests to one model, one after the other, without loading it again."""

import dataclasses
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from ..config import RequestConfig, VerifyConfig
from ..errors import PMCError
from ..jobs.memory import Choice
from ..jobs.progress import Monitor, Silent, Stages
from ..models import loading
from ..utils.malloc import trim
from .stack import RECORD, ROLLED_BACK, Stack, checkpoints_of, locked
from .stacked import StackedModel
from .unlearn import StackedAdapter, check_possible, unlearn_next
from .verify import verify

# settings that are the worker's: what it keeps in memory, where it reads and writes, what goes into logs
FIXED = (
    "model", "device", "dtype", "param_dtype", "lora", "stack", "output", "save_dtype", "log_text", "profile",
)  # fmt: skip


class Worker:
    """Keeps a model, its rollout engine and its captures in memory, and answers erasure requests to it.

    An answer is that of `pmc-fast unlearn --lora` with the same data, settings and stack, bit for bit. The stack is locked
    for as long as the worker lives.

    Parameters
    ----------
    config : RequestConfig
        Model and stack are required. All other settings are what requests begin with.
    monitor : Monitor, optional
        Shows stages, steps and warnings; none of them holds a text of the data.

    Raises
    ------
    PMCError
        The stack is damaged or in use, peft is missing, or the settings are not those of requests (lora).

    Examples
    --------
    >>> with Worker(RequestConfig.merge("request", {"lora": True, "model": MODEL, "stack": STACK})) as worker:
    ...     report = worker.unlearn(forget="request1.jsonl", retain="keep.jsonl")
    ...     found = worker.verify(requests=["request1.jsonl"], attack_samples=10)
    """

    def __init__(self, config: RequestConfig, monitor: Monitor | None = None) -> None:
        if not config.lora:
            raise PMCError("lora is False: a worker answers requests with adapters; set lora and stack")
        if not config.model:
            raise PMCError("model is not given: a worker keeps one in memory")
        check_possible()
        self.config, self.monitor = config, monitor
        self._stacked = StackedModel()
        self._open = ExitStack()
        self._open.enter_context(locked(config.stack))
        with ExitStack() as undone:
            undone.push(self._open)
            Stack(config.stack)
            undone.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the memory and the stack."""
        self._stacked.drop()
        self._open.close()

    def load(self) -> None:
        """Load and check the model, and bring it to the stack's state now, instead of with the first request."""
        target = StackedAdapter(self.config, self._stacked)
        c, stages = target.config, Stages(self.monitor or Silent())
        self._stacked.require(target.stack, c.dtype, c.param_dtype)
        loaded = self._stacked.held.load(c.model, c.device, c.dtype, c.param_dtype, stages)
        with stages("stacking"):
            self._stacked.follow(target.stack, c.model)
            self._stacked.attach(c, len(target.stack.requests) + 1)
            self._stacked.training = False  # nothing was trained
        with stages("checking the model"):
            engine, packed = self._stacked.held.passes(Choice.of(c, loaded.model.device.type))
            engine.check()
            packed.check(model=loaded.model)

    def request(self, **settings: Any) -> RequestConfig:
        """Return the worker's settings with others for one request.

        Raises
        ------
        PMCError
            A setting is unknown, out of range, or the worker's own.
        """
        for name in FIXED:
            if name in settings and settings[name] != getattr(self.config, name):
                raise PMCError(f"{name} is the worker's: leave it out of the request")
        return RequestConfig.merge(None, vars(self.config), settings)

    def unlearn(self, name: str = "", **settings: Any) -> dict[str, Any]:
        """Train the next adapter of the stack; see `pmc_fast.erasure.unlearn.unlearn_request`.

        Parameters
        ----------
        name : str
            Of the request, for its record (``name``); see `find`.
        **settings
            As of `request`, forget and retain among them.
        """
        target = StackedAdapter(self.request(**settings), self._stacked, **({"name": name} if name else {}))
        self._stacked.require(target.stack, target.config.dtype, target.config.param_dtype)
        try:
            return unlearn_next(target, self.monitor)
        finally:
            trim()  # between requests others may use the memory

    def verify(self, **settings: Any) -> dict[str, Any]:
        """Ask the stack's requests again, with the model in memory; see `pmc_fast.erasure.verify.verify`.

        Parameters
        ----------
        **settings
            Those of `VerifyConfig`, but for stack, model and device.
        """
        own = {"stack": self.config.stack, "model": self.config.model, "device": self.config.device}
        if given := own.keys() & settings.keys():
            raise PMCError(f"{min(given)} is the worker's: leave it out of the verification")
        unknown = sorted(settings.keys() - {f.name for f in dataclasses.fields(VerifyConfig)})
        if unknown:
            raise PMCError(f"setting {unknown[0]!r} is unknown: `pmc-fast verify --help` lists them")
        return verify(VerifyConfig(**settings | own), self.monitor, self._stacked)

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the record of the request in the stack that was answered under a name, if any.

        Raises
        ------
        PMCError
            It was answered and rolled back since.
        """
        stack = Path(self.config.stack)
        answered = sorted(stack.glob(f"[0-9]*/{RECORD}"), reverse=True)  # it is asked for as soon as it is there
        for path in (*answered, *stack.glob(f"{ROLLED_BACK}/*/{RECORD}")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("name") == name:
                if path.parent.parent != stack:
                    raise PMCError(f"request {name} was answered as {record['request']}, and that was rolled back")
                return record
        return None

    def tidy(self, record: dict[str, Any]) -> None:
        """Remove what a kill after a request's last rename leaves: checkpoints, which hold initial answers."""
        shutil.rmtree(checkpoints_of(Path(self.config.stack), record["model"]["before"]), ignore_errors=True)

    def check_device(self) -> None:
        """Refuse to go on where the device computes no more: after some errors no call in a process does."""
        device = loading.resolve_device(self.config.device)
        try:
            torch.zeros(1, device=device).item()
        except RuntimeError as error:
            raise PMCError(f"device {device} does not compute any more: start the worker again") from error
