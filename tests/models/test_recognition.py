"""What a model's layers see is recognised, not guessed from a short prompt: windows, chunks, lengths, placement."""

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from transformers import masking_utils as masks

from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.errors import PMCError
from pmc_fast.models import packed_attention as op
from pmc_fast.models.loading import resolve_device
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.models.patching import register_attention
from pmc_fast.models.recognition import FAR, recognise
from pmc_fast.models.recognition import _reach as reach
from pmc_fast.ops.dispatch import why_refused
from pmc_fast.report import environment
from pmc_fast.rollout import RolloutEngine, model_runner
from tests.families import SIZES, build
from tests.tiny_configs import tiny

LIMIT = 20
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [3.0, 4.0, 5.0, 6.0]}


def longrope(**more):
    return {"rope_type": "longrope", "original_max_position_embeddings": LIMIT, **ROPE, **FACTORS, **more}


LIMITED = {  # right up to LIMIT tokens, and beyond it something that ours do not compute
    "dynamic": (lambda: tf.LlamaConfig(**SIZES, max_position_embeddings=LIMIT,
                                       rope_parameters={"rope_type": "dynamic", **ROPE}), "rotary embedding"),
    "longrope": (lambda: tf.LlamaConfig(**SIZES, max_position_embeddings=80, rope_parameters=longrope()),
                 "rotary embedding"),
    "longrope in one kind of layer": (
        lambda: tf.Gemma3TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=6,
                                    max_position_embeddings=80, rope_parameters={
                                        "full_attention": longrope(), "sliding_attention": {"rope_type": "default",
                                                                                            "rope_theta": 10000.0}}),
        "rotary embedding"),
    "a window in the mask alone": (lambda: tiny("phimoe", sliding_window=LIMIT), "disagree about their sliding window"),
    "chunks": (lambda: tiny("llama4_text", attention_chunk_size=LIMIT), "chunked"),
}  # fmt: skip


def limited(kind):
    config, reason = LIMITED[kind]
    config = config()
    config._experts_implementation = "eager"
    return build(config), reason


def tokens(length, seed=0):
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain_logps(model, ids):
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def packed_logps(passes, *sequences):
    [p] = pack([[Encoded(ids, list(ids))] for ids in sequences], 1000)
    return passes(p, torch.zeros(len(p.targets), dtype=torch.float64))[1]


@pytest.mark.parametrize("kind", LIMITED)
def test_served_to_a_limit_and_refused_beyond(kind):
    model, reason = limited(kind)
    short, long = tokens(5), tokens(LIMIT + 6, 1)
    engine, passes = RolloutEngine(model), PackedPass(model)
    how = {"num_samples": 2, "temperature": 1.0, "top_k": 0}
    made = engine([short, tokens(9, 2)], **how, max_length=LIMIT)
    for answer, logps in zip(made.tokens[0], made.logps[0], strict=True):
        assert len(answer) == LIMIT - 5
        torch.testing.assert_close(
            torch.tensor(logps).double(), plain_logps(model, short + answer)[4:], atol=1e-5, rtol=0
        )
    passes.check()
    whole = short + made.tokens[0][0]
    torch.testing.assert_close(packed_logps(passes, whole, short), torch.cat([plain_logps(model, s) for s in (whole, short)]),
                               atol=1e-5, rtol=0)  # fmt: skip
    beyond = f"{reason}.*sequences of more than {LIMIT} tokens are not supported, and"
    with pytest.raises(PMCError, match=f"{beyond} prompt 0 and its answer may take {LIMIT + 1}"):
        engine([short, short], **how, max_length=LIMIT + 1)
    with pytest.raises(PMCError, match=f"{beyond} prompt 1 and its answer may take {LIMIT + 10}"):
        engine([short, long], **how, max_new_tokens=4)
    with pytest.raises(PMCError, match=f"{beyond} prompt 0 .* {LIMIT + 2}"):  # masked tokens count
        engine([[5, 7]], positions=[[0, LIMIT]], **how, max_new_tokens=1)
    with pytest.raises(PMCError, match=f"{beyond} a sequence may take {LIMIT + 5}"):
        packed_logps(passes, short, long)


def test_a_long_neighbour_changes_a_short_sequence_of_such_a_model():
    """Why they are refused: in the plain model's own batch, the short sequence depends on the long one."""
    model, _ = limited("dynamic")
    ids, positions = torch.tensor([tokens(5)]), torch.tensor([[0, 1, 2, 3, LIMIT + 9]])
    with torch.no_grad():
        alone, near = (
            model(ids, position_ids=p, use_cache=False).logits[0, 2] for p in (positions.clamp(max=4), positions)
        )
    assert (alone - near).abs().max() > 1e-3


