"""What a run trains and leaves: here a whole model in a directory of its own."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..config import UnlearnConfig
from ..models import loading
from ..utils.files import check_output, claimed, written_aside
from . import earlier_runs
from .progress import Stages

if TYPE_CHECKING:
    from .unlearn import Plan

ROOM = 64 << 20  # bytes beside the weights


class Outcome(Protocol):
    """What a run trains and leaves. The job calls `check`, `earlier`, `attach`, `detach` and `write`, in this order."""

    @property
    def destination(self) -> str:
        """Where the result goes, as the user wrote it."""

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are; known once `attach` was called."""

    def check(self) -> None:
        """Refuse, before any work, what can't be written."""

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        """Refuse a model of so many parameters, which came in `dtype`, if there is no room for what is written."""

    def claimed(self) -> AbstractContextManager[None]:
        """Keep what will be written for this run alone; refuse what another run is writing."""

    def earlier(self) -> list[dict[str, Any]]:
        """Return an entry for each run that this one's model has behind it; see `earlier.check`."""

    def attach(self, loaded: loading.LoadedModel, stages: Stages) -> None:
        """Make `loaded.model` what is trained."""

    def detach(self, model: Any, stages: Stages) -> Any:
        """Return the trained model as it will be used: this is evaluated."""

    def write(self, made: dict[str, Any], files: dict[str, bytes], plan: "Plan") -> None:
        """Write the result and the report's files, all or nothing."""


class WholeModel:
    """A run that trains all weights and saves them into `config.output`."""

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

    def check(self) -> None:
        check_output(self.config.output, 0)

    def check_room(self, parameters: int, dtype: torch.dtype) -> None:
        saved = self.config.save_dtype
        self.dtype = dtype if saved == "auto" else getattr(torch, saved)
        self.path = check_output(self.config.output, parameters * self.dtype.itemsize + ROOM)

    def claimed(self) -> AbstractContextManager[None]:
        return claimed(self.config.output)

    def earlier(self) -> list[dict[str, Any]]:
        return earlier_runs.read(self.config.model)

    def attach(self, loaded: loading.LoadedModel, stages: Stages) -> None:
        """All of its parameters are trained."""

    def detach(self, model: Any, stages: Stages) -> Any:
        with torch.no_grad():  # what is evaluated is what is saved
            for p in model.parameters():
                p.copy_(p.to(self.dtype))
        self.model = model
        return model

    def write(self, made: dict[str, Any], files: dict[str, bytes], plan: "Plan") -> None:
        with written_aside(self.path) as directory:
            self.model.to(self.dtype).save_pretrained(directory)
            plan.tokenizer.save_pretrained(directory)
            for name, content in files.items():
                (directory / name).write_bytes(content)
