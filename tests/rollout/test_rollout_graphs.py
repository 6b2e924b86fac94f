"""Captured steps: what may be replayed, on a recorder for the CPU; and CUDA graphs, on a GPU."""

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast.cuda_graphs.recorder import CaptureError, CudaRecorder, syncs_with_host
from pmc_fast.errors import PMCError
from pmc_fast.ops.decode_attention import StepIndex, decode_attention
from pmc_fast.ops.sample_nucleus import sample_nucleus_static
from pmc_fast.rollout import RolloutEngine, rollout
from pmc_fast.rollout.inputs import INDEX, StepTensors
from pmc_fast.rollout.model_runner import ModelStep
from tests import tape
from tests.families import FAMILIES, HOW, PROMPTS, SIZES, build

DRAFTS = {"drafts": [[[4, 5, 6]], [], [[9, 4, 4, 7]], []]}
attend = "pmc_fast.rollout.model_runner.decode_attention"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: python -m pytest tests/rollout/test_rollout_graphs.py on one"
)


def attending(tape, replayed=decode_attention):
    """Put attention and draws, which are no operations of torch's, on the tape as well."""

    def attention(*args, **kwargs):
        out = decode_attention(*args, **kwargs)
        tape.calls.append((replayed, args, kwargs, out))
        return out

    def sampling(*args):
        sample_nucleus_static(*args)
        tape.calls.append((sample_nucleus_static, args, {}, None))

    patch = pytest.MonkeyPatch()
    patch.setattr(attend, attention)
    patch.setattr("pmc_fast.rollout.model_runner.sample_nucleus_static", sampling)
    return patch


class Tape(tape.Tape):
    watch = staticmethod(attending)


def taped(model, recorder=Tape, **how):
    engine = RolloutEngine(model, pad_steps=True, **how)
    engine._step.graphs = engine._step.new_graphs(recorder)
    return engine


def plain(model, how=HOW, **more):
    return rollout(model, PROMPTS, **how, **more).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_replays_draw_the_same(family):
    model = build(FAMILIES[family]())
    engine = taped(model)
    expected = rollout(model, PROMPTS, **HOW, **DRAFTS)
    first, second = engine(PROMPTS, **HOW, **DRAFTS), engine(PROMPTS, **HOW, **DRAFTS)
    for ours in (first, second):
        assert ours.tokens == expected.tokens
        for a, b in zip([x for s in ours.logps for x in s], [x for s in expected.logps for x in s], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert first.counters["graph_replays"] > 0
    # nothing moved between the calls: each bucket that came twice is captured, once
    third = engine(PROMPTS, **HOW, **DRAFTS)
    assert third.counters["graph_captures"] == 0
    assert third.counters["graph_replays"] > second.counters["graph_captures"] >= 0
    assert third.tokens == expected.tokens


@pytest.fixture
def warm():
    """A model and an engine that has captured its steps."""
    model = build(FAMILIES["llama"]())
    engine = taped(model)
    for _ in range(2):
        engine(PROMPTS, **HOW)
    assert engine(PROMPTS, **HOW).counters["graph_captures"] == 0
    return model, engine


def test_weights_that_change_in_place_are_read(warm):
    model, engine = warm
    before = engine(PROMPTS, **HOW).tokens
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    after = engine(PROMPTS, **HOW)
    assert after.counters["graph_captures"] == 0
    assert after.tokens == plain(model) != before


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0}, {"temperature": 0.6}, {"top_k": 3}, {"top_k": 0}, {"top_p": 0.4}, {"top_p": 1.0}, {"seed": 7},
        {"seed": -(2**63)}, {"stream_ids": [1, 2, 3, 4]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("graph_draws", [True, False])
def test_other_settings_are_not_drawn_by_the_captured_ones(warm, change, graph_draws):
    """They are inputs of the graphs: nothing is captured for them, and the first settings draw as before."""
    model, engine = warm
    engine._graph_draws = engine._run_ahead = graph_draws
    runs = [engine(PROMPTS, **HOW | how) for how in (change, {}, change, {}, change, {})]
    changed, same = plain(model, HOW | change), plain(model)
    assert changed != same
    assert [run.tokens for run in runs] == [changed, same] * 3
    assert runs[-1].counters["graph_captures"] == runs[-2].counters["graph_captures"] == 0


def new_parameter(model):
    weight = model.model.layers[1].self_attn.v_proj.weight
    model.model.layers[1].self_attn.v_proj.weight = torch.nn.Parameter(-weight.detach())


def new_storage(model):
    weight = model.model.embed_tokens.weight
    weight.data = weight.data.flip(0).clone()


def new_buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.7


def new_module(model):
    norm = model.model.norm
    model.model.norm = torch.nn.Sequential(norm, torch.nn.Tanh())


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)