def test_the_configuration_alone_refuses_before_any_check():
    model, reason = limited("longrope")
    with pytest.raises(PMCError, match=reason):
        packed_logps(PackedPass(model), tokens(5), tokens(LIMIT + 6))
    model.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(PMCError, match="LlamaForCausalLM has a rotary embedding of type 'spiral': not supported"):
        recognise(model)


@pytest.mark.parametrize("window", [6, 40])
def test_a_window_that_is_not_heeded_is_found(window, monkeypatch):
    """The checks reach beyond every window, in the engine and in the packed pass."""
    model = build(tf.MistralConfig(**SIZES, sliding_window=window))
    assert recognise(model).windows == (window,)
    blind = model_runner.decode_attention
    with monkeypatch.context() as patched:
        patched.setattr(model_runner, "decode_attention", lambda *a, window, **k: blind(*a, window=None, **k))
        with pytest.raises(PMCError, match="rollouts do not compute what the model computes"):
            RolloutEngine(model)([[5]], num_samples=1, temperature=0, max_new_tokens=1)
    RolloutEngine(model)([[5]], num_samples=1, temperature=0, max_new_tokens=1)
    right = op.attention
    register_attention(op.ATTENTION, lambda *a, sliding_window=None, **k: right(*a, **k))
    try:
        with pytest.raises(PMCError, match="a packed pass does not compute what the model computes"):
            PackedPass(model).check()
    finally:
        register_attention(op.ATTENTION, right)
    PackedPass(model).check()


MASKS = {
    "causal": (masks.causal_mask_function, FAR),
    "window": (masks.sliding_window_causal_mask_function(4096), 4096),
    "window of one": (masks.sliding_window_causal_mask_function(1), 1),
    "chunks": (masks.chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64)), -8192),
    "a window in chunks": (masks.and_masks(masks.chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.int64)),
                                           masks.sliding_window_causal_mask_function(100)), -100),
    "both ways": (masks.bidirectional_mask_function, 0),
    "an image": (masks.or_masks(masks.causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4)), 0),
    "of a batch": (masks.and_masks(masks.causal_mask_function, masks.padding_mask_function(torch.ones(1, 3).bool())), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_told_apart(name):
    function, tells = MASKS[name]
    assert reach(function) == tells


def test_a_models_own_error_is_a_refusal_by_name():
    """Falcon, MPT, DeepSeek-V3.2 and others read a mask that is not there when another attention runs."""

    class Reads(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden, attention_mask=None, **more):
            assert attention_mask[0].dim()
            return self.layer(hidden, attention_mask=attention_mask, **more)

    model = build(tf.MistralConfig(**SIZES))
    model.model.layers[1] = Reads(model.model.layers[1])
    model.config._attn_implementation = "eager"  # which is handed a mask
    refusal = (
        "MistralForCausalLM: its own code fails .*TypeError: 'NoneType' object is not subscriptable.*not supported"
    )
    with pytest.raises(PMCError, match=refusal):
        RolloutEngine(model)([[5]], num_samples=1, temperature=0, max_new_tokens=1)
    with pytest.raises(PMCError, match=refusal):
        PackedPass(model).check()


def refuse(model, message):
    with pytest.raises(PMCError, match=message):
        RolloutEngine(model)
    with pytest.raises(PMCError, match=message):
        PackedPass(model)


@pytest.fixture
def llama():
    return build(tf.LlamaConfig(**SIZES), torch.float32)


def test_offloaded_and_spread_models_are_refused(llama):
    llama.model.layers[1].to("meta")
    refuse(
        llama,
        r"LlamaForCausalLM has parameters on meta \(offloaded, or without weights\): load it without device_map",
    )
    refuse(llama.to("meta"), "LlamaForCausalLM has parameters on meta")


class Elsewhere:
    """As much of a model as is asked of its place."""

    def __init__(self, device):
        self.device = torch.device(device)

    def named_modules(self):
        return []

    def parameters(self):
        return [SimpleNamespace(device=self.device)]


@pytest.mark.parametrize("device", ["mps:0", "xpu:0", "hpu:0"])
def test_models_on_devices_without_kernels_are_refused(device):
    refuse(Elsewhere(device), f"Elsewhere is on {device}: pmc_fast runs on cpu and cuda")


def test_rocm_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why = r"torch .* is built for ROCm, which is not supported \(inline PTX, nvcc\): use cpu"
    refuse(Elsewhere("cuda:0"), f"Elsewhere is on cuda:0: {why}")
    for name in ("auto", "cuda", "cuda:1"):
        with pytest.raises(PMCError, match=f"device is '{name}': {why}"):
            resolve_device(name)
    assert resolve_device("cpu") == torch.device("cpu")
    assert environment.capabilities()["GPU"] == why_refused(torch.device("cuda"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_quantised_by_torch_are_refused(llama):
    refuse(
        torch.ao.quantization.quantize_dynamic(llama, {torch.nn.Linear}),
        "LlamaForCausalLM is quantised by torch .*q_proj",
    )
