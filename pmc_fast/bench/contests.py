"""What `pmc-fast bench` measures: rollouts, a training step and weighted_nll, each beside its baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from ..config import BenchConfig
from ..data import Encoded, Question, Row
from ..errors import PMCError
from ..models.context import eval_mode, plain_logps, tolerance
from ..models.generation import followed
from ..models.lm_head import output_head
from ..models.loading import LoadedModel
from ..ops import weighted_nll
from ..ops.nll_reference import transform_logits
from ..pmc.algorithm import PMC
from ..reference import Reference, answer_length
from ..utils.labels import IGNORED
from .measure import Contestant, optimizer_step
from .table import OURS


@dataclass(slots=True)
class Way:
    """A contestant: what it computes, for the comparison before it is timed, and what is timed."""

    output: Callable[[], Any]
    run: Contestant
    counted: list[dict[str, float]] = field(default_factory=list)  # by each run


@dataclass(slots=True)
class Contest:
    """Ways to compute the same thing, ours first; `compare` refuses outputs that differ, or says how equal they are."""

    name: str
    ways: dict[str, Way]
    compare: Callable[[Any, Any], str]
    before: Callable[[], Any] = lambda: None  # between the comparison and what is measured
    facts: dict[str, Any] = field(default_factory=dict)


class Workload:
    """A model with questions and pairs to keep, for PMC and for the published algorithm.

    Parameters
    ----------
    loaded : LoadedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    config : BenchConfig
    forget : sequence of Row
        The questions of the rollout and of the step.
    retain : sequence of Row
        As many pairs.
    warn : callable
        Called with each warning.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tokenizer: Any,
        config: BenchConfig,
        forget: Sequence[Row],
        retain: Sequence[Row],
        warn: Callable[[str], None],
    ) -> None:
        self.loaded, self.model, self.config, self.retain = loaded, loaded.model, config, retain
        self.questions: list[Question] = [row.question for row in forget]
        settings = config.pmc()
        self.pmc = PMC(self.model, tokenizer, settings, self.questions, autocast_dtype=loaded.autocast_dtype)
        # without rewards: answers are put into both stores
        self.reference = Reference(self.model, tokenizer, settings, self.questions, autocast=loaded.autocast)
        self.kept = self.pmc.encode_retain(retain, "retain", warn=warn)
        # generate counts the padding of a batch as part of its length, so all answers end after as many tokens
        self.longest = config.max_length - max(map(len, self.pmc.prompts))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.loaded.autocast_dtype or next(self.model.parameters()).dtype

    def rollout(self, num_samples: int, **how: Any) -> Any:
        """Sample answers to the questions by the engine."""
        return self.pmc.engine(
            self.pmc.prompts, num_samples=num_samples, max_new_tokens=self.longest, stop_ids=self.pmc.encoder.stops,
            as_generate=True, **how,
        )  # fmt: skip

    def sampling(self) -> dict[str, Any]:
        c = self.config
        return {"temperature": c.temperature, "top_k": c.top_k, "top_p": c.top_p}


# --- rollouts


