"""Rollouts under transformers models: the same tokens as plain sampling, and nothing left behind."""

import random
import sys

import numpy as np
import pytest
import torch
import transformers as tf

from pmc_fast.errors import PMCError
from pmc_fast.ops import sample_nucleus
from pmc_fast.rollout import RolloutEngine, rollout
from pmc_fast.rollout.model_runner import ATTENTION, attention
from tests.families import FAMILIES, HOW, PROMPTS, REFUSED, build


@pytest.fixture(scope="module")
def llama():
    return build(FAMILIES["llama"]())


def plainly(model, prompts, *, num_samples, temperature, top_k, top_p, max_new_tokens, seed, stop_ids, streams):
    """One forward of the plain model over the whole history for every token of every sample."""
    out = []
    for prompt, stream in zip(prompts, streams, strict=True):
        samples = []
        for sample in range(num_samples):
            tokens, logps, mass = [], [], []
            while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in stop_ids):
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1:]
                drawn = sample_nucleus(
                    logits, torch.tensor([0, 1]), *(torch.tensor([n]) for n in (stream, sample, len(tokens))),
                    temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                )  # fmt: skip
                tokens.append(int(drawn.tokens))
                logps.append(float(logits.log_softmax(-1)[0, tokens[-1]]))
                mass.append(float(drawn.nucleus_mass))
            samples.append((tokens, logps, mass))
        out.append(samples)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_the_plain_models(family):
    model = build(FAMILIES[family]())
    streams = [10, 11, 12, 13]
    ours = rollout(model, PROMPTS, **HOW, stream_ids=streams, drafts=[[[4, 5, 6]], [], [[9]], []])
    expected = plainly(model, PROMPTS, **HOW, streams=streams)
    for q, samples in enumerate(expected):
        assert ours.tokens[q] == [tokens for tokens, _, _ in samples]
        for s, (tokens, logps, mass) in enumerate(samples):
            np.testing.assert_allclose(ours.logps[q][s], logps, atol=1e-5)
            np.testing.assert_allclose(ours.nucleus_mass[q][s], mass, atol=1e-5)
            assert ours.finish_reason[q][s] == ("stop" if tokens[-1] in HOW["stop_ids"] else "length")
    c = ours.counters
    assert c["sampled_tokens"] == sum(len(t) for samples in ours.tokens for t in samples)
    assert c["rows"] - c["draft_rows"] <= c["sampled_tokens"]


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family):
    config, reason = REFUSED[family]
    model = build(config(), torch.float32)
    with pytest.raises(PMCError, match=f"(?i){type(model).__name__[:5]}.*{reason}.*not supported"):
        rollout(model, PROMPTS, **HOW)


@pytest.mark.parametrize(
    "change",
    [
        {"trie": False}, {"ngram_drafts": False}, {"max_rows": 1}, {"max_rows": 7}, {"pool_tokens": 22},
        {"pool_tokens": 60, "max_rows": 11}, {"drafts": [[[9, 4, 4, 7]]] * 4},
    ],
    ids=str,
)  # fmt: skip
def test_execution_changes_no_sample(llama, change):
    engine = RolloutEngine(llama)
    first = engine(PROMPTS, **HOW)
    again = engine(PROMPTS, **HOW, **change)
    assert again.tokens == first.tokens
    if "pool_tokens" in change:
        assert again.counters["peak_slots"] <= change["pool_tokens"]
        assert again.counters["preemptions"] > 0


def test_biases_of_prompts_that_take_several_steps(llama):
    engine, bias = RolloutEngine(llama), [{4: 2.0, 9: -3.0}, {}, {5: 1.0}, {}]
    whole = engine(PROMPTS, **HOW, logit_bias=bias)
    assert engine(PROMPTS, **HOW, logit_bias=bias, max_rows=2).tokens == whole.tokens


def test_a_table_of_positions_is_a_limit():
    engine = RolloutEngine(build(FAMILIES["gpt2"]()))
    with pytest.raises(
        PMCError, match="its table of positions ends there: sequences of more than 128 tokens are not"
    ):
        engine([[1, 2, 3]], num_samples=1, temperature=1.0, max_new_tokens=126)
    made = engine([[1, 2, 3]], num_samples=1, temperature=1.0, max_new_tokens=125)
    assert len(made.tokens[0][0]) == 125


