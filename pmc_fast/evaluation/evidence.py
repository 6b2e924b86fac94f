"""What a job shows beyond greedy answers: leak attacks and side effects, as its settings ask for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..config import EvaluationConfig
from ..data import Encoded, Encoder, Row
from ..errors import PMCError
from ..pmc.reward import choose_scorer
from ..rollout import Rollouts
from .attacks import prepare_attack
from .leakage import LeakageSettings, leakage
from .questions import EvalSet
from .side_effects import (
    WINDOW,
    TokenMass,
    answer_token_mass,
    answer_tokens,
    load_text,
    shift,
    text_windows,
)

FORGET, PARAPHRASED = "forget", "forget_paraphrased"


def leakage_settings(config: EvaluationConfig) -> LeakageSettings | None:
    """Return how `config` has a model attacked; None where it does not."""
    if not config.attack_samples:
        return None
    return LeakageSettings(
        num_samples=config.attack_samples,
        temperature=config.attack_temperature,
        top_k=config.attack_top_k,
        top_p=config.attack_top_p,
        threshold=config.leak_threshold,
        prefill=config.attack_prefill,
        first_words=config.attack_first_words,
        level=config.confidence,
        seed=config.seed,
        reward=config.reward,
    )


def check_attacks(encoder: Encoder, sets: Sequence[EvalSet], settings: LeakageSettings | None) -> None:
    """Refuse questions that leave no room once an attack begins their answers, before any model is loaded."""
    if settings is None:
        return
    for name, rows in _attacked(sets).items():
        # a truth that is not known yet has the question stand in: what is looked at is the room that it takes
        known = [Row(row.question, row.answer or str(row.question)) for row in rows]
        scorer = choose_scorer(settings.reward, [row.answer or "" for row in known])
        for change in settings.attacks().values():
            prepare_attack(encoder, known, scorer, **change, name=name)


def attack(
    engine: Callable[..., Rollouts],
    encoder: Encoder,
    sets: Sequence[EvalSet],
    settings: LeakageSettings,
    *,
    rows: Sequence[dict[str, Any]] = (),
    log_text: bool = False,
    on_attack: Callable[[str, str], None] = lambda questions, attack: None,
) -> dict[str, Any]:
    """Attack a model and return `leakage`'s result without its numbers of single questions.

    Parameters
    ----------
    engine, encoder, settings, log_text, on_attack
        As `leakage` takes them.
    sets : sequence of EvalSet
        "forget" is attacked and, where it is there, "forget_paraphrased".
    rows : sequence of dict
        What `evaluate` made of the same sets. A row that was attacked gets ``attacks``: by the attack's name
        ``worst``, ``mean`` and ``leaking``, the number of samples that leak.
    """
    attacked = _attacked(sets)
    how: dict[str, Any] = {"log_text": log_text, "on_attack": on_attack}
    found = leakage(engine, encoder, attacked[FORGET], attacked.get(PARAPHRASED), settings, **how)
    by_place = {(row["set"], row["row"]): row for row in rows}
    for name, summaries in found["sets"].items():
        for kind, summary in summaries.items():
            for numbers in summary.pop("per_question", []):
                row = by_place.get((name, numbers.pop("row") + 1))
                if row is not None:
                    row.setdefault("attacks", {})[kind] = numbers
    return found


def _attacked(sets: Sequence[EvalSet]) -> dict[str, list[Row]]:
    return {s.name: s.rows for s in sets if s.name in (FORGET, PARAPHRASED)}


@dataclass(slots=True)
class SideEffects:
    """A text that has nothing to do with the forget set, and what is looked at in it."""

    tokenizer: Any
    texts: list[str]
    windows: list[Encoded]
    window: int  # tokens of a forward pass's sequence

    @classmethod
    def read(cls, source: str, tokenizer: Any, positions: int | None) -> "SideEffects":
        """Read a text file for a model of so many positions (None: any number)."""
        texts = [load_text(source)]
        window = min(WINDOW, positions or WINDOW)
        return cls(tokenizer, texts, text_windows(tokenizer, texts, window), window)

    def tokens(self, sets: Sequence[EvalSet]) -> list[int]:
        """Return the tokens of the forget sets' answers that are followed in the text."""
        answers = [row.answer for s in sets if s.role == "forget" for row in s.rows if row.answer]
        return answer_tokens(self.tokenizer, answers, self.texts)

    def measure(self, model: Any, tokens: Sequence[int], autocast_dtype: torch.dtype | None = None) -> TokenMass:
        """Read the text with a model."""
        how: dict[str, Any] = {"window": self.window, "autocast_dtype": autocast_dtype}
        return answer_token_mass(model, self.tokenizer, self.texts, tokens, **how)

    def require_same(self, other: "SideEffects") -> None:
        """Refuse to compare models that read the text as other tokens."""
        if self.windows != other.windows:
            raise PMCError(
                "side_effects_text: --before and --model have different tokenizers, so their probabilities do not "
                "compare: leave --side-effects-text or --before out"
            )


def with_side_effects(scores: dict[str, dict[str, Any]], masses: dict[str, TokenMass]) -> dict[str, Any]:
    """Put each model's perplexity and answer-token mass into its `scores`, and return `shift` where there are two."""
    for when, mass in masses.items():
        scores[when]["perplexity"] = mass.perplexity
        scores[when]["answer_token_mass"] = float(mass.mass.mean())
    return {"side_effects": shift(masses["before"], masses["after"])} if len(masses) == 2 else {}
