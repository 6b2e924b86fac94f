"""PMC as a transformers Trainer."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..config import PMCConfig
from ..data import Encoded, questions_of
from ..errors import NotFiniteError
from ..pmc.algorithm import PMC
from ..pmc.reward import Reward
from ..pmc.schedule import RetainDraws
from ..utils.files import digest
from .arguments import PMCArguments, autocast_dtype
from .callbacks import StopRule
from .checkpointing import ResumableTrainer
from .evaluation import EvaluatingTrainer
from .step_logs import LoggingTrainer, StepEnd

logger = logging.get_logger(__name__)


class PMCTrainer(LoggingTrainer, EvaluatingTrainer, ResumableTrainer):
    """Unlearns with Partial Model Collapse.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    args : transformers.TrainingArguments, optional
        `PMCArguments` by default. Other TrainingArguments are taken as they are.
    forget_dataset : iterable
        Questions: texts, prompts as lists of token ids, or rows with a ``question``, ``prompt``, ``query`` or
        ``instruction``, or chats in ``messages``. Answers are never read. A list, a datasets.Dataset, a stream, a frame.
    retain_dataset : iterable
        Rows with questions and answers, or tokenised ones with ``input_ids``, ``labels`` and, if they are padded,
        ``attention_mask``.
    pmc_config : PMCConfig, optional
    processing_class : transformers.PreTrainedTokenizerBase
    callbacks, optimizers
        As of the Trainer.
    reward : callable, optional
        See `PMC`.
    eval_dataset : iterable, or dict of them, optional
        Rows as of `retain_dataset`: see `EvaluatingTrainer` for what is measured.
    compute_metrics, preprocess_logits_for_metrics, optimizer_cls_and_kwargs
        As of the Trainer. Its other arguments are refused by name.

    Notes
    -----
    All questions of an optimizer step are sampled in one rollout, in `get_batch_samples`. Logged in addition to the
    Trainer's numbers: collapse_loss and retain_loss, means over the steps since the last log; rows, sampled_tokens,
    cut_samples (those that did not end), rollout_seconds and train_seconds, sums over these steps; mean_score and
    pending, as of the last step. Checkpoints hold initial answers (mode 0600). A resumed run continues the same
    trajectory, on one CPU process bit for bit.

    Under `accelerate launch` every process takes its part of each micro-batch, and no question is trained on twice where
    the last one is uneven. A run may be resumed on another number of processes with the same number of questions a step.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        forget_dataset: Iterable[Any] | None = None,
        retain_dataset: Iterable[Any] | None = None,
        pmc_config: PMCConfig | None = None,
        processing_class: Any = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        reward: Reward | None = None,
        eval_dataset: Iterable[Any] | dict[str, Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        args = PMCArguments() if args is None else args
        if pmc_config is None:  # TRL's class has both
            pmc_config = PMCConfig(**args.algorithm()) if isinstance(args, PMCConfig) else PMCConfig()
        super().__init__(
            model,
            args,
            pmc_config,
            processing_class,
            forget_dataset,
            others,
            optimizers,
            optimizer_cls_and_kwargs,
            callbacks=[*(callbacks or []), StepEnd(self)],
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        how: dict[str, Any] = {"reward": reward, "autocast_dtype": autocast_dtype(args)}
        self.pmc = PMC(self.model, processing_class, pmc_config, self.forget, **how)
        self.ranks = self.pmc.ranks
        self.retain = self._encode_retain(retain_dataset)
        self.retain_draws = RetainDraws.of(pmc_config, len(self.retain))
        self.eval_dataset = self.encode_eval(eval_dataset)
        self.stop_rule = None
        if pmc_config.stop_score is not None:
            self.stop_rule = StopRule(pmc_config.stop_score, pmc_config.stop_retain_loss, pmc_config.stop_steps)
        self.stopped = None  # why the stopping rule fired
        self._step, self._window = {}, []

    # --- data

    def _read_forget(self, dataset: Any) -> list[Any]:
        return questions_of(dataset)

    def _encode_retain(self, dataset: Any) -> list[Encoded]:
        return self.pmc.encode_retain(dataset)

    def _share(self, count: int) -> slice:
        """Return this process's part of a batch of `count` questions; of a small one the last processes get none.

        With normalization "micro_batch" the groups are thus those of one process with more micro-batches.
        """
        size, rank = self.args.train_batch_size, self.pmc.ranks.rank
        return slice(min(rank * size, count), min((rank + 1) * size, count))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, *args: Any
    ) -> tuple[list[Any], None]:
        """Collect an optimizer step's micro-batches, sample all their questions at once, draw their retain pairs.

        The last one's inputs hold them all, as (Step, retain pairs) in ``parts``; those of the others are empty.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, *args)
        all_indices = [[int(i) for i in batch["indices"]] for batch in batches]
        if not all_indices:
            return [], None
        self.train_mode_of_optimizer()
        if self.pmc.pending([i for batch in all_indices for i in batch]):
            self._settle()  # a rollout waits for the device anyway
        self.stage = "the rollout"
        start = time.perf_counter()
        indices = [batch[self._share(len(batch))] for batch in all_indices]
        try:
            step = self.pmc.sample([i for batch in indices for i in batch])
        except NotFiniteError as error:
            if not self.state.global_step:  # the model came like that
                raise
            raise self.diverged() from error
        begin = time.perf_counter()
        self._step = {
            "counters": step.counters, "indices": step.indices, "begin": begin,
            "rollout_seconds": begin - start,
        }  # fmt: skip
        retain = [
            [s for pairs in self._draw_retain(len(batch))[self._share(len(batch))] for s in pairs]
            for batch in all_indices
        ]
        parts = list(zip(step.split(self.args.train_batch_size), retain, strict=True))
        return [*({"parts": []} for _ in parts[1:]), {"parts": parts}], None

    # --- a step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward of a whole optimizer step in its last micro-batch; return the step's loss.

        The Trainer calls this once for each micro-batch. The weights do not move between them, so that all can share
        packs, of at most max_tokens tokens. For all but the last, whose inputs have no ``parts``, nothing is computed and
        0 is returned: the sum over the micro-batches is the step's loss. An override sees the same calls.
        """
        model.train()
        if not inputs["parts"]:
            return torch.zeros((), device=self.args.device)
        total, tokens, out = self.accumulated(model, inputs["parts"])
        self._empty_cache()
        asked = [bool(part.indices) for part, _ in inputs["parts"]]
        self._step |= {
            "tokens": tokens,
            "loss": total,
            "means": torch.stack([out.collapse, out.retain], dim=1),
            "asked": asked,
        }
        return total

    # --- checkpoints

    def _prepare(self, state: dict[str, Any] | None) -> None:
        super()._prepare(state)
        if state is None and not self.pmc.initial_answers:
            self.pmc.prepare()
            for text in self.pmc.warnings:
                logger.warning(text)

    def _own_state(self) -> dict[str, Any]:
        stop_rule = None if self.stop_rule is None else self.stop_rule.state_dict()
        return super()._own_state() | {"pmc": self.pmc.state_dict(), "stop_rule": stop_rule}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.pmc.load_state_dict(state["pmc"])
        if self.stop_rule is not None:
            self.stop_rule.load_state_dict(state["stop_rule"])

    def _own_fingerprint(self) -> dict[str, Any]:
        return {"questions": digest(self.pmc.prompts), "PMC settings": digest(self.pmc.config.algorithm())}

    def _group(self) -> dict[str, str]:
        by_group = self.pmc.config.normalization == "micro_batch"
        return {"group": str(self.args.train_batch_size)} if by_group else {}