def another_setting(model):
    model.model.layers[0].self_attn.scaling *= 0.5


@pytest.mark.parametrize(
    "change", [new_parameter, new_storage, new_buffer, new_module, hooked, another_setting], ids=lambda f: f.__name__
)
def test_what_moved_is_captured_again(warm, change):
    model, engine = warm
    before = engine(PROMPTS, **HOW).tokens
    change(model)
    expected = plain(model)
    assert expected != before
    after = [engine(PROMPTS, **HOW) for _ in range(3)]
    assert [r.tokens for r in after] == [expected] * 3
    assert sum(r.counters["graph_captures"] for r in after) > 0
    assert after[2].counters["graph_captures"] == 0 < after[2].counters["graph_replays"]


def test_a_pool_that_grows_is_captured_again(warm):
    model, engine = warm
    size = engine._step.pool_bytes()
    how = HOW | {"num_samples": 200}
    grown = engine(PROMPTS, **how)
    assert grown.counters["pool_bytes"] > size
    assert grown.counters["graph_captures"] > 0
    assert grown.tokens == plain(model, how)
    assert engine(PROMPTS, **HOW).tokens == plain(model)


def test_inputs_that_outgrow_their_buffer_are_captured_again(warm, monkeypatch):
    model, _ = warm
    monkeypatch.setattr("pmc_fast.rollout.inputs.ENTRIES_PER_ROW", 0)
    monkeypatch.setattr("pmc_fast.rollout.inputs.ROOM", 64)
    engine = taped(model)
    how = HOW | {"max_new_tokens": 40, "stop_ids": []}
    for _ in range(2):  # the buffers grow with the histories
        last = engine(PROMPTS, **how)
        assert last.tokens == plain(model, how)
    assert last.counters["graph_replays"] > 0


def test_an_adapter_that_is_switched_off_is_not_replayed():
    import peft

    model = build(FAMILIES["llama"]())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(model, config)
    engine = taped(lora)
    adapted = [engine(PROMPTS, **HOW).tokens for _ in range(3)][-1]
    with lora.disable_adapter():
        base = [engine(PROMPTS, **HOW).tokens for _ in range(3)]
        assert base == [plain(lora)] * 3
    assert base[0] != adapted
    again = engine(PROMPTS, **HOW)
    assert again.tokens == adapted == plain(lora)


