"""The root of the trainers: transformers' with evaluators."""

from pathlib import Path

from transformers import Trainer


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if not self.evaluators:
            return {} if eval_dataset is None else super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        output = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}" / "evals"
        output.mkdir(parents=True, exist_ok=True)
        metrics = {}
        for evaluator in self.evaluators.values():
            metrics |= evaluator.evaluate(
                output_dir=str(output), template_args=self.template_args, model=self.model,
                tokenizer=self.processing_class,
            )  # fmt: skip
        self.log(metrics)
        return metrics
