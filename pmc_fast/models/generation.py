"""Settings of a model's generation_config: those that rollouts follow as `generate` does, and those that they do not."""

from collections.abc import Sequence
from typing import Any

import transformers as tf

# Functions of a token's history, applied to its logits before temperature, in generate's order.
FOLLOWED = (
    "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
)  # fmt: skip
# Searches, other models' logits, other ends of an answer; with the values that have no effect.
NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "guidance_scale": (1, 1.0), "penalty_alpha": (0,), "dola_layers": (), "stop_strings": (),
    "watermarking_config": (), "token_healing": (False,), "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,), "constraints": (), "force_words_ids": (), "max_time": (),
}  # fmt: skip
# For samples alone; temperature, top_k and top_p are PMC's own.
NOT_FOLLOWED_IN_SAMPLES: dict[str, tuple[Any, ...]] = {
    "min_p": (0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": ()
}  # fmt: skip
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}


def followed(config: Any) -> dict[str, Any]:
    """Return those settings of a generation_config that are followed here and have an effect."""
    given = {name: getattr(config, name, None) for name in FOLLOWED}
    return {
        name: value for name, value in given.items() if value is not None and value not in (NEUTRAL.get(name), [], {})
    }


def not_followed(config: Any, *, sampling: bool) -> dict[str, Any]:
    """Return those settings of a generation_config that are not followed here and change what `generate` returns."""
    names = NOT_FOLLOWED | (NOT_FOLLOWED_IN_SAMPLES if sampling else {})
    given = {name: getattr(config, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None and value not in names[name]}


def processors(
    settings: dict[str, Any], *, prompt: int, longest: int, stops: Sequence[int], device: Any
) -> tf.LogitsProcessorList:
    """Return transformers' own processors for answers to prompts of one length.

    Parameters
    ----------
    settings : dict
        From `followed`.
    prompt, longest : int
        Tokens of the prompt, and of prompt and answer at most.
    stops : sequence of int
        Tokens that end an answer.
    device : torch.device
        Of the logits.
    """
    ends, on = list(stops), {"device": device}
    begin = prompt + (prompt <= 1 and "forced_bos_token_id" in settings)
    make = {
        "sequence_bias": lambda v: tf.SequenceBiasLogitsProcessor(v),
        "repetition_penalty": lambda v: tf.RepetitionPenaltyLogitsProcessor(float(v)),
        "no_repeat_ngram_size": lambda v: tf.NoRepeatNGramLogitsProcessor(v),
        "bad_words_ids": lambda v: tf.NoBadWordsLogitsProcessor(v, ends),
        "min_length": lambda v: tf.MinLengthLogitsProcessor(v, ends, **on),
        "min_new_tokens": lambda v: tf.MinNewTokensLengthLogitsProcessor(prompt, v, ends, **on),
        "forced_bos_token_id": lambda v: tf.ForcedBOSTokenLogitsProcessor(v),
        "forced_eos_token_id": lambda v: tf.ForcedEOSTokenLogitsProcessor(longest, v, **on),
        "exponential_decay_length_penalty": lambda v: tf.ExponentialDecayLengthPenalty(tuple(v), ends, prompt),
        "suppress_tokens": lambda v: tf.SuppressTokensLogitsProcessor(v, **on),
        "begin_suppress_tokens": lambda v: tf.SuppressTokensAtBeginLogitsProcessor(v, begin, **on),
    }
    no_end = {"min_length", "min_new_tokens", "exponential_decay_length_penalty"} if not ends else set()
    return tf.LogitsProcessorList(make[name](settings[name]) for name in FOLLOWED if name in settings.keys() - no_end)
