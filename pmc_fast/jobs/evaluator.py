"""Every measurement of one model: greedy answers and their scores, TOFU, leak attacks, side effects."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import EvaluateConfig, EvaluationConfig
from ..data import Encoded, Encoder, Question
from ..evaluation import (
    EvalSet,
    TofuSet,
    TokenMass,
    UnrelatedText,
    answer_token_mass,
    evaluate,
    evaluate_tofu,
    greedy_answers,
    leakage,
    mean_nlls,
    shift,
)
from ..models.packed_forward import PackedPass
from ..rollout import Rollouts
from .progress import Monitor, Silent, Stages


@dataclass(slots=True)
class Suite:
    """What is asked of a model."""

    config: EvaluationConfig  # how answers are compared, the attacks, the size of a forward pass
    sets: list[EvalSet]
    tofu: list[TofuSet] = field(default_factory=list)  # none: the sets are scored without TOFU's metrics
    retain_ratios: np.ndarray | None = None
    candidates: dict[str, list[list[Encoded]]] = field(default_factory=dict)  # by the name of TOFU's sets
    text: UnrelatedText | None = None
    tokens: list[int] = field(default_factory=list)  # those that are followed in the text


@dataclass(slots=True)
class Results:
    """What was measured of each model, "before" or "after"."""

    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # every question's numbers
    masses: dict[str, TokenMass] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Return each model's scores and, of two models, the side effects."""
        both = len(self.masses) == 2
        return self.scores | ({"side_effects": shift(self.masses["before"], self.masses["after"])} if both else {})


class Evaluator:
    """Measures one model.

    Parameters
    ----------
    engine : callable
        A RolloutEngine or SharedEngine of the model.
    encoder : Encoder
    packed : PackedPass, optional
        Of the model, for likelihoods.
    monitor : Monitor, optional
        Shows each set and attack before it begins.
    """

    def __init__(
        self,
        engine: Callable[..., Rollouts],
        encoder: Encoder,
        packed: PackedPass | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.engine, self.encoder, self.packed = engine, encoder, packed
        self.monitor = monitor or Silent()
        self._answers: dict[Question, str] = {}

    def _checked_pass(self) -> PackedPass:
        assert self.packed is not None
        self.packed.check()  # compares with the model's own forward pass once
        return self.packed

    def weights_changed(self) -> None:
        """Forget the answers of the model as it was."""
        self._answers.clear()

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """Return the model's greedy answers; each question is asked once until `weights_changed`."""
        if new := [question for question in questions if question not in self._answers]:
            self.add_answers(dict(zip(new, greedy_answers(self.engine, self.encoder, new), strict=True)))
        return [self._answers[question] for question in questions]

    def add_answers(self, answers: Mapping[Question, str]) -> None:
        """Take over greedy answers of the model that are known already."""
        self._answers.update(answers)

    def measure(self, when: str, suite: Suite, results: Results, stages: Stages, title: str) -> None:
        """Add everything that a suite asks of the model to `results`; `title` ends the stages' names."""
        rows: list[dict[str, Any]] = []
        with stages(f"evaluation{title}"):
            scores = self.scores(suite, rows)
        if suite.config.attack_samples:
            with stages(f"leak attacks{title}"):
                scores["leakage"] = self.leakage(suite, rows)
        if suite.text:
            with stages(f"side effects{title}"):
                mass = answer_token_mass(self._checked_pass(), suite.text.windows, suite.tokens)
            scores |= {"perplexity": mass.perplexity, "answer_token_mass": float(mass.mass.mean())}
            results.masses[when] = mass
        results.scores[when] = scores
        results.rows += [{"model": when, **row} for row in rows]

    def scores(self, suite: Suite, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Score greedy answers, with TOFU's metrics if the suite has its sets; see `evaluate`, `evaluate_tofu`."""
        config = suite.config
        options: dict[str, Any] = {
            "reward": config.reward,
            "log_text": config.log_text,
            "on_set": lambda s: self.monitor.stage(f"  {s.name}: {len(s.rows)} questions"),
            "rows": rows,
        }
        if not suite.tofu:
            return evaluate(self.answers, suite.sets, **options)
        assert isinstance(config, EvaluateConfig)

        def nlls(s: TofuSet) -> list[list[float]]:
            groups = suite.candidates[s.name]
            self.monitor.stage(f"  {s.name}: likelihood of {sum(map(len, groups))} answers")
            return self.mean_nlls(groups, config.max_tokens)

        return evaluate_tofu(
            self.answers,
            nlls,
            suite.tofu,
            variant=config.truth_ratio,
            retain_ratios=suite.retain_ratios,
            **options,
        )

    def mean_nlls(self, groups: Sequence[Sequence[Encoded]], max_tokens: int) -> list[list[float]]:
        """Return the mean loss of each answer's tokens; see `evaluation.mean_nlls`."""
        return mean_nlls(self._checked_pass(), groups, max_tokens=max_tokens)

    def leakage(self, suite: Suite, rows: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Attack the forget sets; see `evaluation.leakage`.

        Numbers of single questions go into `rows`, where they are given: a row that was attacked gets ``attacks``, by
        the attack's name ``worst``, ``mean`` and ``leaking``, the number of samples that leak.
        """
        found = leakage(
            self.engine,
            self.encoder,
            suite.sets,
            suite.config,
            log_text=suite.config.log_text,
            on_attack=lambda questions, attack: self.monitor.stage(f"  {questions}: {attack}"),
        )
        if rows is not None:
            by_place = {(row["set"], row["row"]): row for row in rows}
            for name, summaries in found["sets"].items():
                for attack, summary in summaries.items():
                    for numbers in summary.pop("per_question", []):
                        row = by_place[name, numbers.pop("row") + 1]
                        row.setdefault("attacks", {})[attack] = numbers
        return found