def test_order_company_and_number_change_no_sample(llama):
    engine = RolloutEngine(llama)
    first = engine(PROMPTS, **HOW).tokens
    assert engine(PROMPTS[::-1], **HOW).tokens == first[::-1]
    assert engine(PROMPTS[2:3], **HOW).tokens == first[2:3]
    assert [s[:2] for s in first] == engine(PROMPTS, **HOW | {"num_samples": 2}).tokens
    assert engine(PROMPTS, **HOW | {"seed": 4}).tokens != first
    assert engine(PROMPTS, **HOW, stream_ids=[1, 2, 3, 4]).tokens != first
    same = engine([PROMPTS[0]] * 2, **HOW).tokens  # one prompt twice: one stream, the same answers
    assert same[0] == same[1]
    other = engine([PROMPTS[0]] * 2, **HOW, stream_ids=torch.tensor([0, 1])).tokens
    assert other[0] != other[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_greedy_is_hugging_faces(family):
    model = build(FAMILIES[family]())
    ours = rollout(model, PROMPTS, num_samples=1, temperature=0, max_length=24, stop_ids=[1, 2], top_p=0.5)
    for prompt, [tokens] in zip(PROMPTS, ours.tokens, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=24,
            do_sample=False,
            eos_token_id=[1, 2],
            pad_token_id=0,
        )
        assert prompt + tokens == theirs[0].tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_tokens_of_a_prompt_leave_gaps(family):
    """Log-probs are the plain model's where it gets the whole prompt and a mask; answers go on after its end."""
    model = build(FAMILIES[family]())
    whole, mask = [5, 2, 7, 2, 2, 4], [1, 0, 1, 0, 0, 1]
    prompts = [[5, 7, 4], [5, 7, 4], PROMPTS[2]]
    how = HOW | {"stream_ids": [1, 1, 3], "drafts": [[[4, 5]], [[4, 5]], []]}
    made = rollout(model, prompts, positions=[[0, 2, 5], None, None], **how)
    for tokens, logps in zip(made.tokens[0], made.logps[0], strict=True):
        ids, seen = torch.tensor([whole + tokens]), torch.tensor([mask + [1] * len(tokens)])
        with torch.no_grad():
            theirs = model(ids, attention_mask=seen, use_cache=False).logits[0, len(whole) - 1 : -1].log_softmax(-1)
        np.testing.assert_allclose(logps, theirs.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-5)
    assert made.tokens[1:] == rollout(model, prompts, **how).tokens[1:]
    for bad in ([0, 2], [0, 2, 2], [-1, 0, 1]):
        with pytest.raises(PMCError, match="positions of prompt 0 must ascend from 0 or more, one for each token"):
            rollout(model, prompts, positions=[bad, None, None], **how)
    with pytest.raises(PMCError, match="positions for 1 of 3 prompts"):
        rollout(model, prompts, positions=[None], **how)


def test_float32_samples_agree_but_for_races_within_rounding():
    wide, narrow = build(FAMILIES["llama"]()), build(FAMILIES["llama"](), torch.float32)
    how = HOW | {"num_samples": 100, "top_k": 50}
    pairs = [
        (a, b) for x, y in zip(rollout(wide, PROMPTS, **how).tokens, rollout(narrow, PROMPTS, **how).tokens, strict=True)
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip
    assert np.mean([a == b for a, b in pairs]) >= 0.99


def test_bfloat16_model_and_autocast():
    """Log-probs near the plain model's in the same arithmetic; under autocast the copies follow the weights."""
    config = FAMILIES["llama"]()
    low = build(config, torch.bfloat16)
    assert rollout(low, PROMPTS, **HOW).counters["sampled_tokens"] > 0  # the first-use check compared log-probs
    model = build(config, torch.float32)
    engine = RolloutEngine(model, autocast_dtype=torch.bfloat16)
    first = engine(PROMPTS, **HOW)
    assert first.counters["copy_bytes"] == sum(
        2 * m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear
    )
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert engine(PROMPTS, **HOW).tokens != first.tokens


def test_live_weights_are_read():
    model = build(FAMILIES["llama"](), torch.float32)
    engine = RolloutEngine(model)
    first = engine(PROMPTS, **HOW).tokens
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    fresh = build(FAMILIES["llama"](), torch.float32)
    with torch.no_grad():
        fresh.model.layers[0].mlp.up_proj.weight.neg_()
    changed = engine(PROMPTS, **HOW).tokens
    assert changed != first
    assert changed == rollout(fresh, PROMPTS, **HOW).tokens


def test_a_model_that_was_moved_to_another_type():
    model = build(FAMILIES["llama"](), torch.float32)
    engine = RolloutEngine(model)
    engine(PROMPTS, **HOW)
    model.to(torch.bfloat16)
    assert engine(PROMPTS, **HOW).tokens == rollout(model, PROMPTS, **HOW).tokens


def traces(model):
    numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
    return (
        torch.get_rng_state().tolist(), numpys, random.getstate(),
        [m.training for m in model.modules()], model.config.to_json_string(), model.config._attn_implementation,
        model.is_gradient_checkpointing, [sorted(vars(m)) for m in model.modules()],
        torch.is_grad_enabled(), sys.modules[type(model).__module__].apply_rotary_pos_emb, [p.grad for p in model.parameters()],
    )  # fmt: skip


@pytest.mark.parametrize("breaks", [False, True])
def test_no_trace_is_left(breaks, monkeypatch):
    model = build(FAMILIES["qwen3"](), torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    model.model.layers[0].eval()
    engine = RolloutEngine(model)
    before = traces(model)
    if breaks:
        monkeypatch.setattr("pmc_fast.rollout.logits_processors.sample_nucleus", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine(PROMPTS, **HOW)
    else:
        engine(PROMPTS, **HOW)
    assert traces(model) == before
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()  # still trains


def test_lora_adapters_are_sampled_from():
    import peft

    model = build(FAMILIES["llama"](), torch.float32)
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    with lora.disable_adapter():
        base = rollout(lora, PROMPTS, **HOW).tokens
    adapted = rollout(lora, PROMPTS, **HOW).tokens
    assert adapted != base
    assert adapted == rollout(lora.merge_and_unload(), PROMPTS, **HOW).tokens


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in ("one", "two", "dora", "off", "merged")),
        ("two", torch.float64),
        ("one", torch.bfloat16),
    ],
)
def test_plain_lora_is_merged_into_a_copy_that_follows_it(kind, dtype):
    """In bfloat16 a merged copy would round away small adapters: PEFT's own products stay."""
    peft = pytest.importorskip("peft")
    model = build(FAMILIES["llama"](), dtype)
    names = {"q_proj": 4, "up_proj": 2}
    config = peft.LoraConfig(
        r=2, rank_pattern=names, target_modules=list(names), init_lora_weights=False, use_dora=kind == "dora"
    )
    lora = peft.get_peft_model(model, config)
    if kind == "two":
        lora.add_adapter("other", config)
        lora.base_model.set_adapter(["default", "other"])
    if kind == "off":
        lora.base_model.disable_adapter_layers()
    if kind == "merged":
        lora.base_model.merge_adapter()
    weights = {n: p.clone() for n, p in lora.named_parameters()}
    engine = RolloutEngine(lora)
    how = HOW | {"num_samples": 3}
    for _ in range(2):
        made = engine(PROMPTS, **how)
        merged = kind in ("one", "two") and dtype != torch.bfloat16
        targets = [m.base_layer.weight for n, m in lora.named_modules() if n.endswith(tuple(names))]
        assert made.counters["copy_bytes"] == merged * sum(w.nbytes for w in targets)
        for prompt, samples, logps in zip(PROMPTS, made.tokens, made.logps, strict=True):
            for tokens, own in zip(samples, logps, strict=True):
                with torch.no_grad():
                    logits = lora(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
                bound = 0.05 if dtype == torch.bfloat16 else 1e-4
                torch.testing.assert_close(torch.as_tensor(own).to(dtype), expected, rtol=bound, atol=bound)
        for name, p in lora.named_parameters():
            torch.testing.assert_close(p, weights[name], rtol=0, atol=0)
            if "lora_B" in name:  # training moves it
                with torch.no_grad():
                    p += 0.05
        weights = {n: p.clone() for n, p in lora.named_parameters()}


def test_edges(llama):
    engine = RolloutEngine(llama)
    assert engine([], **HOW).tokens == []
    none = engine([[1, 2, 3]], num_samples=2, temperature=1.0, max_length=3)
    assert none.tokens == [[[], []]]
    assert none.finish_reason == [["length", "length"]]
    one = engine([[1, 2, 3]], num_samples=2, temperature=1.0, max_new_tokens=1)
    assert [len(t) for t in one.tokens[0]] == [1, 1]
    assert one.counters["rows"] == 0
    how = {"num_samples": 2, "temperature": 1.0}
    each = engine([[1, 2, 3], [4, 5]], **how, max_new_tokens=[0, 3])
    assert [[len(t) for t in own] for own in each.tokens] == [[0, 0], [3, 3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 has no tokens"),
        ({"prompts": [[1, 61]]}, "prompt 0 has token 61.*embeds 61"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_length": 9}, "and not both"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"pool_tokens": 17}, "prompt 0 and one answer may need 18 pool tokens"),
        ({"max_new_tokens": [1, 2]}, "2 max_new_tokens for 4 prompts: give one, or one each"),
        ({"max_new_tokens": [1, -2, 3, 4]}, "max_new_tokens is -2: it must be 0 or more"),
        ({"stream_ids": [1]}, "1 stream_ids for 4 prompts"),
        ({"drafts": [[]]}, "drafts for 1 of 4 prompts"),
        ({"drafts": [[], [[3], [4, 61]], [], []]}, "a draft of prompt 1 has token 61: the model embeds 61"),
        ({"drafts": [[[-1]], [], [], []]}, "a draft of prompt 0 has token -1"),
        ({"max_rows": 8.5}, "max_rows is 8.5: it must be a whole number"),
        ({"pool_tokens": 99.5}, "pool_tokens is 99.5: it must be a whole number"),
        ({"logit_bias": [{61: 1.0}, {}, {}, {}]}, "logit_bias of prompt 0 has token 61: the model predicts 61"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"top_p": 0.0}, "top_p 0"),
    ],
)
def test_bad_arguments(llama, change, message):
    arguments = {"prompts": PROMPTS} | HOW | change
    with pytest.raises(PMCError, match=message):
        RolloutEngine(llama)(**arguments)


def test_damaged_weights_are_named(llama):
    model = build(FAMILIES["llama"](), torch.float32)
    engine = RolloutEngine(model)
    engine(PROMPTS, **HOW)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(PMCError, match="logits are NaN"):
        engine(PROMPTS, **HOW)


def test_a_wrong_attention_is_noticed(llama, monkeypatch):
    def wrong(module, *args, scaling, **kwargs):
        return attention(module, *args, scaling=scaling * 0.9, **kwargs)

    tf.AttentionInterface.register(ATTENTION, wrong)
    try:
        with pytest.raises(PMCError, match=r"LlamaForCausalLM: rollouts do not compute what the model computes"):
            RolloutEngine(llama)(PROMPTS, **HOW)
    finally:
        tf.AttentionInterface.register(ATTENTION, attention)


def test_trie_changes_no_sample_of_a_real_model(smollm2_dir, tokenizer):
    """SmolLM2 in float32: races within rounding may fall otherwise in 1 % of samples."""
    model = tf.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    prompts = [
        tokenizer(text)["input_ids"] for text in ("The capital of France", "Once upon", "def f(x):", "My name is")
    ]
    engine = RolloutEngine(model)
    how = {"num_samples": 25, "temperature": 0.9, "top_p": 0.95, "max_new_tokens": 10, "stop_ids": [2]}
    runs = [
        engine(prompts, **how, **change) for change in ({}, {"trie": False}, {"max_rows": 13, "pool_tokens": 300})
    ]
    flat = [[tokens for samples in r.tokens for tokens in samples] for r in runs]
    for other in flat[1:]:
        assert np.mean([a == b for a, b in zip(flat[0], other, strict=True)]) >= 0.99
    assert runs[0].counters["rows"] < runs[1].counters["rows"]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: pytest tests/rollout/test_engine.py -k gpu on one"
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2 sliding"])
def test_a_gpu_draws_the_cpus_samples(family):
    model = build(FAMILIES[family]())
    how = HOW | {"num_samples": 100}
    on_cpu = rollout(model, PROMPTS, **how)
    on_gpu = rollout(model.to("cuda"), PROMPTS, **how, drafts=[[[4, 5, 6]], [], [[9]], []])
    pairs = [(a, b) for x, y in zip(on_cpu.tokens, on_gpu.tokens, strict=True) for a, b in zip(x, y, strict=True)]
    # logits are float64, but the sampler on CUDA computes in float32: the bound of float32 samples
    assert np.mean([a == b for a, b in pairs]) >= 0.99
