"""Any other method as a transformers Trainer."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..config import PMC_ALONE, PMCConfig, require_without_pmc
from ..data import Encoded, check_datasets, listed, rows_in, sequences_of
from ..data.datasets import check_sequences
from ..distributed import Ranks
from ..errors import NotFiniteError, PMCError
from ..methods import METHODS, Method, Unlearner
from ..pmc.schedule import RetainDraws
from ..utils.files import digest
from .arguments import ELSEWHERE, PMCArguments, autocast_dtype
from .checkpointing import ResumableTrainer

logger = logging.get_logger(__name__)

# settings of the Trainer that PMCTrainer honours and this one does not
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "world_size": (lambda n: n > 1, "the methods beside PMC run on one process"),
    "mixed_precision": (lambda x: x == "fp16", "gradients are not scaled: use bf16"),
    "deepspeed": (bool, "gradients are computed without it: leave it out"),
    "log_text": (bool, "no answers are sampled"),
    "eval_strategy": (lambda x: x != "no", "evaluate after training, with pmc_fast.evaluate"),
    "include_num_input_tokens_seen": (lambda x: x not in ("no", False), "tokens are not counted"),
}


class UnlearnTrainer(ResumableTrainer):
    """Unlearns with a method of `pmc_fast.methods`: `PMCTrainer`'s sibling, with the same batches, draws and checkpoints.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    args : transformers.TrainingArguments, optional
        `PMCArguments` by default.
    forget_dataset : iterable
        Rows with a question and, where the method trains on it, an answer; see `PMCTrainer` for their forms.
    retain_dataset : iterable, optional
        As of `PMCTrainer`; not needed where the method has no use for it (`Method.needs_retain`).
    pmc_config : PMCConfig, optional
        Prompts, max_length, max_tokens, seed, allow_overlap, retain_loss, retain_order and
        retain_per_question. Settings of PMC alone are refused by name: give retain_weight to the method.
    processing_class : transformers.PreTrainedTokenizerBase
    method : Method, or a name in METHODS
        A name stands for its paper's parameters.
    callbacks, optimizers, optimizer_cls_and_kwargs
        As of the Trainer. Its other arguments are refused by name.

    Notes
    -----
    An optimizer step is one call of `Unlearner.backward`, on the questions of all its micro-batches and their
    retain pairs: means are taken over the step. Logged in addition to the Trainer's numbers: train_seconds, a sum over the steps
    since the last log. On one process.
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = ELSEWHERE | dict.fromkeys(
        ("eval_dataset", "compute_metrics", "preprocess_logits_for_metrics"),
        "evaluate after training, with pmc_fast.evaluate",
    ) | {"reward": "no answers are sampled"}  # fmt: skip

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        forget_dataset: Iterable[Any] | None = None,
        retain_dataset: Iterable[Any] | None = None,
        pmc_config: PMCConfig | None = None,
        processing_class: Any = None,
        *,
        method: Method | str,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        args = PMCArguments() if args is None else args
        pmc_config = PMCConfig() if pmc_config is None else pmc_config
        self.method = method = _method(method)
        super().__init__(
            model,
            args,
            pmc_config,
            processing_class,
            forget_dataset,
            others,
            optimizers,
            optimizer_cls_and_kwargs,
            callbacks=callbacks,
        )
        self.ranks, rows = Ranks(), self.forget
        self.task = Unlearner(
            self.model, processing_class, pmc_config, method, rows, autocast_dtype=autocast_dtype(args)
        )
        self._check_rows(rows)
        needs_pairs = retain_dataset is not None or method.needs_retain
        self.retain = self._encode_retain(retain_dataset, rows) if needs_pairs else []
        self.retain_draws = RetainDraws.of(pmc_config, len(self.retain))
        self._seconds = 0.0

    # --- data

    def _check_given(self, model: Any, args: Any, config: PMCConfig, *given: Any) -> None:
        super()._check_given(model, args, config, *given)
        _check_settings(args, config, self.method)

    def _read_forget(self, dataset: Any) -> list[Any]:
        return rows_in(dataset)

    def _check_rows(self, rows: list[Any]) -> None:
        name, encoder = "forget_dataset", self.task.encoder
        if cut := encoder.check_lengths(name, [(row.question, row.answer) for row in rows]):
            logger.warning(encoder.cut_warning(name, cut, len(rows)))
        for text in encoder.warnings:
            logger.warning(text)

    def _encode_retain(self, dataset: Any, rows: list[Any]) -> list[Encoded]:
        name, encoder = "retain_dataset", self.task.encoder
        kept = listed(dataset, name, f"{type(self.method).__name__} trains on pairs to keep, too")
        sequences = sequences_of(kept, encoder, name)
        check_sequences(sequences, name, self.model.get_input_embeddings().weight.shape[0])
        if cut := [number for number, s in enumerate(sequences, start=1) if s.cut]:
            logger.warning(encoder.cut_warning(name, cut, len(sequences)))
        questions = [row.question for row in rows]
        data = questions, kept, [encoder.prompt(q) for q in questions], sequences, encoder.tokenizer
        for text in check_datasets(*data, allow=self.task.config.allow_overlap, name=name):
            logger.warning(text)
        if not self.method.needs_retain:
            logger.warning(f"retain_dataset has no effect: {type(self.method).__name__}'s retain_weight is 0")
        return sequences

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any
    ) -> tuple[list[Any], None]:
        """Collect an optimizer step's micro-batches and draw their retain pairs; the last one's inputs hold them all."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *args)
        groups = [[int(i) for i in batch["indices"]] for batch in batches]
        if not groups:
            return [], None
        self.train_mode_of_optimizer()
        retain = (
            [s for group in groups for pairs in self._draw_retain(len(group)) for s in pairs]
            if self.method.needs_retain
            else []
        )
        whole = {"indices": [i for group in groups for i in group], "retain": retain}
        return [*({"indices": []} for _ in groups[1:]), whole], None

    # --- a step

    def _prepare(self, state: dict[str, Any] | None) -> None:
        if not self.task.prepared:  # the weights are the untouched model's: a checkpoint's are loaded later
            self.task.prepare()
        super()._prepare(state)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Compute the gradients of a whole optimizer step in its last micro-batch; return the step's loss."""
        model.train()
        if not inputs["indices"]:
            return torch.zeros((), device=self.args.device)
        start, self.stage = time.perf_counter(), "a training pass"
        try:
            loss = self.task.backward(inputs["indices"], inputs["retain"], model=model)
        except NotFiniteError as error:
            if not self.state.global_step:  # the model came like that
                raise
            raise self.diverged() from error
        if not math.isfinite(loss):
            raise self.diverged(self.state.global_step + 1)
        self._empty_cache()
        self.stage = "the optimizer step"
        self._seconds += time.perf_counter() - start
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the Trainer's numbers and, beside a training loss, the seconds of the same steps."""
        if "loss" in logs:
            logs["train_seconds"], self._seconds = self._seconds, 0.0
        super().log(logs, *args, **kwargs)

    def _remedies(self) -> list[str]:
        if self.stage == "the optimizer step":
            return [*self._lighter(), "an optimizer of fewer or 8-bit moments"]
        return ["a smaller max_tokens", "a smaller max_length", *self._lighter()]

    # --- checkpoints: the method's own state is made again from the untouched model

    def _own_fingerprint(self) -> dict[str, Any]:
        answers = {kind: [[s.input_ids, s.labels] for s in of] for kind, of in self.task.answers.items()}
        parameters = {name: str(value) for name, value in dataclasses.asdict(self.method).items()}
        return {
            "questions": digest([self.task.questions, answers]),
            "method": digest([type(self.method).__name__, parameters]),
            "settings": digest(self.task.config.algorithm()),
        }


def _method(method: Method | str) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            raise PMCError(f"method is {method!r}: use one of {', '.join(METHODS)}, or PMCTrainer for PMC")
        return METHODS[method]()
    if not isinstance(method, Method):
        raise PMCError(f"method is a {type(method).__name__}: give a Method, such as NPO(beta=0.1), or its name")
    return method


def _check_settings(args: TrainingArguments, config: PMCConfig, method: Method) -> None:
    """Refuse settings that PMCTrainer would honour."""
    if isinstance(args, PMCConfig):  # TRL's, with PMC's settings
        raise PMCError(f"args is a {type(args).__name__} of pmc_fast.integrations.trl: use PMCArguments")
    name = type(method).__name__
    require_without_pmc(config, PMC_ALONE, name)
    require_without_pmc(config, ["retain_weight"], name, f"given to the method, {name}(retain_weight=...),")
    for setting, (refuses, why) in REFUSED.items():
        value = getattr(args, setting, None)
        value = getattr(value, "value", value)
        if value is not None and refuses(value):
            raise PMCError(f"{setting} is {value!r}: {why}")
