"""Draws from logits after what changes them: biases of a prompt, and the logits processors of a generation_config."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList

from ..models.generation import followed, not_followed, processors
from ..ops.sample_nucleus import Draws, sample_nucleus
from .request import Request


class Histories:
    """Keeps each row's history and draws from logits as `generate` would process them.

    A row of the trie is one history, so all its samples share the processed logits.

    Parameters
    ----------
    settings : dict
        From `generation.followed`. Empty: no logits processors.
    work : Request
        Its `logit_bias` is added before them.
    copies : int
        Questions of the trie for each prompt.
    """

    def __init__(self, settings: dict[str, Any], work: Request, copies: int = 1) -> None:
        self._settings, self._stops = settings, work.stop_ids
        self._biases = [(np.array(list(b)), np.array(list(b.values()), np.float32)) for b in work.logit_bias]
        self._copies = copies
        self._longest = [len(p) + n for p, n in zip(work.prompts, work.max_new, strict=True)]
        self._token_at = np.zeros(0, dtype=np.int64)  # of each slot of the pool
        # of a prompt's length and the longest total
        self._processors: dict[tuple[int, int], LogitsProcessorList] = {}

    @property
    def idle(self) -> bool:
        """Whether draws are from the model's own logits."""
        return not self._settings and not self._biases

    def draw(self, logits: torch.Tensor, plan: Any, draws: tuple[torch.Tensor, ...], **how: Any) -> Draws:
        """Draw a plan's tokens; their log-probs are those of the model's own logits."""
        if self.idle:
            return sample_nucleus(logits, *draws, **how)
        logits = logits if logits.dtype == torch.float64 else logits.float()  # processors compute in it
        changed = self._biased(logits, plan) if self._biases else logits
        changed = self._processed(changed, plan) if self._settings else changed
        drawn = sample_nucleus(changed, *draws, **how)
        rows = np.repeat(np.arange(len(logits)), np.diff(plan["cu_draws"]))
        at = torch.from_numpy(rows).to(logits.device)
        own = logits[at, drawn.tokens.clamp(min=0)] - logits.logsumexp(-1)[at]
        return replace(drawn, logps=own.double())

    def _biased(self, logits: torch.Tensor, plan: Any) -> torch.Tensor:
        biases = [self._biases[question // self._copies] for question in plan["questions"]]
        if not biases:  # a step that is a part of a prompt
            return logits
        rows = np.repeat(np.arange(len(biases)), [len(tokens) for tokens, _ in biases])
        at = torch.from_numpy(np.stack([rows, np.concatenate([tokens for tokens, _ in biases])]).astype(np.int64))
        rows, tokens = at.to(logits.device, non_blocking=True)
        bias = torch.from_numpy(np.concatenate([values for _, values in biases])).to(logits, non_blocking=True)
        out = logits.clone()
        out[rows, tokens] += bias
        return out

    def _processed(self, logits: torch.Tensor, plan: Any) -> torch.Tensor:
        groups: dict[tuple[int, int, int], list[tuple[int, np.ndarray]]] = {}
        for number, ((history, generated), question) in enumerate(
            zip(self._of(plan), plan["questions"], strict=True)
        ):
            key = len(history) - generated, self._longest[question // self._copies], len(history)
            groups.setdefault(key, []).append((number, history))
        out = logits.clone()
        for (prompt, longest, _), rows in groups.items():
            numbers, histories = zip(*rows, strict=True)
            at = torch.tensor(numbers, device=logits.device)
            ids = torch.from_numpy(np.stack(histories)).to(logits.device)
            out[at] = self._for(prompt, longest, logits.device)(ids, logits[at])
        return out

    def _of(self, plan: Any) -> list[tuple[np.ndarray, int]]:
        """Return each row's history, its own token included, and how many of its tokens belong to the answer."""
        slots, size = plan["slots"], int(plan["slots"].max()) + 1
        if size > len(self._token_at):
            self._token_at = np.concatenate([self._token_at, np.zeros(2 * size - len(self._token_at), np.int64)])
        self._token_at[slots] = plan["tokens"]
        found = []
        for row, first in zip(plan["logit_rows"], plan["cu_draws"][:-1], strict=True):
            block = int(np.searchsorted(plan["cu_rows"], row, side="right")) - 1
            prefix = plan["prefix"][plan["cu_prefix"][block] :][: plan["prefix_len"][row]]
            suffix = plan["suffix"][plan["cu_suffix"][row] : plan["cu_suffix"][row + 1]]
            found.append((self._token_at[np.concatenate([prefix, suffix])], int(plan["draw_positions"][first])))
        return found

    def _for(self, prompt: int, longest: int, device: torch.device) -> LogitsProcessorList:
        key = prompt, longest
        if key not in self._processors:
            self._processors[key] = processors(
                self._settings, prompt=prompt, longest=longest, stops=self._stops, device=device
            )
        return self._processors[key]


def settings_of(model: Any, *, sampling: bool, warned: set[str]) -> dict[str, Any]:
    """Return the generation_config's settings that are followed here; warn once of those that are not."""
    config = getattr(model, "generation_config", None)
    others = {k: v for k, v in not_followed(config, sampling=sampling).items() if k not in warned}
    warned.update(others)
    if others:
        named = ", ".join(f"{name} {value!r}" for name, value in others.items())
        warnings.warn(
            f"{type(model).__name__}: generation_config has {named}, which answers here do not follow: `generate` may "
            "say something else",
            stacklevel=3,
        )
    return followed(config)
