"""A model's greedy answers, all questions at once on the rollout engine."""

from collections.abc import Callable, Sequence

from ..data import Encoder, Question
from ..rollout import Rollouts


def greedy_answers(engine: Callable[..., Rollouts], encoder: Encoder, questions: Sequence[Question]) -> list[str]:
    """Answer questions greedily, as `generate` would, with the encoder's prompts, stop tokens and max_length."""
    prompts = [encoder.prompt(question) for question in questions]
    rollouts = engine(
        prompts,
        num_samples=1,
        temperature=0,
        max_length=encoder.max_length,
        stop_ids=encoder.stops,
        as_generate=True,
    )
    return encoder.answers([tokens for [tokens] in rollouts.tokens])
