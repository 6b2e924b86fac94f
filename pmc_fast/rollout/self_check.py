"""Short rollouts compared with the model's own forward pass, once, before an engine serves a model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import PMCError
from ..models import patching
from ..models.context import known_tokens, plain_logps, require_same_logps
from ..models.fsdp import is_sharded
from ..models.recognition import Recognised, own_errors, recognise
from ..ops.fp8_linear import FP8_ERROR, why_no_fp8
from .model_runner import ModelStep
from .request import Request

Sampler = Callable[[Request, dict[str, Any]], Any]


class SelfCheck:
    """Refuses a model whose log-probs in rollouts are not those of its own forward pass.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    step : ModelStep
        What computes the rollouts' logits.
    """

    def __init__(self, model: Any, step: ModelStep) -> None:
        self.model, self._step = model, step
        self.recognised = Recognised(type(model).__name__)
        self.fp8_error: float | None = None  # once 8 bits are checked
        self._done = False

    def __call__(self, sample: Sampler, fp8: bool) -> None:
        """Check what has not been checked yet; `sample(request, draw)` returns its `Rollouts`."""
        name = type(self.model).__name__
        if fp8 and is_sharded(self.model):
            raise PMCError(f"rollout_dtype is 'fp8', but {name} is sharded, and its layers are not whole: use auto")
        if fp8 and (why := why_no_fp8(self._step.device, self._computes_in())):
            raise PMCError(f"rollout_dtype is 'fp8', but {why}: use auto")
        if not self._done:
            self._exact(sample)
            self._done = True
        if fp8 and self.fp8_error is None:
            self.fp8_error = self._fp8(sample)

    def _computes_in(self) -> torch.dtype:
        return self._step.autocast_dtype or next(self.model.parameters()).dtype

    def _exact(self, sample: Sampler) -> None:
        """Compare the log-probs of short rollouts with those of the model's own forward pass."""
        with self._step.autocast():  # without it layers with adapters of another dtype may not compute
            self.recognised = recognise(self.model)
        dtype = self._computes_in()
        if self._step.device.type == "cpu" and dtype == torch.float16:
            raise PMCError(
                f"{type(self.model).__name__} computes in float16, in which rollouts on the CPU do not: use bfloat16 or "
                "float32"
            )
        with patching.ONE_AT_A_TIME, own_errors(self.model):  # the plain forward is compared with
            errors = [np.abs(self._plain_logps(*s) - logps).mean() for s, logps in self._short_rollouts(sample)]
        require_same_logps(self.model, "rollouts do", max(errors), dtype)

    def _fp8(self, sample: Sampler) -> float:
        """Compare rollouts in 8 bits with the plain forward on the same layers; the exact ones have been compared.

        Each layer's product must be within the rounding of 8 bits. Log-probs of the two may be as far apart as what 8 bits
        change in them, which is returned: inputs that differ by their rounding alone may be rounded to 8 bits up in
        one and down in the other.
        """
        name, step = type(self.model).__name__, self._step
        errors, changes = [], []
        with patching.ONE_AT_A_TIME, own_errors(self.model), patching.attribute(step, "fp8", True):
            for sampled, logps in self._short_rollouts(sample):
                exact = self._plain_logps(*sampled)
                with patching.forwards(step.weights.forwards()):
                    plain = self._plain_logps(*sampled)
                errors.append(np.abs(plain - logps).mean())
                changes.append(np.abs(plain - exact).mean())
            largest = step.weights.fp8_error()
        if largest is None:
            raise PMCError(f"rollout_dtype is 'fp8', but {name} has no linear layer of multiples of 16: use auto")
        if not largest <= FP8_ERROR:
            raise PMCError(f"rollout_dtype is 'fp8', but a product of {name} is off by {largest:.2g} of it: use auto")
        require_same_logps(self.model, "rollouts in 8 bits do", max(errors) - max(changes), self._computes_in())
        return float(max(changes))

    def _short_rollouts(self, sample: Sampler) -> Iterator[tuple[tuple[list[int], list[list[int]]], np.ndarray]]:
        """Yield prompts with their samples, and the log-probs that these were drawn with."""
        vocab = known_tokens(self.model)
        generator = np.random.default_rng(0)
        draw = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
        for lengths, samples in [((5, 9), 4), *(((n - 4,), 1) for n in self.recognised.wide)]:
            prompts = [generator.integers(0, vocab, n).tolist() for n in lengths]
            work = Request.checked(self.model, prompts, samples, max_new_tokens=4, max_rows=8)
            ours = sample(work, draw)
            for prompt, tokens, logps in zip(prompts, ours.tokens, ours.logps, strict=True):
                yield (prompt, tokens), np.stack(logps)

    def _plain_logps(self, prompt: list[int], samples: list[list[int]]) -> np.ndarray:
        ids = torch.tensor([prompt + tokens for tokens in samples], device=self._step.device)
        with self._step.autocast():
            return plain_logps(self.model, ids)[:, len(prompt) - 1 :].cpu().numpy()
