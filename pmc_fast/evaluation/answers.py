"""A model's greedy answers, all questions at once on the rollout engine."""

from collections.abc import Callable, Sequence

from ..data import Encoder
from ..rollout import RolloutEngine


def greedy_answers(
    engine: RolloutEngine,
    encoder: Encoder,
    questions: Sequence[str],
    *,
    prompt: Callable[[str], list[int]] | None = None,
) -> list[str]:
    """Answer questions greedily.

    Parameters
    ----------
    engine : RolloutEngine
    encoder : Encoder
        Its prompts, stop tokens and max_length.
    questions : Sequence[str]
    prompt : callable, optional
        Question -> token ids, where they are not the encoder's.

    Returns
    -------
    list of str
    """
    prompts = [(prompt or encoder.prompt)(question) for question in questions]
    rollouts = engine(prompts, num_samples=1, temperature=0, max_length=encoder.max_length, stop_ids=encoder.stops)
    return encoder.answers([tokens for [tokens] in rollouts.tokens])
