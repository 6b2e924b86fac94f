"""Checkpoints of a Trainer that unlearns: sealed, and continued on the same trajectory."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from ..data import Encoded
from ..errors import LostProcessError
from ..models import loading
from ..pmc.algorithm import PMC
from . import checkpointing
from .arguments import training_settings
from .stopping import StopRule

logger = logging.get_logger(__name__)


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints hold, beside the Trainer's own files, all that PMC remembers."""

    pmc: PMC
    retain: list[Encoded]
    retain_order: torch.Generator
    stop_rule: StopRule | None
    model: Any
    weights_sha256 = ""  # of the untouched model, `loading.weights_hash`; computed when it is first needed
    _saving_to: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` is a directory, or "auto" or True for the newest sound one, if any."""
        self._fingerprint()  # of the model as it is now, which the checkpoints will carry
        found = self.find_checkpoint(resume_from_checkpoint)
        if found is not None:
            self._load_own_state(found[1])
        elif not self.pmc.initial_answers:
            self.pmc.prepare()
            for text in self.pmc.warnings:
                logger.warning(text)
        try:
            with self.pmc.ranks.told():
                return super().train(resume_from_checkpoint=str(found[0]) if found else None, **kwargs)
        except LostProcessError as error:
            raise LostProcessError(f"{error}; {self._how_to_resume()}") from error

    def _how_to_resume(self) -> str:
        kept = checkpointing.newest(Path(self.args.output_dir or "."), self._fingerprint())
        if kept is None:
            return "no checkpoint was written (save_strategy, save_steps): start again"
        return f"{kept[0]} is sound: resume_from_checkpoint='auto' goes on from it, on one process too"

    def find_checkpoint(
        self, wanted: str | bool | None, *, warn: Callable[[str], None] = logger.warning
    ) -> tuple[Path, dict[str, Any]] | None:
        """Check the checkpoint that `train` would resume from; return its directory and PMC's state in it.

        With "auto" or True, `warn` hears why newer checkpoints are passed over.
        """
        if wanted in ("auto", True):
            return checkpointing.newest(Path(self.args.output_dir or "."), self._fingerprint(), warn)
        if not wanted:
            return None
        return Path(str(wanted)), checkpointing.load(Path(str(wanted)), self._fingerprint())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run, ranks = Path(self.args.output_dir or "."), self.pmc.ranks
        name = f"checkpoint-{self.state.global_step}"
        with ExitStack() as stack:
            if self.args.should_save:
                stack.enter_context(checkpointing.sealed(run / name, self._own_state(), self._fingerprint()))
            ranks.gather(None)  # the folder is there
            self._saving_to = run / checkpointing.ASIDE
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            best = self.state.best_model_checkpoint
            if best and Path(best).parent == run / checkpointing.ASIDE:  # this one: it will stand elsewhere
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(run / checkpointing.ASIDE / name / TRAINER_STATE_NAME))
            ranks.gather(None)  # all files are
        if self.args.save_total_limit and self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        ranks.gather(None)  # nobody goes on before the checkpoint stands

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_to) if self._saving_to else super()._get_output_dir(trial)

    def _own_state(self) -> dict[str, Any]:
        return {
            "pmc": self.pmc.state_dict(),
            "retain_order": self.retain_order.get_state().tolist(),
            "stop_rule": None if self.stop_rule is None else self.stop_rule.state_dict(),
        }

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self.pmc.load_state_dict(state["pmc"])
        self.retain_order.set_state(torch.tensor(state["retain_order"], dtype=torch.uint8))
        if self.stop_rule is not None:
            self.stop_rule.load_state_dict(state["stop_rule"])

    def _fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must have in common with this run: hashes, no text."""
        a, config = self.args, self.pmc.config
        if not self.weights_sha256:
            self.weights_sha256 = loading.weights_hash(self.model)
        settings = training_settings(a)
        # on more processes a step has as many questions if there are less micro-batches to it, or smaller ones
        settings["questions a step"] = str(a.train_batch_size * a.gradient_accumulation_steps * self.pmc.ranks.size)
        if config.normalization == "micro_batch":
            settings["group"] = str(a.train_batch_size)
        shapes = {n: list(p.shape) for n, p in self.model.named_parameters()}
        adapters = getattr(self.model, "peft_config", None)  # alpha and dropout are not in an adapter's weights
        how = {name: _settings(of) for name, of in adapters.items()} if isinstance(adapters, dict) else {}
        return {
            **({"adapter's settings": checkpointing.digest(how)} if how else {}),
            "questions": checkpointing.digest(self.pmc.prompts),
            "retain rows": checkpointing.digest([[s.input_ids, s.labels, s.positions] for s in self.retain]),
            "PMC settings": checkpointing.digest(config.algorithm()),
            "training settings": checkpointing.digest(settings),
            "parameters": checkpointing.digest(shapes),
            "model's weights": self.weights_sha256,
        }


def _settings(adapter: Any) -> dict[str, str]:
    """Return PEFT's settings of an adapter, but for those that say where it came from."""
    about = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
    values = {name: value for name, value in adapter.to_dict().items() if name not in about}
    return {name: str(sorted(value) if isinstance(value, set) else value) for name, value in values.items()}
