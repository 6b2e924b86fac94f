"""Encodings against the published code's, padding, stop ids and decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmc_fast.config import PMCConfig
from pmc_fast.data import (
    Encoded,
    Encoder,
    collate,
    decode_answers,
    encode_pair,
    encode_prompt,
    pad_id,
    resolve_format,
    stop_ids,
)
from pmc_fast.errors import PMCError


def test_golden_encodings(golden, tokenizer):
    cases = golden("encoding_cases")
    for case in cases:
        encoded = encode_pair(
            tokenizer,
            case["question"],
            case["answer"],
            prompt_format=case["format"],
            max_length=case["max_length"],
        )
        assert encoded.input_ids == case["input_ids"]
        assert encoded.labels == case["labels"]
    assert len(cases) == 32


@pytest.mark.parametrize("prompt_format", ["tags", "chat"])
def test_a_pair_begins_with_its_prompt(tokenizer, prompt_format):
    prompt = encode_prompt(tokenizer, "Who wrote it?", prompt_format=prompt_format)
    pair = encode_pair(tokenizer, "Who wrote it?", "Ann did.", prompt_format=prompt_format)
    assert pair.input_ids[: len(prompt)] == prompt
    trained = tokenizer.decode([i for i in pair.labels if i != -100])
    assert trained == {"tags": "Answer: Ann did.<|im_end|>", "chat": "Ann did.<|im_end|>\n"}[prompt_format]


def test_pad_equal_to_eos_trains_eos_and_masks_only_padding(tokenizer):
    """Trap: with pad = eos, masks made from ids lose the eos to learn, and any eos inside a prompt."""
    pair = encode_pair(tokenizer, "Say <|im_end|> twice", "no", prompt_format="tags")
    stops = stop_ids(tokenizer)
    assert tokenizer.eos_token_id in stops
    batch = collate([pair, Encoded(pair.input_ids[:4], pair.labels[:4])], pad=tokenizer.eos_token_id)
    assert batch["labels"][0, -1] == tokenizer.eos_token_id
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == [1] * 4 + [0] * (len(pair.input_ids) - 4)


class Special:
    def __init__(self, eos, pad, unk=None, bos=None, others=()):
        self.eos_token_id, self.pad_token_id, self.unk_token_id, self.bos_token_id = eos, pad, unk, bos
        self.all_special_ids = list(others)


def test_pad_is_distinct_from_eos_where_it_can_be():
    assert pad_id(Special(2, 0), [2]) == 0
    assert pad_id(Special(2, 2, unk=0, bos=1), [2]) == 0
    assert pad_id(Special(2, 2, bos=1, others=[1, 2, 7]), [2]) == 7
    assert pad_id(Special(2, None, others=[2]), [2]) == 2
    assert pad_id(Special(2, 5, unk=0), [2, 5]) == 0


def test_stop_ids_join_tokenizer_and_generation_config():
    class Generation:
        eos_token_id = [9, 2]  # noqa: RUF012

    assert stop_ids(Special(2, 0), Generation()) == [2, 9]
    assert stop_ids(Special(2, 0)) == [2]
    with pytest.raises(PMCError, match="no eos token"):
        stop_ids(Special(None, 0))


def test_prompt_format_is_resolved_or_refused(tokenizer):
    assert resolve_format(tokenizer, "auto") == "chat"
    assert resolve_format(tokenizer, "tags") == "tags"
    assert resolve_format(Special(2, 0), "auto") == "tags"
    with pytest.raises(PMCError, match="no chat template"):
        resolve_format(Special(2, 0), "chat")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from(["left", "right"]))
def test_collate_keeps_every_sequence(lengths, side):
    sequences = [Encoded(list(range(1, n + 1)), [-100, *range(2, n + 1)]) for n in lengths]
    batch = collate(sequences, 0, length=max(lengths) + 2, side=side)
    for i, s in enumerate(sequences):
        kept = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][kept].tolist() == s.input_ids
        assert batch["labels"][i][kept].tolist() == s.labels
        assert (batch["labels"][i][~kept] == -100).all()
        assert torch.equal(kept.sort(descending=side == "right").values, kept)


def test_answers_end_at_the_first_stop_and_lose_only_their_tag(tokenizer):
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    generated = [ids("Answer: Ann did.<|im_end|>Bob"), ids(" Not tagged"), [], ids("Answer: ")]
    answers = decode_answers(tokenizer, generated, [2], prompt_format="tags")
    assert answers == ["Ann did.", "Not tagged", "", ""]
    assert decode_answers(tokenizer, generated[:1], [2], prompt_format="chat") == ["Answer: Ann did."]


def test_tokens_alike(tokenizer):
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="tags"))
    token = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    assert encoder.tokens_alike([token("The")]) >= {token(text) for text in ("the", " the", " The", "The", " THE")}
    assert encoder.tokens_alike([token("The")]) == encoder.tokens_alike([token(" the")])
    assert not encoder.tokens_alike([token("."), token(" ("), *encoder.stops])
