"""The published PMC algorithm, line by line, in plain torch and Hugging Face generate.

Tests compare the fast implementation with it, and benchmarks use it as their baseline. It has the published costs
(N copies of every prompt, padding to max_length, a forward for each loss) and is not optimised. Steps are numbered as in
arXiv 2507.04219, section 4.

Three quirks of the published code are reproduced where ``config.accidents`` is set:

- it drops the first 8 characters of every tagged sample, whether or not they are "Answer: ";
- chat prompts are rendered and then tokenised with special tokens: Llama gets a second BOS;
- special tokens other than eos do not end a sample.

A fourth is always reproduced: max_length counts the left padding of the batch that a prompt is sampled in.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from .config import PMCConfig, UnlearnConfig
from .data import Encoded, Encoder, Question, Row, collate, is_text
from .errors import PMCError
from .models.context import eval_mode
from .models.generation import followed
from .pmc.schedule import Schedule, micro_batches

# settings of PMCConfig that the published algorithm does not have
EXTENSIONS = (
    "selection", "normalization", "answer_penalty", "resample_above", "rollout_batch_size", "question_dropout",
    "max_length_ratio", "retain_loss", "retain_order", "retain_per_question",
)  # fmt: skip


class Reference:
    """PMC for one model and one list of forget questions.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, which `loss(...).backward()` and an optimizer train in place.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its tokenizer; not changed.
    config : PMCConfig
        num_samples, temperature, top_k, top_p, retain_weight (lambda), min_len, max_length.
    questions : Sequence[Question]
        The forget questions. Their true answers are not needed.
    reward : callable, optional
        (initial [Q], candidates [Q][N]) -> [Q, N]; `rouge_score_recall` by default.
    autocast : callable, optional
        Returns the context in which the model computes, such as torch.autocast.
    tracked_answers : Sequence[str], optional
        True answers; turn on the published third forward pass (the forget loss, for a plot).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: PMCConfig,
        questions: Sequence[Question],
        *,
        reward: Callable[..., np.ndarray] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tracked_answers: Sequence[str] | None = None,
    ) -> None:
        for name in EXTENSIONS:
            if (value := getattr(config, name)) != getattr(PMCConfig, name):
                raise PMCError(f"{name} is {value!r}, which the published algorithm does not have: use pmc_fast.PMC")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.questions = list(questions)
        if any(map(is_text, self.questions)):
            raise PMCError("the published algorithm has no texts that are to be continued: use pmc_fast.PMC")
        self.encoder = Encoder(tokenizer, config, None if config.accidents else model.generation_config)
        self.reward = reward or rouge_score_recall
        self.autocast = autocast
        self.tracked_answers = tracked_answers
        self.initial_answers: list[str] = []
        self.sampled_data: dict[int, dict[str, Any]] = {}
        self.draws = 0
        self.sampled_tokens = 0

    # step 1
    def prepare(self, batch_size: int = 32) -> list[str]:
        """Answer every forget question greedily with the untouched model: y_i."""
        self.initial_answers = self.greedy_answers(self.questions, batch_size)
        return self.initial_answers

    # step 3
    def sample(self, indices: Sequence[int]) -> list[str]:
        """Sample answers to the questions that need it, store the better ones, return the stored ones."""
        asked = [i for i in indices if i not in self.sampled_data or self.sampled_data[i]["score"] > 0]
        if asked:
            candidates = self.sample_answers([self.questions[i] for i in asked])
            self.keep(asked, candidates)
        return [self.sampled_data[i]["answer"] for i in indices]

    def keep(self, asked: Sequence[int], candidates: Sequence[Sequence[str]]) -> np.ndarray:
        """Score candidates [Q][N] and store each question's first arg-min; return the scores [Q, N]."""
        initial = [self.initial_answers[i] for i in asked]
        scores = self.reward(initial, candidates, self.config.min_len)
        for row, (i, pick) in enumerate(zip(asked, scores.argmin(axis=1), strict=True)):
            score = float(scores[row, pick])
            if i in self.sampled_data and score > self.sampled_data[i]["score"]:
                continue
            self.sampled_data[i] = {"answer": candidates[row][pick], "score": score}
        return scores

    # step 4
    def loss(self, indices: Sequence[int], retain: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return loss = collapse + lambda * retain, and its parts, of one micro-batch."""
        pairs = [(self.questions[i], self.sampled_data[i]["answer"]) for i in indices]
        collapse_loss = self.cross_entropy(pairs)
        retain_loss = self.cross_entropy([(row.question, row.answer or "") for row in retain])
        parts = {
            "loss": collapse_loss + self.config.retain_weight * retain_loss,
            "collapse_loss": collapse_loss.detach(),
            "retain_loss": retain_loss.detach(),
        }
        if self.tracked_answers is not None:
            with torch.no_grad():
                truths = [(self.questions[i], self.tracked_answers[i]) for i in indices]
                parts["forget_loss"] = self.cross_entropy(truths)
        return parts

    def progress(self) -> dict[str, float]:
        """Return the mean stored score and the number of questions that will be sampled again."""
        scores = [entry["score"] for entry in self.sampled_data.values()]
        pending = len(self.questions) - sum(score == 0 for score in scores)
        return {"mean_score": sum(scores) / len(scores), "pending": pending}

    def cross_entropy(self, pairs: Sequence[tuple[Question, str]]) -> torch.Tensor:
        """Mean cross-entropy over the answer tokens of a batch padded to max_length."""
        batch = collate([self.encoder.pair(q, a) for q, a in pairs], self.encoder.pad, length=self.config.max_length)
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        with self.autocast():
            return self.model(**batch).loss

    def sample_answers(self, questions: Sequence[Question]) -> list[list[str]]:
        """Sample N answers to each question from the current model: temperature, top_k, top_p."""
        c, n = self.config, self.config.num_samples
        with torch.random.fork_rng():  # leaves the caller's generator unchanged
            torch.manual_seed(int(np.random.SeedSequence([c.seed, self.draws]).generate_state(1)[0]))
            generated = self.generate(
                questions, n, do_sample=True, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p
            )
        self.draws += 1
        texts = self.encoder.samples(generated)
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def greedy_answers(self, questions: Sequence[Question], batch_size: int = 32) -> list[str]:
        """Answer questions greedily, a batch at a time."""
        answers: list[str] = []
        for i in range(0, len(questions), batch_size):
            generated = self.generate(questions[i : i + batch_size], 1, do_sample=False)
            answers += self.encoder.answers(generated)
        return answers

    @torch.no_grad()
    def generate(self, questions: Sequence[Question], copies: int, **sampling: Any) -> list[list[int]]:
        """Answer questions as one padded batch with Hugging Face generate; return padded ids, `copies` a question."""
        prompts = [Encoded(ids, ids) for ids in map(self.encoder.prompt, questions)]
        batch = collate(prompts, self.encoder.pad, side="left")
        width = batch["input_ids"].shape[1]
        model = self.model
        own_settings = model.generation_config
        try:
            # the checkpoint's settings that depend on the history (penalties, suppressed tokens) are kept
            model.generation_config = GenerationConfig(**followed(own_settings))
            with eval_mode(model), self.autocast():
                output = model.generate(
                    batch["input_ids"].repeat_interleave(copies, dim=0).to(model.device),
                    attention_mask=batch["attention_mask"].repeat_interleave(copies, dim=0).to(self.model.device),
                    max_length=self.config.max_length,
                    pad_token_id=self.encoder.pad,
                    eos_token_id=self.encoder.stops,
                    **sampling,
                )
        finally:
            model.generation_config = own_settings
        generated = output[:, width:].tolist()
        self.sampled_tokens += sum(answer_length(ids, self.encoder.stops) for ids in generated)
        return generated


def rouge_score_recall(initial: Sequence[str], candidates: Sequence[Sequence[str]], min_len: int = 0) -> np.ndarray:
    """Score with the rouge_score package, as published; see `pmc_fast.pmc.reward.rouge_l_recall`."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = []
    for target, texts in zip(initial, candidates, strict=True):
        for text in texts:
            score = scorer.score(target, text)["rougeL"].recall
            words = len(text.strip().split(" "))
            if min_len != 0 and words < min_len:
                score = min(score + np.exp(-words), 1)
            scores.append(score)
    return np.array(scores, dtype=np.float64).reshape(len(initial), -1)


def answer_length(ids: Sequence[int], stops: Sequence[int]) -> int:
    """Return how many of generated ids are the answer: up to the first token that ends it."""
    return next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))


