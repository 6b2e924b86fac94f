"""Checkpoints of a run: sealed with a manifest, checked before they are used, continued on the same trajectory."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..data import Encoded
from ..distributed import Ranks
from ..errors import LostProcessError, PMCError
from ..models import loading
from ..models.context import out_of_memory
from ..pmc.schedule import RetainDraws
from ..utils.files import digest, file_sha256, one_error, sync
from .arguments import training_settings
from .out_of_memory import ThriftyTrainer

logger = logging.get_logger(__name__)

MANIFEST = "pmc_manifest.json"
STATE = "pmc_state.json"
ASIDE = ".unfinished"
DTYPES = "parameters' dtypes"


@contextmanager
def sealed(directory: Path, state: dict[str, Any], fingerprint: dict[str, Any]) -> Iterator[Path]:
    """Yield a directory that holds an empty checkpoint-N to write into; at the end that one replaces `directory`.

    Parameters
    ----------
    directory : Path
        checkpoint-N of a run.
    state : dict
        JSON-ready; what `load` returns.
    fingerprint : dict
        JSON-ready; what a run that resumes from the checkpoint must have in common with it, by name.
    """
    with one_error(f"checkpoint {directory}"):
        aside = directory.parent / ASIDE
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir(mode=0o700)
        try:
            (aside / directory.name).mkdir(mode=0o700)  # it holds the initial answers
            yield aside
            written = aside / directory.name
            (written / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = sorted(p for p in written.rglob("*") if p.is_file())
            entries = {
                str(p.relative_to(written)): {"size": p.stat().st_size, "sha256": file_sha256(p)} for p in files
            }
            manifest = {"fingerprint": fingerprint, "files": entries}
            (written / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in [*files, written / MANIFEST]:
                path.chmod(0o600)
                sync(path)
            shutil.rmtree(directory, ignore_errors=True)
            written.rename(directory)
            sync(directory.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def load(directory: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Check a checkpoint and return its state.

    Raises
    ------
    PMCError
        It does not exist, is incomplete or damaged, or belongs to another run.
    """
    if not directory.is_dir():
        raise PMCError(f"checkpoint {directory} does not exist")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise PMCError(
            f"checkpoint {directory} has no sound {MANIFEST}: it was not finished, or pmc_fast did not write it"
        ) from error
    for name, entry in files.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["size"] or file_sha256(path) != entry["sha256"]:
            raise PMCError(
                f"checkpoint {directory} is damaged: {name} is not what was written; use the one before it"
            )
    if not any(name.startswith("rng_state") for name in files):
        raise PMCError(f"checkpoint {directory} holds the model alone (save_only_model): a run can't go on from it")
    check_fingerprint(directory, manifest["fingerprint"], fingerprint)
    return json.loads((directory / STATE).read_text(encoding="utf-8"))


