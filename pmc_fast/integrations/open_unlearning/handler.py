"""The trainer class: GradDiff with the model's sampled answers in place of the forget answers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trainer.unlearn.grad_diff import GradDiff
from transformers.utils import logging

from ...config import PMCConfig
from ...data import Encoded, check_encoded_overlap
from ...data.packing import unpad
from ...errors import PMCError
from ...models import loading
from ...models.supported import check_float16, check_model
from ...pmc.algorithm import PMC as Core
from ...pmc.batch import Step
from ...trainer.arguments import autocast_dtype, training_settings
from ...trainer.checkpointing import STATE, check_fingerprint, checkpoints
from ...utils.files import digest, write_file
from ...utils.labels import IGNORED
from .checks import check_arguments, check_names, check_weights
from .draws import Draws

logger = logging.get_logger(__name__)

INPUTS = ("input_ids", "attention_mask", "labels")
COUNTED = ("sampled_tokens", "cut_samples")  # of rollouts, and logged
PART = "pmc"  # key of a micro-batch's answers in its inputs


class PMC(GradDiff):
    """Partial Model Collapse as an unlearning method of OpenUnlearning.

    Parameters
    ----------
    *args, **kwargs
        GradDiff's: gamma (weight of the sampled answers' loss, above 0), alpha (of the retain loss), retain_loss_type, and
        the arguments of every OpenUnlearning trainer. Settings of `PMCConfig` are given by their names; seed is by default
        the training arguments'.

    Notes
    -----
    loss = gamma * CE(sampled answers) + alpha * CE(retain answers), in one packed pass. Other values of retain_loss_type
    are computed by GradDiff's compute_retain_loss. All questions of an optimizer step are sampled in one rollout.

    A question is the prompt of a forget row: the tokens before its first label that the data collator's mask shows. Rows
    with the same prompt are one question.
    """

    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            raise PMCError(
                "OpenUnlearning gave a tokenizer instead of a processing_class: its checkout is older than transformers "
                "5; update it"
            )
        given = {f.name: kwargs.pop(f.name) for f in fields(PMCConfig) if f.name in kwargs}
        check_names(type(self), given, kwargs)
        check_arguments(kwargs.get("args"))
        check_model(kwargs.get("model"), training=True)
        if getattr(kwargs.get("args"), "n_gpu", 1) > 1:
            kwargs["args"]._n_gpu = 1  # no DataParallel: accelerate launch is for several GPUs
        super().__init__(*args, **kwargs)
        for name, on in (("DeepSpeed", self.is_deepspeed_enabled), ("FSDP", self.is_fsdp_enabled)):
            if on:
                raise PMCError(f"PMC samples from whole weights, which {name} may shard: use accelerate's multi_gpu")
        check_float16(self.model, autocast_dtype(self.args))
        # The loss is a mean over its micro-batch, which the Trainer must divide by the number of micro-batches. With
        # these it would not: it would take the loss as already divided by the step's tokens.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        check_weights(self.gamma, self.alpha)
        self._packs_retain = self.retain_loss_type == "NLL"
        lambda_ = self.alpha / self.gamma if self._packs_retain else 0.0
        self.pmc_config = PMCConfig(**{"seed": self.args.seed} | given, retain_weight=lambda_)
        self._questions: dict[bytes, int] = {}  # prompt -> its number
        self._losses: list[torch.Tensor] = []  # collapse and retain loss of the micro-batches since the last log
        self._counted = dict.fromkeys(COUNTED, 0.0)  # since the last log
        self._weights_sha256 = self._retain_sha256 = ""
        self._draws: Draws | None = None  # with one process and no workers
        self._resumed_draws: dict[str, str] | None = None
        self._check_retain_loss()

    def _check_retain_loss(self) -> None:
        """Refuse a retain_loss_type that compute_retain_loss does not know, by trying it on a row."""
        rows: Any = getattr(self.train_dataset, "retain", None)
        if self._packs_retain or not rows:
            return
        batch = self.data_collator([rows[0]])
        retain = {name: batch[name].to(self.args.device) for name in INPUTS}
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                self.compute_retain_loss(model=self.model, retain_inputs=retain)
        except NotImplementedError as error:
            raise PMCError(
                f"method_args.retain_loss_type is {self.retain_loss_type!r}, which OpenUnlearning's GradDiff does not know: "
                "use NLL or KL"
            ) from error

    # --- questions

    @cached_property
    def pmc(self) -> Core:
        """The algorithm, with the prompts of `train_dataset.forget` as questions, in their order."""
        forget = getattr(self.train_dataset, "forget", None)
        if not forget:
            raise PMCError("train_dataset has no forget set: PMC needs the questions to forget")
        prompts: list[Encoded] = []
        asked: list[list[int]] = []  # by row
        for i in range(len(forget)):
            row = forget[i]
            if not (isinstance(row, Mapping) and "input_ids" in row and "labels" in row):
                raise PMCError(
                    f"forget row {i} has no input_ids and labels: PMC takes plain question-answer datasets"
                )
            # the collator's mask hides eos tokens of a prompt where pad is eos: rollouts must see what training sees
            (prompt,) = _prompts(self.data_collator([row]), f"forget row {i}")
            asked.append(prompt.input_ids)
            if self._questions.setdefault(_key(prompt), len(prompts)) == len(prompts):
                prompts.append(prompt)
        retain = self._retain_rows()
        self._retain_sha256 = digest([[s.input_ids, s.labels, s.positions] for s in retain])
        for text in check_encoded_overlap(
            asked, retain, self.processing_class.decode, allow=self.pmc_config.allow_overlap
        ):
            logger.warning(text)
        return Core(
            self.model,
            self.processing_class,
            self.pmc_config,
            [prompt.input_ids for prompt in prompts],
            positions=[prompt.positions for prompt in prompts],
            autocast_dtype=autocast_dtype(self.args),
        )

    def _retain_rows(self) -> list[Encoded]:
        retain: Any = getattr(self.train_dataset, "retain", None) or ()
        rows = (retain[i] for i in range(len(retain)))
        return [s for row in rows if "input_ids" in row and "labels" in row for s in unpad(self.data_collator([row]))]

    def _ready(self) -> Core:
        if not self.pmc.initial_answers:
            self.pmc.prepare()
            for text in self.pmc.warnings:
                logger.warning(text)
        return self.pmc

    def _sampled(self, batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Sample the questions of an optimizer step's micro-batches; return the micro-batches with the answers."""
        pmc = self._ready()
        try:
            indices = [[self._questions[_key(p)] for p in _prompts(b["forget"], "a forget batch")] for b in batches]
        except KeyError:
            raise PMCError(
                "a forget batch has a prompt that train_dataset.forget has not: its rows must stay as they are"
            ) from None
        step = pmc.sample([i for batch in indices for i in batch])
        for name in COUNTED:
            self._counted[name] += step.counters.get(name, 0.0)
        tokens = sum(int((b["retain"]["labels"][:, 1:] != IGNORED).sum()) for b in batches)
        parts = step.split(len(indices[0]))
        return [{**batch, PART: (part, tokens)} for batch, part in zip(batches, parts, strict=True)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Collect an optimizer step's micro-batches and sample all their questions at once."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args)
        return self._sampled(batches) if batches else batches, items

    # --- a step

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's mean loss; inputs without answers are sampled as a step of their own.

        Rows without a forget part are from an evaluation: their loss is the model's, as in GradDiff.
        """
        if PART not in inputs and "forget" not in inputs:
            return super(GradDiff, self).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if PART not in inputs:
            (inputs,) = self._sampled([inputs])
        part: Step
        part, retain_tokens = inputs[PART]
        retain = {name: inputs["retain"][name] for name in INPUTS}
        out = self.pmc.loss(part, retain if self._packs_retain else [], model=model, retain_tokens=retain_tokens)
        # out.loss is a share of the step's loss, and the Trainer divides by the number of micro-batches again
        loss = self.gamma * part.parts * out.loss
        retain_loss = out.retain
        if not self._packs_retain:
            retain_loss = self.compute_retain_loss(model=model, retain_inputs=retain)
            loss = loss + self.alpha * retain_loss
        self._losses.append(torch.stack([out.collapse.double(), retain_loss.detach().double()]))
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the Trainer's numbers and, beside a training loss, PMC's."""
        if "loss" in logs and self._losses:
            collapse, retain = torch.stack(self._losses).mean(0).tolist()
            scores = self.pmc.scores()
            logs |= {
                "collapse_loss": collapse,
                "retain_loss": retain,
                "mean_score": sum(scores) / len(scores),
                "pending": len(self.pmc.pending()),
                **self._counted,
            }
            self._losses, self._counted = [], dict.fromkeys(COUNTED, 0.0)
        super().log(logs, *args, **kwargs)

    # --- a run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, after the untouched model has answered the forget questions or a checkpoint's answers were loaded.

        OpenUnlearning's train.py passes no checkpoint: `trainer.args.resume_from_checkpoint` names one, or is "auto" or
        True for the newest in output_dir, if any.
        """
        self._weights_sha256 = loading.weights_hash(self.model)  # of the untouched model
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        found = _newest(Path(self.args.output_dir)) if wanted in ("auto", True) else wanted
        if found:
            self._load_own_state(Path(str(found)))
        self._ready()
        return super().train(found or None, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader; see `Draws` for the retain rows of a resumed run."""
        rows = self.train_dataset
        if self.args.world_size == 1 and not self.args.dataloader_num_workers:
            self.train_dataset = self._draws = Draws(rows, self._resumed_draws)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators, but not torch's where the first rows are already drawn."""
        state = torch.get_rng_state()
        super()._load_rng_state(checkpoint)
        if self._draws is not None and self._resumed_draws is not None:
            if self._draws.state is None:
                torch.set_rng_state(state)
            self._draws.state = None  # at the beginning of an epoch nothing is fetched ahead

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and directory.is_dir():
            # not sealed: OpenUnlearning's evaluation writes into the same directory
            draws = None if self._draws is None else self._draws.state_dict()
            state = {"fingerprint": self._fingerprint(), "pmc": self.pmc.state_dict(), "draws": draws}
            write_file(directory / STATE, json.dumps(state), private=True)

    def _load_own_state(self, directory: Path) -> None:
        try:
            state = json.loads((directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PMCError(f"checkpoint {directory} has no sound {STATE}: PMC did not write it") from error
        if not any(directory.glob("rng_state*")):
            raise PMCError(
                f"checkpoint {directory} holds the model alone, and a run can't go on from it: save them with "
                "trainer.args.save_only_model=false (OpenUnlearning's default is true)"
            )
        check_fingerprint(directory, state.get("fingerprint", {}), self._fingerprint())
        self.pmc.load_state_dict(state["pmc"])
        self._resumed_draws = state["draws"]

    def _fingerprint(self) -> dict[str, str]:
        """Return hashes of all that a checkpoint and the run that resumes from it must have in common."""
        a = self.args
        steps = [a.train_batch_size, a.gradient_accumulation_steps, a.world_size]
        losses = [self.gamma, self.alpha, self.retain_loss_type]
        return {
            "questions": digest([self.pmc.prompts, self.pmc.positions]),
            "retain rows": self._retain_sha256,
            "PMC settings": digest([self.pmc_config.algorithm(), losses]),
            "training settings": digest([training_settings(a), steps]),
            "model's weights": self._weights_sha256,
        }


def _newest(directory: Path) -> str | None:
    """Return the newest checkpoint; directories of that name without a state hold evaluations alone."""
    return next((str(p) for p in checkpoints(directory) if (p / STATE).is_file()), None)


def _prompts(batch: Mapping[str, torch.Tensor], where: str) -> list[Encoded]:
    """Return the tokens before the first label of each row of a padded batch."""
    prompts = []
    for s in unpad(batch):
        end = s.prompt_length
        if not 0 < end < len(s.labels):
            raise PMCError(f"{where} has no prompt before an answer: PMC takes questions with answers")
        positions = None if s.positions is None or s.positions[:end] == list(range(end)) else s.positions[:end]
        prompts.append(Encoded(s.input_ids[:end], s.labels[:end], positions))
    return prompts


def _key(prompt: Encoded) -> bytes:
    return np.array([prompt.input_ids, prompt.positions or range(len(prompt.input_ids))], dtype=np.int64).tobytes()
