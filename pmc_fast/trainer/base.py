"""What trainers here share: arguments checked, batches of questions, draws of retain pairs, the optimizer."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils.memory import clear_device_cache
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..config import PMCConfig
from ..data import Encoded
from ..distributed import Ranks
from ..errors import DivergedError, PMCError
from ..models.teacher import SHARDED
from ..pmc.schedule import EpochOrder, RetainDraws
from .arguments import (
    ELSEWHERE,
    check_arguments,
    check_inputs,
    check_optimizer,
    check_overrides,
    check_precision,
    has_low_precision,
)  # fmt: skip
from .callbacks import TrainingClock
from .master_weights import MasterWeights

logger = logging.get_logger(__name__)


class BaseTrainer(Trainer):
    """A Trainer of numbers of forget questions: an optimizer step's gradients are computed in its last micro-batch.

    Parameters
    ----------
    model, args, config, processing_class, forget_dataset, optimizers, optimizer_cls_and_kwargs
        As of `PMCTrainer`, where args and config are given. They are checked before the data is read.
    others : mapping
        Arguments that the trainer does not have: refused.
    **given
        Further arguments of the Trainer.
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = ELSEWHERE
    _tag_names = ["pmc-fast", "unlearning"]  # noqa: RUF012
    optimizer: Any
    lr_scheduler: Any
    retain_draws: RetainDraws
    args: Any
    ranks: Ranks
    forget: list[Any]  # the questions or rows that a subclass reads
    retain: list[Encoded]
    stage: str
    clock: TrainingClock | None = None  # of a run that its limit ends; also one of the callbacks

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        config: PMCConfig,
        processing_class: Any,
        forget_dataset: Any,
        others: Mapping[str, Any],
        optimizers: tuple[Any, Any],
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None,
        **given: Any,
    ) -> None:
        made = optimizers[0] is None and optimizer_cls_and_kwargs is None
        self._check_given(model, args, config, processing_class, others, optimizers[0], made)
        self.forget = self._read_forget(forget_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=list(range(len(self.forget))),
            data_collator=lambda indices: {"indices": indices},
            processing_class=processing_class,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            **given,
        )
        if self.is_fsdp_enabled and optimizers[0] is None and self._keeps_masters():
            raise PMCError(
                "the model has bfloat16 parameters, whose float32 masters FSDP does not shard: load it in float32 and use "
                "bf16, under which FSDP computes in bfloat16"
            )
        self.retain_loss = config.retain_loss
        if self.is_fsdp_enabled and config.retain_loss == "kl":
            raise PMCError(SHARDED)
        self.order_seed = config.seed

    def _check_given(
        self,
        model: Any,
        args: TrainingArguments,
        config: PMCConfig,
        processing_class: Any,
        others: Mapping[str, Any],
        optimizer: Any,
        made: bool,
    ) -> None:
        """Refuse what can't be trained with; warn of settings without effect.

        `optimizer` is the one that the caller gave, if any; `made`: `args.optim` makes it.
        """
        check_inputs(model, args, config, processing_class, others, type(self))
        check_overrides(type(self))
        for text in check_arguments(args, config):
            if args.process_index == 0:
                logger.warning(text)
        check_precision(model, args, optimizer)
        if made:
            check_optimizer(args, model)
        if args.n_gpu > 1:
            args._n_gpu = 1  # no DataParallel: accelerate launch is for several GPUs

    # --- data

    def _read_forget(self, dataset: Any) -> list[Any]:
        raise NotImplementedError

    def get_train_dataloader(self) -> Any:
        """Return a loader of the indices of all processes' questions, the same on each.

        Accelerate's sharding would repeat questions to fill up an uneven last batch.
        """
        count = len(self.train_dataset)
        loader: torch.utils.data.DataLoader[int] = torch.utils.data.DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size * self.ranks.size,
            sampler=EpochOrder(count, self.order_seed),
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
        )
        if not len(loader):
            raise PMCError(f"dataloader_drop_last leaves no batch of {count} questions")
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def _draw_retain(self, questions: int) -> list[list[Encoded]]:
        """Return the pairs to keep of each of so many questions of a micro-batch."""
        return [[self.retain[i] for i in drawn] for drawn in self.retain_draws(questions)]

    def train_mode_of_optimizer(self) -> None:
        """Switch a schedule-free optimizer back from an evaluation."""
        switch: Any = getattr(self.optimizer, "train", None)
        if callable(switch):
            switch()

    # --- a step

    def _empty_cache(self) -> None:
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm  # computing it for the log alone would read and write all gradients

    def _track_num_input_tokens(self, inputs: Any) -> None:
        pass  # there are no input_ids: tokens are counted at the end of a step

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's estimate is of padded input_ids

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a trial would start from the model that the one before has trained."""
        raise PMCError(
            f"hyperparameter_search is not supported: make a {type(self).__name__}, with a fresh model, for each trial"
        )

    def diverged(self, step: int | None = None) -> PMCError:
        """Return the error that names a step, by default this one."""
        step = self.state.global_step if step is None else step
        return DivergedError(
            f"training diverged at step {step}{self._of_steps()} (NaN or infinite numbers): try a "
            f"learning_rate below {self.args.learning_rate:g}"
        )

    def _of_steps(self) -> str:
        """Return " of 12" in a run of 12 steps, nothing where a clock ends it."""
        return f" of {self.state.max_steps}" if self.clock is None or self.clock.limit is None else ""

    # --- optimizer

    def _keeps_masters(self) -> bool:
        return getattr(self.args, "master_weights", True) and has_low_precision(self.model)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, with float32 masters where parameters are bfloat16."""
        fresh = self.optimizer is None
        super().create_optimizer(*args, **kwargs)
        if fresh and self._keeps_masters():
            self.optimizer = MasterWeights(self.optimizer)
        return self.optimizer

    def unround(self) -> bool:
        """Give a trained model its float32 masters for parameters; return whether there are any.

        Raises
        ------
        PMCError
            The model's weights are other ones than the optimizer's, as after load_best_model_at_end.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # within accelerate's
        if not isinstance(optimizer, MasterWeights):
            return False
        optimizer.unround()
        self.model.float()
        return True

    def drop_optimizer(self) -> None:
        """Release the optimizer of a trained model, its moments and its masters."""
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.accelerator.free_memory()

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Create the schedule; where warmup_steps is 0, with `PMCArguments.warmup_epochs` of warm-up."""
        epochs, warmup = getattr(self.args, "warmup_epochs", 0.0), self.args.warmup_steps
        if epochs and not warmup:
            batches = len(self.get_train_dataloader())
            self.args.warmup_steps = round(epochs * math.ceil(batches / self.args.gradient_accumulation_steps))
        try:
            if self.clock is not None and self.clock.limit is not None:
                return self._follow(self.clock, self.args.warmup_steps)
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        finally:
            self.args.warmup_steps = warmup

    def _follow(self, clock: TrainingClock, warmup: float) -> Any:
        self.lr_scheduler = LambdaLR(self.optimizer, lambda step: clock.rate(step, int(warmup)))
        self._created_lr_scheduler = True
        return self.lr_scheduler
