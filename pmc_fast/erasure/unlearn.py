"""An erasure request: an adapter trained on the frozen model and all earlier adapters, and its record."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..config import RequestConfig
from ..distributed import launched
from ..errors import PMCError
from ..evaluation import FORGET_SETS
from ..jobs import earlier_runs, unlearn
from ..jobs.plan import Plan
from ..jobs.progress import Monitor, Stages
from ..models import loading
from ..utils.files import file_sha256, sync, written_aside
from . import adapters, record
from .stack import PRIVATE, RECORD, Stack, checkpoints_of, locked
from .stacked import StackedModel, attached


def unlearn_request(config: RequestConfig, monitor: Monitor | None = None) -> dict[str, Any]:
    """Train the next adapter of `config.stack`; see `jobs.unlearn.unlearn`.

    Returns
    -------
    dict
        What report.json holds, and ``request``: the directory that was written.

    Raises
    ------
    PMCError
        As `jobs.unlearn.unlearn`; also a stack that is in use, damaged or of another model, and a missing peft.
    """
    check_possible()
    with locked(config.stack):
        return unlearn_next(StackedAdapter(config), monitor)


def unlearn_next(target: "StackedAdapter", monitor: Monitor | None = None) -> dict[str, Any]:
    """Train and write a target, whose stack is locked; see `unlearn_request`."""
    report = unlearn.unlearn(target.config, monitor, target, target.stacked.held)
    target.stacked.training = False
    return report | {"request": str(target.directory)}


def check_request(config: RequestConfig) -> Plan:
    """Check a request as `jobs.unlearn.check` does, and its stack; write nothing."""
    check_possible()
    target = StackedAdapter(config)
    return unlearn.check(target.config, target, target.stacked.held)


def _param_dtype(config: RequestConfig, stack: Stack) -> loading.ParamDtype:
    """Return the dtype of the frozen parameters: that of the earlier requests, which were measured with it."""
    made = stack.param_dtype
    if made == "bfloat16" and config.dtype == "float32":
        raise PMCError(
            f"dtype is 'float32' but the requests in {stack.directory} were made with bfloat16 parameters, which compute in "
            "bfloat16: leave --dtype out"
        )
    if made and config.param_dtype not in ("auto", made):
        raise PMCError(
            f"param_dtype is {config.param_dtype!r} but the requests in {stack.directory} were made with {made}: leave it out"
        )
    return made or loading.resolve_param_dtype(
        config.param_dtype, config.dtype, loading.resolve_device(config.device), config.model
    )


def check_possible() -> None:
    """Refuse several processes, and early a missing peft."""
    if launched()[1] > 1:
        raise PMCError(f"WORLD_SIZE is {launched()[1]}: --lora runs on one process")
    adapters.check_peft()


def trained_by(config: RequestConfig) -> Callable[[Any], Any]:
    """Return what makes of a model the one that a run trains."""
    return functools.partial(attached, config, number=1) if config.lora else lambda model: model


class StackedAdapter:
    """The next adapter of a stack; see `jobs.outputs.TrainingTarget`.

    Parameters
    ----------
    config : RequestConfig
    stacked : StackedModel, optional
        The model that is trained, where somebody keeps it.
    **named
        Entries of the record beside those that every record has.
    """

    def __init__(self, config: RequestConfig, stacked: StackedModel | None = None, **named: str) -> None:
        self.stacked, self.named = stacked or StackedModel(), named
        self.stack = Stack(config.stack, self.stacked.hashes)
        # settings with the dtype of the frozen parameters
        self.config = dataclasses.replace(config, param_dtype=_param_dtype(config, self.stack))
        self.directory = self.stack.next_directory
        self.before = self.after = ""  # hashes of weights
        self.adapter: adapters.Adapter | None = None

    @property
    def destination(self) -> str:
        return self.config.stack

    @property
    def checkpoints(self) -> Path:
        """Beside the stack, a directory for each state of it: an adapter fits only what it was trained on."""
        return checkpoints_of(self.stack.directory, self.before)

    @property
    def run_name(self) -> str:
        return f"{self.stack.directory.resolve().name}-{self.directory.name}"

    def check(self) -> None:
        """Do nothing: the stack was checked when it was read."""

    def earlier(self) -> list[dict[str, Any]]:
        return self.stack.earlier() or earlier_runs.read(self.config.model)

    def recorded(self, earlier: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        return () if self.stack.requests else earlier  # the records before this one hold them

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        """Do nothing: an adapter is small."""

    def trained(self, model: Any) -> Any:
        return attached(self.config, model, 1)

    def claimed(self) -> AbstractContextManager[None]:
        return nullcontext()  # the whole stack is locked

    @property
    def rounds_to(self) -> None:
        return None  # adapters are float32

    def prepare(self, loaded: loading.LoadedModel, stages: Stages) -> None:
        c = self.config
        with stages("stacking"):
            self.before = self.stacked.follow(self.stack, c.model)
            self.stacked.attach(c, len(self.stack.requests) + 1)
        resume = Path(c.resume)
        if c.resume not in ("", "auto") and resume.resolve().parent != self.checkpoints:
            raise PMCError(
                f"checkpoint {resume} is not of this state of the stack, whose checkpoints are in {self.checkpoints}"
            )

    def finalize(self, model: Any, stages: Stages) -> None:
        with stages("merging"):
            self.adapter, self.after = self.stacked.absorb()

    def write(self, report: dict[str, Any], files: dict[str, bytes], plan: Plan) -> None:
        assert self.adapter is not None
        with written_aside(self.directory) as directory:
            adapters.write(self.adapter, directory, self.config.model)
            for name, content in files.items():
                (directory / name).write_bytes(content)
            if self.config.keep_private:
                record.write_private(directory / PRIVATE, {n: r for n, r in plan.rows.items() if n in FORGET_SETS})
            hashed = (adapters.WEIGHTS, adapters.CONFIG, "report.json")
            contents = record.record_of(
                report,
                request=self.directory.name,
                **self.named,
                model={"source": self.config.model, "before": self.before, "after": self.after},
                stack={"before": self.stack.last_link()},
                adapter={
                    "r": self.config.lora_r,
                    "alpha": self.config.lora_alpha,
                    "targets": self.adapter.targets,
                    "parameters": sum(f.a.numel() + f.b.numel() for f in self.adapter.factors.values()),
                },
                files={name: file_sha256(directory / name) for name in hashed},
            )
            (directory / RECORD).write_text(json.dumps(contents, indent=1), encoding="utf-8")
        sync(self.stack.directory)
