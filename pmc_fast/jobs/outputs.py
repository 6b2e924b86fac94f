"""What a run trains and writes: the whole model, or another target with the same methods."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import UnlearnConfig
from ..models import loading
from ..utils.files import check_output, claimed, written_aside
from . import earlier_runs
from .plan import Plan
from .progress import Stages

ROOM = 64 << 20  # bytes beside the weights


class TrainingTarget(Protocol):
    """What a run trains and writes; its methods are called in this order."""

    @property
    def destination(self) -> str:
        """Where the result goes, as the user wrote it."""

    @property
    def checkpoints(self) -> Path:
        """Directory of the run's checkpoints; known after `prepare`."""

    @property
    def run_name(self) -> str:
        """Name of the run where it is reported to."""

    def check(self) -> None:
        """Refuse, before any work, an output that can't be written."""

    def earlier(self) -> list[dict[str, Any]]:
        """Return an entry for each run that the model to be trained came from; see `earlier_runs.check`."""

    def recorded(self, earlier: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return those of `earlier` that the report is to hold for later runs: all that no other file holds."""

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        """Refuse a model with so many parameters, saved in `dtype` before, if the disk has no room for the output."""

    def trained(self, model: Any) -> Any:
        """Make of a model without data what `prepare` makes of the loaded one, for the plan of its memory."""

    def claimed(self) -> AbstractContextManager[None]:
        """Lock the output for this run; refuse one that another run is writing."""

    @property
    def rounds_to(self) -> torch.dtype | None:
        """The dtype that trained parameters are rounded to, or None if they are saved as they are."""

    def prepare(self, loaded: loading.LoadedModel, stages: Stages) -> None:
        """Make `loaded.model` the model that is trained."""

    def finalize(self, model: Any, stages: Stages) -> None:
        """Make of the trained model the one that is saved: it is evaluated then."""

    def write(self, report: dict[str, Any], files: dict[str, bytes], plan: Plan) -> None:
        """Write the model and the report's files, all or nothing."""


class WholeModel:
    """All weights of the model, saved into `config.output`."""

    def __init__(self, config: UnlearnConfig) -> None:
        self.config = config
        self.path, self.dtype = Path(config.output), torch.float32
        self.model: Any = None

    @property
    def destination(self) -> str:
        return self.config.output

    @property
    def checkpoints(self) -> Path:
        output = Path(self.config.output)
        return output.with_name(output.name + ".checkpoints")

    @property
    def run_name(self) -> str:
        return Path(self.config.output).resolve().name

    def check(self) -> None:
        check_output(self.config.output, 0)

    def earlier(self) -> list[dict[str, Any]]:
        return earlier_runs.read(self.config.model)

    def recorded(self, earlier: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        return earlier

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        saved = self.config.save_dtype
        self.dtype = dtype if saved == "auto" else getattr(torch, saved)
        self.path = check_output(self.config.output, parameters * self.dtype.itemsize + ROOM)

    def trained(self, model: Any) -> Any:
        return model

    def claimed(self) -> AbstractContextManager[None]:
        return claimed(self.config.output)

    @property
    def rounds_to(self) -> torch.dtype:
        return self.dtype

    def prepare(self, loaded: loading.LoadedModel, stages: Stages) -> None:
        """Do nothing: all parameters of the loaded model are trained."""

    def finalize(self, model: Any, stages: Stages) -> None:
        with torch.no_grad():  # round as saving does: what is evaluated is what is saved
            for p in model.parameters():
                p.copy_(p.to(self.dtype))
        self.model = model

    def write(self, report: dict[str, Any], files: dict[str, bytes], plan: Plan) -> None:
        with written_aside(self.path) as directory:
            self.model.to(self.dtype).save_pretrained(directory)
            plan.tokenizer.save_pretrained(directory)
            for name, content in files.items():
                (directory / name).write_bytes(content)


class ReportsAlone(WholeModel):
    """All weights are trained and evaluated as they would be saved, but only the reports are written."""

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        super().check_room(0, dtype)

    def write(self, report: dict[str, Any], files: dict[str, bytes], plan: Plan) -> None:
        with written_aside(self.path) as directory:
            for name, content in files.items():
                (directory / name).write_bytes(content)