def train(
    pmc: Reference,
    retain: Sequence[Row],
    config: UnlearnConfig,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Unlearn with the published loop: each micro-batch samples, keeps the best answers, trains beside retain pairs.

    Parameters
    ----------
    pmc : Reference
        Prepared; its model is trained in place.
    retain : Sequence[Row]
    config : UnlearnConfig
    on_step : callable
        Called with each step's record.

    Returns
    -------
    list of dict
        One record a step: losses, mean stored score, questions pending, tokens sampled, seconds.

    Raises
    ------
    PMCError
        The loss or the weights are not finite; the error names the step. Or max_seconds is set.
    """
    model, count = pmc.model, len(pmc.questions)
    schedule, trained = Schedule.plan(config, count), [p for p in model.parameters() if p.requires_grad]
    if (steps := schedule.steps) is None:
        raise PMCError(f"max_seconds is {config.max_seconds}: the published loop has no clock; use max_steps")
    optimizer, rate = _optimizer(trained, config, schedule.steps_per_epoch, steps)
    retain_order = torch.Generator().manual_seed(config.seed + 1)
    model.train()
    history: list[dict[str, Any]] = []
    for step, batches in zip(range(1, steps + 1), micro_batches(config, count), strict=False):
        record: dict[str, Any] = {"step": step, "learning_rate": rate.get_last_lr()[0]}
        sampled_before, seconds = pmc.sampled_tokens, {"rollout": 0.0, "train": 0.0}
        diverged = _diverged(step, steps, config)
        losses = []
        for indices in batches:
            draws = torch.randint(len(retain), (len(indices),), generator=retain_order)
            pairs = [retain[i] for i in draws.tolist()]
            losses.append(_micro_batch(pmc, indices, pairs, len(batches), seconds, diverged))
        start = time.perf_counter()
        optimizer.step()
        if not torch.isfinite(torch.stack([p.detach().sum() for p in trained]).sum()):
            raise diverged  # before the next sampling, which on CUDA would end in a device-side assert
        rate.step()
        optimizer.zero_grad()
        seconds["train"] += time.perf_counter() - start
        record |= {name: sum(part[name] for part in losses) / len(losses) for name in losses[0]}
        record |= pmc.progress()
        record |= {
            "sampled_tokens": pmc.sampled_tokens - sampled_before,
            "rollout_seconds": seconds["rollout"],
            "train_seconds": seconds["train"],
        }
        history.append(record)
        on_step(record)
    model.eval()
    return history


def _diverged(step: int, steps: int, config: UnlearnConfig) -> PMCError:
    return PMCError(
        f"training diverged at step {step} of {steps} (NaN or infinite loss): nothing was written; "
        f"try a learning_rate below {config.learning_rate:g}"
    )


def _micro_batch(
    pmc: Reference,
    indices: Sequence[int],
    retain: Sequence[Row],
    per_step: int,
    seconds: dict[str, float],
    diverged: PMCError,
) -> dict[str, float]:
    """Sample a micro-batch's questions, backward its share of the loss; return the losses, add to `seconds`."""
    start = time.perf_counter()
    try:
        pmc.sample(indices)
    except RuntimeError as error:  # torch.multinomial refuses the logits of weights that overflowed
        if "probability tensor contains" in str(error):
            raise diverged from error
        raise
    sampled = time.perf_counter()
    parts = pmc.loss(indices, retain)
    (parts["loss"] / per_step).backward()
    losses = {name: value.item() for name, value in parts.items()}
    if not math.isfinite(losses["loss"]):
        raise diverged
    seconds["rollout"] += sampled - start
    seconds["train"] += time.perf_counter() - sampled
    return losses


def _optimizer(
    parameters: list[torch.nn.Parameter], config: UnlearnConfig, warmup: int, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return AdamW with one epoch of linear warm-up from 0, then linear decay to 0; gradients are not clipped."""
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    decay = max(1, steps - warmup)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else max(0.0, (steps - step) / decay)
    )
