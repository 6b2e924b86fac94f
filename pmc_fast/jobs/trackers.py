"""Following a run elsewhere: the Trainer's own callbacks for TensorBoard, Weights & Biases and MLflow, given numbers alone."""

import importlib
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from ..errors import PMCError
from .progress import Monitor

# what to import, an attribute that only the real package has (a folder wandb/ of runs is a module too), and its name
# for pip
PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter", "tensorboard"),
    "wandb": ("wandb", "init", "wandb"),
    "mlflow": ("mlflow", "start_run", "mlflow"),
}
# variables of these callbacks that would send more than numbers, and the values that don't
UPLOADS = {
    "wandb": ("WANDB_LOG_MODEL", ("", "false", "0"), "models and checkpoints, which hold initial answers"),
    "mlflow": ("HF_MLFLOW_LOG_ARTIFACTS", ("", "false", "0", "no", "off"), "checkpoints, which hold initial answers"),
}


def check(name: str) -> None:
    """Refuse, before any work, a tracker that can't be used, or one that would be sent more than numbers."""
    if name == "none":
        return
    if name == "mlflow" and os.environ.get("DISABLE_MLFLOW_INTEGRATION", "").upper() == "TRUE":
        raise PMCError("report_to is 'mlflow' but DISABLE_MLFLOW_INTEGRATION is TRUE: unset it")
    _import(name)
    if name in UPLOADS:
        variable, harmless, what = UPLOADS[name]
        value = os.environ.get(variable, "")
        if value.lower() not in harmless:
            raise PMCError(f"{variable} is {value!r}: {name} would be sent {what}; unset it")
    if name == "wandb":
        _check_login()


def _import(name: str) -> Any:
    module, attribute, package = PACKAGES[name]
    try:
        found = importlib.import_module(module)
        getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise PMCError(f"report_to is {name!r} but {package} is not installed: pip install {package}") from error
    return found


def _check_login() -> None:
    """Ask for a missing key now: the run would ask for it, or end, when training begins."""
    wandb = _import("wandb")
    remedy = "run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
    try:
        if wandb.setup().settings.mode not in ("online", "shared"):
            return
        known = wandb.login()
    except wandb.Error as error:
        raise PMCError(f"report_to is 'wandb' but there is no login ({_first_line(error)}): {remedy}") from error
    if not known:
        raise PMCError(f"report_to is 'wandb' but it has no key: {remedy}")


class Tracker(TrainerCallback):
    """The Trainer's callback for a tracker. It begins with training, and passes numbers on: never a text.

    An error ends a run that has just begun to train; later ones are warned of, and the run goes on without the tracker.

    Parameters
    ----------
    name : {"tensorboard", "wandb", "mlflow"}
    directory : Path
        Of TensorBoard's event files, for all runs of one output.
    run : str
        Name of this run.
    monitor : Monitor
        Shows where the numbers are, and warnings.
    """

    def __init__(self, name: str, directory: Path, run: str, monitor: Monitor) -> None:
        self.name, self.run, self.monitor = name, run, monitor
        self.directory = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or directory)
        self.place = ""  # of the numbers, once there are any
        self._callback: TrainerCallback | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._callback = getattr(self, f"_{self.name}")()
            self._callback.on_train_begin(args, state, control, **kwargs)
            self.place = self.place or self._place()
        except Exception as error:  # each tracker has errors of its own
            raise PMCError(f"report_to is {self.name!r} but it can't be written to: {_first_line(error)}") from error
        self.monitor.stage(f"  reported to {self.name}: {self.place}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        self._pass_on("on_log", args, state, control, logs=numbers, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_end", args, state, control, **kwargs)
        if self._callback is not None and self.name == "wandb":
            _import("wandb").finish()  # the Trainer leaves a run open, and a next one would be added to it

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._callback is None:
            return
        try:
            getattr(self._callback, event)(*args, **kwargs)
        except Exception as error:
            self._callback = None
            self.monitor.warn(f"{self.name} is no longer reported to: {_first_line(error)}")

    def _tensorboard(self) -> TrainerCallback:
        now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        self.place = str(self.directory / f"{self.run}_{now}")
        return TensorBoardCallback(_import("tensorboard").SummaryWriter(self.place))

    def _wandb(self) -> TrainerCallback:
        wandb = _import("wandb")
        # by default it also keeps what the process prints, and the difference of a git checkout to its last commit
        wandb.setup(wandb.Settings(console="off", disable_code=True, disable_git=True))
        return WandbCallback()

    def _mlflow(self) -> TrainerCallback:
        return MLflowCallback()

    def _place(self) -> str:
        module = _import(self.name)
        return str(module.get_tracking_uri() if self.name == "mlflow" else module.run.url or module.run.dir)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
