"""Evaluation during training: what is kept, and how much is forgotten."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from ..data import Encoded, collate
from ..errors import PMCError
from ..pmc.algorithm import PMC
from ..pmc.reward import Scorer, choose_scorer
from ..rollout import SharedEngine
from ..utils.labels import IGNORED

logger = logging.get_logger(__name__)


class EvaluatingTrainer(Trainer):
    """A Trainer whose evaluation asks the questions of pairs to keep, and the forget questions.

    Notes
    -----
    In addition to the Trainer's metrics (eval_loss, and compute_metrics' of padded batches) there are

    - eval_recall: the mean reward of greedy answers to the rows' questions against the rows' answers;
    - eval_forget_score: that of greedy answers to the forget questions against the initial answers; 0: all is forgotten.

    Both need a rollout of greedy answers and are left out with prediction_loss_only.
    """

    pmc: PMC
    eval_dataset: Any
    args: Any

    def encode_eval(self, dataset: Any) -> Any:
        """Return the sequences of an evaluation data set, or of each one in a dict."""
        if isinstance(dataset, dict):
            return {name: self.pmc.encode(rows, f"eval_dataset {name}") for name, rows in dataset.items()}
        return None if dataset is None else self.pmc.encode(dataset, "eval_dataset")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return padded batches of pairs, which may have any form that retain_dataset may have."""
        if isinstance(eval_dataset, str):  # the name of one of several
            sequences = self.eval_dataset[eval_dataset]
        else:
            sequences = self.eval_dataset if eval_dataset is None else self.encode_eval(eval_dataset)
        if sequences is None:
            raise PMCError(
                "evaluation needs an eval_dataset: pairs to keep, in any form that retain_dataset may have"
            )
        loader: torch.utils.data.DataLoader[Encoded] = torch.utils.data.DataLoader(
            sequences,
            batch_size=self.args.eval_batch_size,
            collate_fn=_padded,
            generator=torch.Generator(),  # the global generator, from which a loader draws a seed, is training's
        )
        return self.accelerator.prepare(loader)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the batches of `predict`."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute the Trainer's metrics and PMC's."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if not self.args.prediction_loss_only:
            if (recall := self._recall(dataloader.dataset)) is not None:
                output.metrics[f"{metric_key_prefix}_recall"] = recall
            output.metrics[f"{metric_key_prefix}_forget_score"] = self._forget_score()
        return output

    def _recall(self, sequences: Sequence[Encoded]) -> float | None:
        """Return the mean recall of sequences with a prompt, which is what precedes the first label."""
        prompts, positions, truths = [], [], []
        for s in sequences:
            begin = s.prompt_length
            end = next((t for t, label in enumerate(s.labels) if t > begin and label == IGNORED), len(s.labels))
            if begin:
                prompts.append(s.input_ids[:begin])
                positions.append(None if s.positions is None else s.positions[:begin])
                truths.append(s.labels[begin:end])
        texts = self.pmc.encoder.answers(truths)
        blind = 0 if self.pmc.reward else sum(not self._scorer(texts).has_words(text) for text in texts)
        if blind and self.is_world_process_zero():
            logger.warning(
                f"of {blind} of {len(texts)} answers of eval_dataset the reward sees nothing: eval_recall is 0 there"
            )
        if not prompts:
            return None
        room = max(len(p) + len(t) for p, t in zip(prompts, truths, strict=True))
        return self._mean_reward(texts, prompts, positions, room)

    def _scorer(self, wanted: Sequence[str]) -> Scorer:
        """Return how answers are compared; the truths may be in another script than the initial answers."""
        return choose_scorer(self.pmc.config.reward, [*self.pmc.initial_answers, *wanted])

    def _forget_score(self) -> float:
        if not self.pmc.initial_answers:
            self.pmc.prepare()
        return self._mean_reward(self.pmc.initial_answers, self.pmc.prompts, self.pmc.positions)

    def _mean_reward(
        self,
        wanted: Sequence[str],
        prompts: Sequence[list[int]],
        positions: Sequence[list[int] | None],
        room: int = 0,
    ) -> float:
        pmc = self.pmc
        rollouts = SharedEngine(pmc.engine, pmc.ranks)(
            prompts, num_samples=1, temperature=0, max_length=max(pmc.config.max_length, room),
            stop_ids=pmc.encoder.stops, positions=positions,
        )  # fmt: skip
        answers = pmc.encoder.answers([tokens for [tokens] in rollouts.tokens])
        reward = pmc.reward or self._scorer(wanted).recall
        scores = reward(wanted, [[answer] for answer in answers], 0)
        return sum(float(score) for [score] in scores) / len(answers)


def _padded(sequences: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    batch = collate(sequences, 0)  # padding is masked; every vocabulary has token 0
    if any(s.positions for s in sequences):
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        for row, s in zip(batch["position_ids"], sequences, strict=True):
            row[: len(s.input_ids)] = torch.tensor(s.positions or range(len(s.input_ids)))
    return batch
