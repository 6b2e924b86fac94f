"""What a run trains and leaves: here a whole model in a directory of its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import earlier, models
from .config import UnlearnConfig
from .output import check_output, written_aside
from .progress import Stages

if TYPE_CHECKING:
    from .job import Plan

ROOM = 64 << 20  # bytes beside the weights


class Outcome(Protocol):
    """What a run trains and leaves. The job calls `check`, `earlier`, `attach`, `detach` and `write`, in this order."""

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are; known once `attach` was called."""

    def check(self) -> None:
        """Refuse, before any work, what can't be written."""

    def earlier(self) -> list[dict[str, Any]]:
        """Return an entry for each run that this one's model has behind it; see `earlier.check`."""

    def attach(self, loaded: models.LoadedModel, stages: Stages) -> None:
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
    def checkpoints(self) -> Path:
        output = Path(self.config.output)
        return output.with_name(output.name + ".checkpoints")

    def check(self) -> None:
        check_output(self.config.output, 0)

    def earlier(self) -> list[dict[str, Any]]:
        return earlier.read(self.config.model)

    def attach(self, loaded: models.LoadedModel, stages: Stages) -> None:
        saved = self.config.save_dtype
        self.dtype = loaded.checkpoint_dtype if saved == "auto" else getattr(torch, saved)
        size = sum(p.numel() for p in loaded.model.parameters()) * self.dtype.itemsize
        self.path = check_output(self.config.output, size + ROOM)

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