def rollouts(work: Workload) -> Contest:
    """N samples of each question, against Hugging Face generate on N copies; greedy answers are compared."""
    c, drafts = work.config, list[Any]()
    ours, theirs = Way(lambda: greedy(), lambda: sample()), Way(lambda: generate_greedily(), lambda: generate())

    def greedy() -> list[list[int]]:
        made = [tokens for [tokens] in work.rollout(1, temperature=0).tokens]
        drafts[:] = [[tokens] for tokens in made]  # as in a run, whose initial answers are the drafts of its samples
        return made

    def sample() -> None:
        counters = work.rollout(
            c.num_samples, seed=c.seed + len(ours.counted), drafts=drafts or None, **work.sampling()
        ).counters
        ours.counted.append(_rates(counters["sampled_tokens"], counters["rows"], counters["steps"]))

    def generate_greedily() -> list[list[int]]:
        made = work.reference.generate(work.questions, 1, do_sample=False)
        return [ids[: answer_length(ids, work.pmc.encoder.stops)] for ids in made]

    def generate() -> None:
        with torch.random.fork_rng():  # leaves the caller's generator unchanged
            torch.manual_seed(c.seed + len(theirs.counted))
            made = work.reference.generate(work.questions, c.num_samples, do_sample=True, **work.sampling())
        tokens = sum(answer_length(ids, work.pmc.encoder.stops) for ids in made)
        # its first pass is the prompts', whose rows are not counted
        theirs.counted.append(_rates(tokens, len(made) * (len(made[0]) - 1), len(made[0])))

    return Contest(
        f"rollouts, {len(work.questions)} questions x {c.num_samples}",
        {OURS: ours, "generate": theirs},
        lambda a, b: same_answers(work, a, b),
        before=work.pmc.engine.release,  # so that the first rollout takes all that it needs
    )


def _rates(tokens: int, rows: int, steps: int) -> dict[str, float]:
    return {"tokens": tokens, "rows": rows, "steps": steps, "rows_per_token": rows / max(1, tokens)}