def check_fingerprint(directory: Path, recorded: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """Refuse a checkpoint whose recorded fingerprint is not that of this run."""
    for name, value in fingerprint.items():
        if name not in recorded:
            if name == DTYPES and value == digest({}):
                continue  # an older one, which was float32 unless its weights' hash says otherwise
            raise PMCError(f"checkpoint {directory} is of an older pmc_fast: it does not say of which {name} it is")
        if recorded[name] != value:
            raise PMCError(
                f"checkpoint {directory} belongs to another run: its {name} differ from this one's (or an older version wrote it, without settings that are new)"
            )


def checkpoints(directory: Path) -> list[Path]:
    """Return the directories called checkpoint-N, sound or not, the newest first."""
    numbered = [p for p in directory.glob("checkpoint-*") if p.name.rsplit("-", 1)[1].isdigit()]
    return sorted(numbered, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True)


def newest(
    directory: Path, fingerprint: dict[str, Any], warn: Callable[[str], None] = lambda text: None
) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest sound checkpoint of this run in `directory` and its state.

    `warn` is called with the reason for which a newer one is not used.
    """
    for path in checkpoints(directory):
        try:
            return path, load(path, fingerprint)
        except PMCError as error:
            warn(str(error))
    return None


class ResumableTrainer(ThriftyTrainer):
    """A Trainer whose checkpoints also hold the retain draws and what a subclass adds to them."""

    ranks: Ranks
    retain: list[Encoded]
    retain_draws: RetainDraws
    weights_sha256 = ""  # `loading.weights_hash` of the untouched model, computed on first use
    _saving_to: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` is a directory, or "auto" or True for the newest sound one, if any."""
        self._fingerprint()  # hashes the weights before they are trained
        found = self.find_checkpoint(resume_from_checkpoint)
        try:
            self._prepare(None if found is None else found[1])
            with self.ranks.sigterm_raises():
                return super().train(resume_from_checkpoint=str(found[0]) if found else None, **kwargs)
        except LostProcessError as error:
            raise LostProcessError(f"{error}; {self._how_to_resume()}") from error
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise self.out_of_memory(self._how_to_resume()) from error

    def _prepare(self, state: dict[str, Any] | None) -> None:
        """Do what comes before the first step with the untouched model, or take it from a checkpoint's state."""
        if state is not None:
            self._load_own_state(state)

    def _how_to_resume(self) -> str:
        kept = newest(Path(self.args.output_dir or "."), self._fingerprint())
        if kept is None:
            return "no checkpoint was written (save_strategy, save_steps): start again"
        return f"{kept[0]} is sound: resume_from_checkpoint='auto' goes on from it, on one process too"

    def find_checkpoint(
        self, wanted: str | bool | None, *, warn: Callable[[str], None] = logger.warning
    ) -> tuple[Path, dict[str, Any]] | None:
        """Check the checkpoint that `train` would resume from; return its directory and the method's state in it.

        With "auto" or True, `warn` is called with the reason for which a newer one is not used.
        """
        if wanted in ("auto", True):
            return newest(Path(self.args.output_dir or "."), self._fingerprint(), warn)
        if not wanted:
            return None
        return Path(str(wanted)), load(Path(str(wanted)), self._fingerprint())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, ranks = Path(self.args.output_dir or "."), self.ranks
        name = f"checkpoint-{self.state.global_step}"
        with ExitStack() as stack:
            if self.args.should_save:
                stack.enter_context(sealed(run / name, self._own_state(), self._fingerprint()))
            ranks.gather(None)  # wait until the directory exists
            self._saving_to = run / ASIDE
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            best = self.state.best_model_checkpoint
            if best and Path(best).parent == run / ASIDE:  # this one, which will be renamed
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(run / ASIDE / name / TRAINER_STATE_NAME))
            ranks.gather(None)  # wait until all files are written
        if self.args.save_total_limit and self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        ranks.gather(None)  # wait until the checkpoint is complete

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to) if self._saving_to else super()._get_output_dir(trial)

    def _own_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the Trainer's files, JSON-ready."""
        return {"retain_draws": self.retain_draws.state_dict()}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.retain_draws.load_state_dict(state["retain_draws"])

    def _own_fingerprint(self) -> dict[str, Any]:
        """Return hashes of the forget questions and of the method's settings, by name."""
        return {}

    def _group(self) -> dict[str, str]:
        """Return a setting for the fingerprint where a question's weight depends on its micro-batch."""
        return {}

    def _fingerprint(self) -> dict[str, Any]:
        """Return hashes of all that a checkpoint and the run that resumes from it must have in common."""
        a = self.args
        if not self.weights_sha256:
            self.weights_sha256 = loading.weights_hash(self.model)
        settings = training_settings(a)
        # the number of processes may change if micro-batches, or their number, change so that this product does not
        settings["questions a step"] = str(a.train_batch_size * a.gradient_accumulation_steps * self.ranks.size)
        settings |= self._group()
        shapes = {n: list(p.shape) for n, p in self.model.named_parameters()}
        trained = ((n, p.dtype) for n, p in self.model.named_parameters() if p.requires_grad)
        low = {n: str(dtype) for n, dtype in trained if dtype != torch.float32}  # float32 ones have no masters
        adapters = getattr(self.model, "peft_config", None)  # alpha and dropout are not in an adapter's weights
        lora = {name: _settings(c) for name, c in adapters.items()} if isinstance(adapters, dict) else {}
        return {
            **({"adapter's settings": digest(lora)} if lora else {}),
            **self._own_fingerprint(),
            "retain rows": digest([[s.input_ids, s.labels, s.positions] for s in self.retain]),
            "training settings": digest(settings),
            "parameters": digest(shapes),
            DTYPES: digest(low),
            "model's weights": self.weights_sha256,
        }


def _settings(adapter: Any) -> dict[str, str]:
    """Return PEFT's settings of an adapter without those that say where it came from."""
    origin = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    values = {name: value for name, value in adapter.to_dict().items() if name not in origin}
    return {name: str(sorted(value) if isinstance(value, set) else value) for name, value in values.items()}
