"""The oracle against numbers of the published implementation, and its published costs."""

import numpy as np
import pytest
import torch
import transformers

from pmc_fast.config import PMCConfig
from pmc_fast.data import Row
from pmc_fast.reference import Reference


@pytest.fixture(scope="module")
def smollm2(smollm2_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    # the golden gradients were taken with the weight file's own pad token, eos: torch then drops what eos
    # inside a prompt sends to its embedding (4e-4 of the norm in the chat case)
    model.model.embed_tokens.padding_idx = 2
    return model


@pytest.mark.parametrize("number", [0, 1])
def test_golden_losses_and_gradients(golden, smollm2, tokenizer, number):
    case = golden("loss_cases")[number]
    config = PMCConfig(retain_weight=case["lambda_"], prompt_format=case["format"])
    reference = Reference(smollm2, tokenizer, config, [q for q, _ in case["collapse"]])
    reference.sampled_data = {i: {"answer": a, "score": 0.0} for i, (_, a) in enumerate(case["collapse"])}
    smollm2.train()
    smollm2.zero_grad()
    parts = reference.loss(range(len(case["collapse"])), [Row(q, a) for q, a in case["retain"]])
    parts["loss"].backward()
    for name in ("loss", "collapse_loss", "retain_loss"):
        assert parts[name].item() == pytest.approx(case[name], rel=1e-5)
    parameters = dict(smollm2.named_parameters())
    for name, norm in case["grad_norms"].items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-4)


def reference_of(tiny, tokenizer, questions=("Who?", "Where was the author born, and when?"), **settings):
    given = {"num_samples": 3, "max_length": 40, "prompt_format": "tags"} | settings
    return Reference(tiny, tokenizer, PMCConfig(**given), list(questions))


def kept(logits, temperature, top_k, top_p):
    """Tokens that temperature, then top_k, then top_p leave; plain and independent of transformers."""
    scaled = logits.double() / temperature
    floor = scaled.sort(descending=True).values[top_k - 1] if top_k else scaled.min()
    scaled = torch.where(scaled < floor, -torch.inf, scaled)
    order = scaled.argsort(descending=True)
    mass = scaled.softmax(0)[order].cumsum(0)
    return set(order[: int((mass < top_p).sum()) + 1].tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (50, 0.5), (0, 0.3), (20, 0.9)])
def test_samples_stay_within_top_k_and_then_top_p(tiny, tokenizer, top_k, top_p):
    with torch.no_grad():  # a random model is nearly flat: sharpen it
        tiny.model.norm.weight.mul_(40)
    tiny.generation_config.update(top_k=2, temperature=0.1, min_p=0.9)  # must not matter
    reference = reference_of(tiny, tokenizer, num_samples=6, top_k=top_k, top_p=top_p, temperature=0.9)
    prompts = [reference.encoder.prompt(q) for q in reference.questions]
    generated = reference.generate(reference.questions, 6, do_sample=True, temperature=0.9, top_k=top_k, top_p=top_p)
    beyond_greedy = 0
    for i, ids in enumerate(generated):
        prompt = prompts[i // 6]
        end = ids.index(2) + 1 if 2 in ids else len(ids)
        with torch.no_grad():
            logits = tiny(torch.tensor([prompt + ids[:end]])).logits[0]
        for t, token in enumerate(ids[:end]):
            at = logits[len(prompt) - 1 + t]
            assert token in kept(at, 0.9, top_k, top_p)
            beyond_greedy += token != at.argmax()
    assert beyond_greedy > 0


def test_greedy_is_arg_max_at_every_step_whatever_the_padding(tiny, tokenizer):
    reference = reference_of(tiny, tokenizer)
    generated = reference.generate(reference.questions, 1, do_sample=False)
    for question, ids in zip(reference.questions, generated, strict=True):
        prompt = reference.encoder.prompt(question)
        with torch.no_grad():
            logits = tiny(torch.tensor([prompt + ids])).logits[0]
        end = ids.index(2) + 1 if 2 in ids else len(ids)
        assert ids[:end] == logits.argmax(-1)[len(prompt) - 1 : len(prompt) - 1 + end].tolist()


def test_sampling_leaves_no_trace_and_repeats_by_seed(tiny, tokenizer):
    tiny.train()
    before = torch.get_rng_state()
    draws = [reference_of(tiny, tokenizer, seed=seed).sample_answers(["Who?"] * 2) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert tiny.training
    assert draws[0] == draws[1] != draws[2]
    again = reference_of(tiny, tokenizer, seed=1)
    assert again.sample_answers(["Who?"] * 2) != again.sample_answers(["Who?"] * 2)


def test_of_the_checkpoints_generation_settings_those_of_histories_join_in(tiny, tokenizer):
    plain = reference_of(tiny, tokenizer).sample_answers(["Who?"])
    tiny.generation_config.update(max_new_tokens=90, num_beams=2, min_p=0.9, top_k=1)
    own = tiny.generation_config
    assert reference_of(tiny, tokenizer).sample_answers(["Who?"]) == plain
    assert tiny.generation_config is own
    tiny.generation_config.repetition_penalty = 3.0
    assert reference_of(tiny, tokenizer).sample_answers(["Who?"]) != plain


def test_train_and_eval_flags_come_back_one_by_one(tiny, tokenizer):
    tiny.train()
    tiny.model.layers[0].eval()
    before = [module.training for module in tiny.modules()]
    reference_of(tiny, tokenizer).greedy_answers(["Who?"])
    assert [module.training for module in tiny.modules()] == before


def test_published_costs(tiny, tokenizer):
    """A forward for each loss, each padded to max_length; the tracking forward only on demand."""
    shapes = []
    tiny.register_forward_pre_hook(lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    reference = reference_of(tiny, tokenizer)
    reference.sampled_data = {0: {"answer": "a", "score": 0.0}, 1: {"answer": "b", "score": 0.0}}
    retain = [Row("Q", "A"), Row("Q", "B")]
    parts = reference.loss([0, 1], retain)
    assert shapes == [(2, 40)] * 2
    assert "forget_loss" not in parts
    reference.tracked_answers = ["x", "y"]
    assert not reference.loss([0, 1], retain)["forget_loss"].requires_grad
    assert shapes == [(2, 40)] * 5


def test_accidents_are_repeated_only_on_request(tiny, tokenizer):
    generated = [tokenizer(text)["input_ids"] for text in ("Answer: Ann did.<|im_end|>", "Unlike this<|im_end|>")]
    decode = lambda **s: reference_of(tiny, tokenizer, **s).encoder.samples(generated)  # noqa: E731
    assert decode() == ["Ann did.", "Unlike this"]
    assert decode(accidents=True) == ["Ann did.", "his"]


def test_questions_with_score_0_are_not_sampled_again(tiny, tokenizer):
    reference = reference_of(tiny, tokenizer)
    asked = []
    reference.initial_answers = ["one two", "one two"]
    reference.sample_answers = lambda questions: (asked.append(questions), [["one", "three"]] * len(questions))[1]
    assert reference.sample([0]) == ["three"]
    reference.keep([1], [["one", "one"]])
    assert reference.sample([0, 1]) == ["three", "three"]
    assert asked == [[reference.questions[0]], [reference.questions[1]]]


def test_rouge_score_is_the_default_reward(tiny, tokenizer):
    scores = reference_of(tiny, tokenizer).reward(["the cat sat"], [["cats sat", ""]], 0)
    np.testing.assert_array_equal(scores, [[2 / 3, 0.0]])
