"""The losses of `pmc_fast.methods` as one writes them with transformers: padded batches, all logits, autograd.

Formulas are the papers' and share no code with `pmc_fast`: `benchmarks.methods` compares both before it times them.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Batches = Mapping[str, Mapping[str, torch.Tensor]]  # forget, template (refusals), retain: as `collate` makes them


@dataclass
class Answers:
    """What a model says of a padded batch: log-probs of the whole vocabulary and of the labels, and which labels count."""

    every: torch.Tensor  # [B, T - 1, V], float32
    own: torch.Tensor  # [B, T - 1], 0 where nothing is trained
    counted: torch.Tensor  # [B, T - 1]

    @property
    def ce(self) -> torch.Tensor:
        return -self.own.sum() / self.counted.sum()

    @property
    def sums(self) -> torch.Tensor:
        return self.own.sum(1)

    @property
    def lengths(self) -> torch.Tensor:
        return self.counted.sum(1)

    @property
    def mean_probs(self) -> torch.Tensor:
        return (self.own.exp() * self.counted).sum(1) / self.lengths


def answers(model: Any, batch: Mapping[str, torch.Tensor]) -> Answers:
    """Run a padded batch through a model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    every = logits[:, :-1].float().log_softmax(-1)
    labels = batch["labels"][:, 1:]
    counted = labels >= 0
    own = every.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return Answers(every, own * counted, counted)


def kl(before: Answers, now: Answers) -> torch.Tensor:
    """Return KL(before || now), the mean over the tokens that count."""
    rows = F.kl_div(now.every, before.every, reduction="none", log_target=True).sum(-1)
    return (rows * now.counted).sum() / now.counted.sum()


# --- formulas: of what the model says, what the untouched one said, and the method's parameters

Said = Mapping[str, Answers]
Formula = Callable[[Said, Mapping[str, torch.Tensor], Said, Any], torch.Tensor]


def dpo(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    preferred, other = (said[kind].sums - reference[kind] for kind in ("template", "forget"))
    return -F.logsigmoid(m.beta * (preferred - other)).mean()


def npo(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    return -2 / m.beta * F.logsigmoid(-m.beta * (said["forget"].sums - reference["forget"])).mean()


def simnpo(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    a_token = said["forget"].sums / said["forget"].lengths
    return -2 / m.beta * F.logsigmoid(-m.beta * a_token - m.gamma).mean()


def flat(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    """FLAT with the KL divergence, its default."""
    return ((said["forget"].mean_probs - 1).exp() - said["template"].mean_probs).mean()


def mollm(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    a = said["forget"]
    return -((-a.own.exp() / 2).log1p() * a.counted).sum() / a.counted.sum()


def eul(said: Said, reference: Mapping[str, torch.Tensor], before: Said, m: Any) -> torch.Tensor:
    apart = {kind: kl(before[kind], said[kind]) for kind in ("forget", "retain")}
    return m.alpha * apart["retain"] - (1 - m.alpha) * apart["forget"] - m.gamma * said["forget"].ce


FORMULAS: dict[str, Formula] = {
    "pmc": lambda said, reference, before, m: said["forget"].ce,  # on the picked samples
    "ga": lambda said, reference, before, m: -said["forget"].ce,
    "grad_diff": lambda said, reference, before, m: -said["forget"].ce,
    "idk": lambda said, reference, before, m: said["template"].ce,
    "dpo": dpo,
    "npo": npo,
    "simnpo": simnpo,
    "flat": flat,
    "mollm": mollm,
    "icu": lambda said, reference, before, m: -said["forget"].ce + m.beta * kl(before["retain"], said["retain"]),
    "eul": eul,
    "memorize": lambda said, reference, before, m: said["forget"].ce + m.beta * kl(before["retain"], said["retain"]),
    "retain_only": lambda said, reference, before, m: said["retain"].own.new_zeros(()),
}
DIVERGING = {"icu": ("retain",), "eul": ("forget", "retain"), "memorize": ("retain",)}
REFERENCE = {"dpo": ("forget", "template"), "npo": ("forget",)}
APART = ("mollm",)  # the gradients of objective and retain loss are combined


class Plain:
    """A method's step on padded batches. Made while the model is untouched.

    Parameters
    ----------
    name : str
        A key of FORMULAS.
    method : object
        Its parameters, such as `beta`; `retain_weight`.
    model : transformers.PreTrainedModel
    batches : mapping
        Those that the step trains on, by kind.
    """

    def __init__(self, name: str, method: Any, model: Any, batches: Batches) -> None:
        self.name, self.method, self.model, self.batches = name, method, model, batches
        self.frozen = copy.deepcopy(model).requires_grad_(False) if name in DIVERGING else None
        with torch.no_grad():
            self.reference = {kind: answers(model, batches[kind]).sums for kind in REFERENCE.get(name, ())}

    def backward(self) -> float:
        """Add the gradients of a step to the parameters' `.grad`, and return the loss."""
        if self.name in APART:
            return self._combined()
        loss = self._loss()
        loss.backward()
        return loss.item()

    def _loss(self) -> torch.Tensor:
        said = {kind: answers(self.model, batch) for kind, batch in self.batches.items()}
        with torch.no_grad():
            before = {kind: answers(self.frozen, self.batches[kind]) for kind in DIVERGING.get(self.name, ())}
        loss = FORMULAS[self.name](said, self.reference, before, self.method)
        if self.method.retain_weight:
            loss = loss + self.method.retain_weight * said["retain"].ce
        return loss

    def _combined(self) -> float:
        """MGDA for two tasks: the shortest convex combination of two gradients."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        objective = FORMULAS[self.name]({"forget": answers(self.model, self.batches["forget"])}, {}, {}, self.method)
        forget = torch.autograd.grad(objective, parameters)
        kept = self.method.retain_weight * answers(self.model, self.batches["retain"]).ce
        retain = torch.autograd.grad(kept, parameters)
        apart = torch.stack([(r - f).square().sum() for f, r in zip(forget, retain, strict=True)]).sum()
        across = torch.stack([((f - r) * f).sum() for f, r in zip(forget, retain, strict=True)]).sum()
        rest = (across / apart).clamp(0, 1)  # where it is next to 0, 1 - share would have no digits
        for p, f, r in zip(parameters, forget, retain, strict=True):
            p.grad = (1 - rest) * f + rest * r
        return (objective + kept).item()