def accelerated(model):
    """Wrap a model's forward as accelerate does under mixed precision: in an autocast of its own, its cache on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("wrap", [lambda model: model, accelerated], ids=["plain", "accelerated"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_autocast_copies_follow_the_weights(family, wrap):
    """GPT-2's Conv1D and a MoE's experts are cast by autocast itself, whose cache of casts a graph must not read."""
    moe = {"mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)}
    model = wrap(build((FAMILIES | moe)[family](), torch.float32))
    engine = taped(model, autocast_dtype=torch.bfloat16)
    for change in (1.0, -0.5, 2.0):
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() >= 2 and p.shape[0] != SIZES["vocab_size"]:
                    p.mul_(change)
        padded = RolloutEngine(model, autocast_dtype=torch.bfloat16, pad_steps=True)(PROMPTS, **HOW)
        for _ in range(3):
            ours = engine(PROMPTS, **HOW)
            assert ours.tokens == padded.tokens
        assert ours.counters["graph_replays"] > ours.counters["graph_captures"] == 0
    for module in model.modules():
        if type(module) is torch.nn.Linear:  # what is captured of these are the copies, which stay where they are
            module.weight = torch.nn.Parameter(-module.weight.detach())
    moved = engine(PROMPTS, **HOW)
    assert moved.tokens == RolloutEngine(model, autocast_dtype=torch.bfloat16, pad_steps=True)(PROMPTS, **HOW).tokens
    assert moved.counters["graph_replays"] > moved.counters["graph_captures"] == 0


def test_a_model_that_was_moved_to_another_type(warm):
    model, engine = warm
    model.to(torch.bfloat16)
    expected = RolloutEngine(model, pad_steps=True)(PROMPTS, **HOW).tokens
    # the first makes a new pool; the prompts' step, which comes once, is warmed up in the second and captured in the third
    after = [engine(PROMPTS, **HOW) for _ in range(4)]
    assert [r.tokens for r in after] == [expected] * 4
    assert after[3].counters["graph_captures"] == 0 < after[3].counters["graph_replays"]
    model.to(torch.float64)
    with engine._step.prepared():
        assert not engine._step.graphs.captured()  # what they hold of the old model's memory is let go at once


def test_wrong_replays_are_noticed_on_first_use():
    def other(*args, scale, **kwargs):
        return decode_attention(*args, scale=scale * 0.5, **kwargs)

    class Wrong(Tape):
        watch = staticmethod(lambda tape: attending(tape, other))

    with pytest.raises(PMCError, match="rollouts do not compute what the model computes"):
        taped(build(FAMILIES["llama"]()), Wrong)(PROMPTS, **HOW)


def test_a_model_whose_steps_ask_for_a_number_is_launched_step_by_step():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(tf.LlamaConfig(**SIZES, rope_parameters=scaling, max_position_embeddings=512))
    engine, expected = taped(model), plain(model)
    assert RolloutEngine(model, pad_steps=True)(PROMPTS, **HOW).tokens == expected
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: a decode step can't be captured .* runs eagerly"):
        assert engine(PROMPTS, **HOW).tokens == expected
    again = engine(PROMPTS, **HOW)
    assert again.tokens == expected
    assert again.counters["graph_captures"] == again.counters["graph_replays"] == 0


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nand more"), PMCError("no")], ids=["torch's", "ours"])
def test_a_size_that_fails_runs_eagerly_and_the_others_are_replayed(error):
    model = build(FAMILIES["llama"]())

    class FailsOnce(Tape):
        failures = 0

        def record(self, *parts):
            if not FailsOnce.failures:
                FailsOnce.failures = 1
                raise error
            return super().record(*parts)

    engine, expected = taped(model, FailsOnce), plain(model)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: a decode step can't be captured") as warned:
        runs = [engine(PROMPTS, **HOW) for _ in range(4)]
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert [run.tokens for run in runs] == [expected] * 4
    last = runs[-1].counters
    assert last["graph_captures"] == 0 < last["graph_replays"]
    assert None in engine._step.graphs._graphs.values()


def test_steps_that_read_prompts_are_replayed():
    """Prompts of other lengths, and parts of prompts, from which nothing is drawn."""
    model = build(FAMILIES["llama"]())
    engine = taped(model)
    for cut in (9, 8, 7) * 2:
        prompts = [*PROMPTS[:2], PROMPTS[2][:cut], PROMPTS[3]]
        assert engine(prompts, **HOW).tokens == rollout(model, prompts, **HOW).tokens
    captured = [bucket for _, bucket, _ in engine._step.graphs.captured()]
    assert [bucket.rows for bucket in captured if bucket.logits < bucket.rows] == [16]
    how = HOW | {"max_rows": 4}
    parts = [engine(PROMPTS, **how) for _ in range(3)]
    assert [run.tokens for run in parts] == [plain(model)] * 3
    captured = [bucket for _, bucket, _ in engine._step.graphs.captured()]
    assert any(bucket.rows == 4 and bucket.logits == 1 for bucket in captured)
    assert parts[-1].counters["graph_captures"] == 0 < parts[-1].counters["graph_replays"]


def test_logits_that_are_processed_are_captured_too():
    model = build(FAMILIES["llama"]())
    engine = taped(model)
    how = HOW | {"logit_bias": [{4: 2.0, 9: -3.0}, {}, {5: 1.0}, {}]}
    expected = plain(model, how)
    runs = [engine(PROMPTS, **how) for _ in range(3)]
    assert [run.tokens for run in runs] == [expected] * 3 != [plain(model)] * 3
    assert runs[2].counters["graph_captures"] == 0 < runs[2].counters["graph_replays"]
    assert runs[2].counters["ahead_steps"] == 0  # the next step's logits need the host's work
    assert engine(PROMPTS, **HOW).tokens == plain(model)


@pytest.mark.parametrize("wrap", [lambda model: model, accelerated], ids=["plain", "accelerated"])
def test_logits_are_not_widened_on_their_way_to_the_sampler(wrap):
    model = wrap(build(FAMILIES["llama"](), torch.float32))
    step, found = ModelStep(model, torch.bfloat16), []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: found.append(out.dtype))
    forward = vars(model).get("forward")
    with step.prepared():
        out = model(torch.tensor([[1, 2, 3]]), position_ids=torch.arange(3)[None], rollout_step=Attends()).logits
    assert out.dtype == torch.bfloat16 == found[0]
    assert vars(model).get("forward") is forward
    hook.remove()


class Attends:
    """Stands for a step in which every token sees itself alone."""

    def attend(self, layer, q, k, v, *settings):
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)


class Waits(TorchDispatchMode):
    """Notes operations that make the host wait for the device, or the device for the host's memory."""

    def __init__(self):
        super().__init__()
        self.found, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim()]
        if syncs_with_host(func, args) or len({t.device.type for t in tensors}) > 1:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_on_a_device_waits(family, monkeypatch):
    """On torch's meta device, which has no numbers to give, and whose tensors take none from the host."""
    monkeypatch.setattr(attend, lambda q, *args, **kwargs: torch.empty_like(q))
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16)
        rows = torch.zeros(5, dtype=torch.int64)
        index = StepIndex(*(torch.zeros(6, dtype=torch.int32) for _ in INDEX))
    step = ModelStep(model)
    with step.prepared(), Waits() as waits:
        logits = step.logits(StepTensors(rows, rows, rows, index, 9, ()))
    assert logits.device.type == "meta"
    assert logits.shape == (5, SIZES["vocab_size"])
    assert waits.calls > 20
    assert waits.found == []