def same_answers(work: Workload, ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """Compare greedy answers token by token, and say how many are equal.

    Raises
    ------
    PMCError
        Answers part at tokens between which the model's own forward pass decides by more than rounding.
    """
    pairs = list(zip(work.pmc.prompts, ours, theirs, strict=True))
    differing = [(prompt, list(a), list(b)) for prompt, a, b in pairs if list(a) != list(b)]
    equal = f"greedy answers: {len(pairs) - len(differing)} of {len(pairs)} equal"
    if not differing:
        return equal
    if asked := followed(work.model.generation_config):
        return f"{equal}; the others were not judged, since generation_config sets {', '.join(asked)}"
    most = 2 * tolerance(work.dtype).logps  # each of two log-probs may be off by it
    for prompt, a, b in differing:
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if at == min(len(a), len(b)):
            raise PMCError(
                f"greedy answers of pmc_fast and generate are of {len(a)} and {len(b)} tokens: they don't end alike, so "
                "their times are not compared"
            )
        ids = torch.tensor([prompt + a[: at + 1], prompt + b[: at + 1]], device=work.model.device)
        with work.loaded.autocast():
            gap = float(plain_logps(work.model, ids)[:, -1].diff().abs())
        if not gap <= most:
            raise PMCError(
                f"greedy answers of pmc_fast and generate part at tokens whose log-probs differ by {gap:.3g}, more than "
                f"rounding ({most:.2g}): they don't compute the same, so their times are not compared"
            )
    return f"{equal}; the others part at tokens that rounding decides between"


# --- a training step


def training_step(work: Workload) -> Contest:
    """Loss, backward and AdamW on sampled answers and retain pairs, against the published step; losses are compared.

    The published step pads to max_length. Its third forward pass, for a plot, is left out. AdamW is the same for both,
    with learning rate 0: weights stay as they are.
    """
    count, model = len(work.questions), work.model
    tokens = work.rollout(1, seed=work.config.seed, **work.sampling()).tokens
    answers = work.pmc.encoder.samples([t for [t] in tokens])
    work.pmc.initial_answers = answers  # nothing is scored: each question trains on one sample
    for i, answer in enumerate(answers):
        work.pmc.store.offer(i, [[answer, 1.0]], 0.0)
        work.reference.sampled_data[i] = {"answer": answer, "score": 0.0}
    step = work.pmc.sample(range(count))
    computed = {"computed_tokens": 0.0}

    def ours() -> torch.Tensor:
        made = work.pmc.loss(step, work.kept)
        computed["computed_tokens"] = made.counters["tokens"]
        return made.loss

    def theirs() -> torch.Tensor:
        computed["computed_tokens"] = 2 * count * work.config.max_length
        return work.reference.loss(range(count), work.retain)["loss"]

    model.train()
    optimizer = _optimizer(model)

    def way(loss: Callable[[], torch.Tensor]) -> Way:
        made = Way(lambda: _value(model, loss), lambda: run())
        update = optimizer_step(lambda: loss().backward(), optimizer)

        def run() -> None:
            update()
            made.counted.append(dict(computed))

        return made

    return Contest(
        f"training step, {count} + {count} rows",
        {OURS: way(ours), "published step": way(theirs)},
        lambda a, b: same_numbers("losses", a, b, (1 + work.pmc.config.retain_weight) * tolerance(work.dtype).logps),
    )


def _value(model: Any, loss: Callable[[], torch.Tensor]) -> float:
    with eval_mode(model):  # dropout draws differ
        return loss().item()


def _optimizer(model: Any) -> torch.optim.Optimizer:
    """Return AdamW with its state in memory: it belongs to no contestant's peak."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def same_numbers(what: str, ours: float, theirs: float, most: float) -> str:
    """Refuse two numbers that differ by more than `most`; NaN does."""
    if not abs(ours - theirs) <= most:
        raise PMCError(
            f"{what} of pmc_fast and the baseline are {ours:.6g} and {theirs:.6g}, which differ by more than rounding "
            f"({most:.2g}): they don't compute the same, so their times are not compared"
        )
    return f"{what}: {ours:.5g} and {theirs:.5g}, within rounding"


# --- weighted_nll


def head_alone(work: Workload) -> Contest:
    """weighted_nll on the step's hidden rows, forward and backward, against torch with all logits; losses are compared."""
    sequences = [
        *(work.pmc.encoder.pair(q, work.reference.sampled_data[i]["answer"]) for i, q in enumerate(work.questions)),
        *work.kept,
    ]
    head = output_head(work.model)
    weight, bias = (None if t is None else t.detach().requires_grad_() for t in (head.weight, head.bias))
    assert weight is not None
    hidden, targets = _hidden_rows(work, sequences)
    scale = torch.full(targets.shape, 1 / len(targets), device=hidden.device)

    def ours() -> torch.Tensor:
        options = head.options() | {"bias": bias}
        return weighted_nll(hidden, weight, targets, scale, **options)[0]

    def theirs() -> torch.Tensor:
        logits = transform_logits(hidden @ weight.T, bias, 1.0, head.softcap, head.logit_scale)
        return F.cross_entropy(logits.float(), targets, reduction="none").mul(scale).sum()

    def way(loss: Callable[[], torch.Tensor]) -> Way:
        def forward() -> torch.Tensor:
            with work.loaded.autocast():
                return loss()

        def run() -> None:
            try:
                forward().backward()
            finally:
                for t in (hidden, weight, bias):
                    if t is not None:
                        t.grad = None

        return Way(lambda: forward().item(), run)

    rows, vocabulary = len(targets), weight.shape[0]
    return Contest(
        f"weighted_nll, {rows} rows x {vocabulary:,}",
        {OURS: way(ours), "torch": way(theirs)},
        lambda a, b: same_numbers("losses", a, b, tolerance(work.dtype).logps),
    )


@torch.no_grad()
def _hidden_rows(work: Workload, sequences: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden rows that predict a trained token, [M, D], and these tokens, [M]."""
    model, rows, targets = work.model, [], []
    with eval_mode(model), work.loaded.autocast():
        for s in sequences:
            ids, labels = (torch.tensor(x, device=model.device) for x in (s.input_ids, s.labels))
            last = model(ids[None], output_hidden_states=True, use_cache=False).hidden_states[-1][0]
            counted = labels[1:] != IGNORED
            rows.append(last[:-1][counted])
            targets.append(labels[1:][counted])
    weight = model.get_output_embeddings().weight
    return torch.cat(rows).to(weight.dtype).requires_grad_(), torch.cat(targets)


CONTESTS: Mapping[str, Callable[[Workload], Contest]] = {
    "rollouts": rollouts,
    "training step": training_step,
    "weighted_nll": head_alone,  # of the step's rows
}