def agreement(a, b):
    return np.mean([x == y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)])


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2 sliding", "gpt2", "phi"])
def test_gpu_replays_draw_the_same(family):
    model = build(FAMILIES[family](), torch.float32).to("cuda")
    how = HOW | {"num_samples": 100}
    eager = RolloutEngine(model, cuda_graphs=False)(PROMPTS, **how, **DRAFTS).tokens
    engine = RolloutEngine(model)
    # the pool grows in the first run, which drops what was captured; a bucket that comes once a run is warmed up in
    # the second and captured in the third
    runs = [engine(PROMPTS, **how, **DRAFTS) for _ in range(4)]
    assert all(agreement(run.tokens, eager) >= 0.99 for run in runs)
    assert runs[3].tokens == runs[2].tokens
    assert runs[3].counters["graph_captures"] == 0 < runs[3].counters["graph_replays"]


@needs_gpu
def test_gpu_replays_follow_weights_that_change_and_move():
    model = build(FAMILIES["llama"](), torch.float32).to("cuda")
    engine = RolloutEngine(model, autocast_dtype=torch.bfloat16)
    for _ in range(3):
        engine(PROMPTS, **HOW)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.neg_()
    changed = engine(PROMPTS, **HOW)
    assert changed.counters["graph_captures"] == 0 < changed.counters["graph_replays"]
    new_parameter(model)
    moved = [engine(PROMPTS, **HOW) for _ in range(3)][-1]
    padded = RolloutEngine(model, autocast_dtype=torch.bfloat16, pad_steps=True)(PROMPTS, **HOW)
    assert agreement(moved.tokens, padded.tokens) >= 0.9  # bfloat16: races fall otherwise more often
    how = HOW | {"num_samples": 200}  # the pool grows
    grown = engine(PROMPTS, **how)
    assert grown.counters["graph_captures"] > 0
    padded = RolloutEngine(model, autocast_dtype=torch.bfloat16, pad_steps=True)(PROMPTS, **how)
    assert agreement(grown.tokens, padded.tokens) >= 0.9


@needs_gpu
def test_gpu_recorder():
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    x, out = torch.arange(4.0, device="cuda"), torch.zeros(4, device="cuda")
    here = torch.cuda.current_stream()
    replays = [recorder.record(lambda n=n: out.copy_(x * n + x.sum()))[0] for n in (1, 2)]
    x.add_(1)
    for n, replay in zip((1, 2), replays, strict=True):
        replay()
        assert torch.equal(out, x * n + x.sum())
    assert torch.cuda.current_stream() == here


@needs_gpu
def test_gpu_capture_that_fails_leaves_the_stream():
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    x, here = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(CaptureError, match="waits for the device"):
        recorder.record(lambda: x * x.sum().item())
    assert torch.cuda.current_stream() == here
    assert (x + 1).tolist() == [2] * 4
    assert torch.randn(4, device="cuda").isfinite().all()  # the generator is no longer a capture's
