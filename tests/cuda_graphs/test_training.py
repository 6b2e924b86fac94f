"""Replayed training passes: the gradients of the pass itself, on a recorder for the CPU; and CUDA graphs, on a GPU."""

import copy
import gc
import importlib

import numpy as np
import peft
import pytest
import torch
import transformers as tf
from torch.utils._pytree import tree_leaves

from pmc_fast.cuda_graphs.gradients import Gradients
from pmc_fast.cuda_graphs.padding import pad
from pmc_fast.cuda_graphs.training import PassGraphs
from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.errors import PMCError
from pmc_fast.models import packed_attention as op
from pmc_fast.models.context import tolerance
from pmc_fast.models.packed_forward import PackedPass, causal_lm
from tests.families import FAMILIES, SIZES, build
from tests.tape import Tape

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: python -m pytest tests/cuda_graphs/test_training.py on one"
)
VARLEN = [f for f in FAMILIES if f != "gemma2"]  # whose attention has a softcap, which varlen kernels lack


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch's kernel computes, from offsets that are on the device alone: the last query sees all keys."""
    at_q, at_k = torch.arange(len(query)), torch.arange(len(key))
    of_q, of_k = (torch.bucketize(at, cu[1:], right=True) for at, cu in ((at_q, cu_seq_q), (at_k, cu_seq_k)))
    near = (cu_seq_k[1:][of_q] - cu_seq_q[1:][of_q] + at_q)[:, None] - at_k[None]
    mask = (of_q[:, None] == of_k[None]) & (near >= 0)
    mask = mask & (near <= window_size[0]) if window_size[0] >= 0 else mask
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    products = (q @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    return (products.softmax(-1) @ v).transpose(0, 1)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let float64 models on the CPU be replayed."""
    monkeypatch.setattr("pmc_fast.cuda_graphs.training.DTYPES", (torch.float64,))
    monkeypatch.setattr("pmc_fast.models.packed_forward.GRAPHED", ("cpu",))
    monkeypatch.setattr(op, "_varlen_attn", lambda: varlen_attn)
    resolve = op._resolve

    def resolved(backend, q, softcap, dropout):
        return resolve("varlen" if not (softcap or dropout) else backend, q, softcap, dropout)

    monkeypatch.setattr(op, "_resolve", resolved)
    # which looks at the number on the CPU, where that costs nothing
    front = importlib.import_module("pmc_fast.ops.weighted_nll")
    monkeypatch.setattr(front, "_times", lambda saved, upstream, dtype: (saved * upstream).to(dtype))


def sequences(seed, count):
    """Sequences of the same lengths in another order."""
    g = np.random.default_rng(seed)
    made = []
    for n in g.permutation(np.arange(3, 3 + 2 * count, 2)):
        ids = g.integers(3, SIZES["vocab_size"], n).tolist()
        made.append(Encoded(ids, [-100] * (n // 3) + ids[n // 3 :]))
    return made


def packs(rounds=7):
    """Packs of two sizes, which alternate."""
    for i in range(rounds):
        made = pack([[s] for s in sequences(i, 5 if i % 2 else 14)], 10_000)[0]
        g = torch.Generator().manual_seed(i)
        yield made, torch.randn(len(made.targets), generator=g, dtype=torch.float64)


def replaying(model, recorder=Tape):
    packed = PackedPass(causal_lm(model))
    packed.graphs = PassGraphs(causal_lm(model), recorder, tolerance)
    return packed


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def same(ours, theirs, bound=1e-5):
    """Families with RMS norms compute these in float32, whatever the model is: hence the bound."""
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            assert (a - b).norm() <= bound * b.norm(), name


def train(model, packed, factor=1.0, rounds=7):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.5)
    seen = []
    for made, scale in packs(rounds):
        loss, logps = packed(made, scale, model=model)
        (loss * factor).backward()
        seen.append(
            (loss.item(), logps.tolist(), {k: g if g is None else g.clone() for k, g in gradients(model).items()})
        )
        optimizer.step()
        optimizer.zero_grad()
    return seen


def agree(ours, theirs, bound=1e-5):
    for (loss, logps, grads), (their_loss, their_logps, their_grads) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(loss, their_loss, rtol=bound)
        np.testing.assert_allclose(logps, their_logps, rtol=bound, atol=bound)
        same(grads, their_grads, bound)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", VARLEN)
def test_a_replayed_step_is_the_step(family):
    model = build(FAMILIES[family]())
    other = copy.deepcopy(model)
    packed = replaying(model)
    bound = 1e-10 if family in ("phi", "gpt2", "gpt_neox") else 1e-5
    ours, theirs = (train(m, p, factor=-0.3, rounds=20) for m, p in ((model, packed), (other, PackedPass(other))))
    agree(ours, theirs, bound)
    assert packed.graphs.cache.captures == 2
    assert packed.graphs.cache.replays == 18  # each size is computed as ever once


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replays_follow_weights_under_an_autocast_around_the_forward(family, monkeypatch):
    """As accelerate wraps it, inside of which autocast's cache is on again."""
    monkeypatch.setattr("pmc_fast.cuda_graphs.training.DTYPES", (torch.bfloat16,))
    model = build(FAMILIES[family](), torch.float32)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    packed, plain = replaying(model), PackedPass(model)
    with torch.autocast("cpu", torch.bfloat16):
        for i, (made, scale) in enumerate(packs()):
            losses = [run(made, scale, model=model)[0] for run in (packed, plain)]
            model.zero_grad()
            theirs = torch.autograd.grad(losses[1], list(model.parameters()))
            losses[0].backward()
            ours = [p.grad for p in model.parameters()]
            torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=0.02, atol=0.02)
            for a, b in zip(ours, theirs, strict=True):
                assert (a - b).norm() <= 0.05 * b.norm() + 0.01 * max(t.norm() for t in theirs)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(-0.8 if i % 2 else 1.25)
            torch.clear_autocast_cache()  # as the end of a step's own autocast does
    assert packed.graphs.cache.replays == 5


@pytest.mark.usefixtures("on_cpu")
def test_adapters_alone_are_trained_and_switched():
    def made():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(build(FAMILIES["llama"]()), config)

    model, other = made(), made()
    packed, plain = replaying(model), PackedPass(causal_lm(other))
    agree(train(model, packed), train(other, plain))
    assert packed.graphs.cache.replays == 5
    for m in (model, other):
        m.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 3.0
    agree(train(model, packed), train(other, plain))
    assert packed.graphs.cache.captures == 4
    for m in (model, other):
        next(p for p in m.parameters() if p.requires_grad).requires_grad_(False)
    agree(train(model, packed), train(other, plain))


@pytest.mark.usefixtures("on_cpu")
def test_float32_adapters_on_bfloat16_weights_are_replayed(monkeypatch):
    """Under autocast, as an erasure request computes."""
    monkeypatch.setattr("pmc_fast.cuda_graphs.training.DTYPES", (torch.bfloat16,))
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(FAMILIES["llama"](), torch.bfloat16), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    plain = PackedPass(causal_lm(model), autocast_dtype=torch.bfloat16)
    plain.check(model=model)  # against its own forward
    packed = replaying(model)
    packed.autocast_dtype = torch.bfloat16
    for made, scale in packs():
        found = []
        for each in (packed, plain):
            model.zero_grad()
            loss, logps = each(made, scale, model=model)
            loss.backward()
            found.append((loss.detach(), logps, [p.grad.clone() for p in trained.values()]))
        (loss, logps, ours), (their_loss, their_logps, theirs) = found
        torch.testing.assert_close(loss.float(), their_loss.float(), rtol=0.02, atol=0.02)
        assert (logps - their_logps).abs().mean() <= 0.02
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 0.05 * b.norm() + 0.01 * max(t.norm() for t in theirs)
        with torch.no_grad():
            for p in trained.values():
                p.mul_(1.1)
    assert packed.graphs.cache.replays == 5


@pytest.fixture
def warm(on_cpu):
    """A model whose pass for the first pack is captured."""
    model = build(FAMILIES["llama"]())
    packed = replaying(model)
    for _ in range(2):
        packed(*next(packs()))
    assert packed.graphs.cache.captures == 1
    return model, packed


def plainly(model, made):
    loss, _ = PackedPass(model)(*made)
    names, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


def three_times(model, packed, made):
    for _ in range(3):
        model.zero_grad()
        packed(*made)[0].backward()
        same(gradients(model), plainly(model, made))


def test_losses_add_up_and_wait(warm):
    model, packed = warm
    first, _, second, *_ = packs()
    expected = [plainly(model, made) for made in (first, second)]
    (a, _), (b, _) = packed(*first), packed(*second)  # the second runs eagerly: a replay would overwrite the first
    (2 * a - b).backward()
    same(
        gradients(model), {k: 2 * x - y for (k, x), y in zip(expected[0].items(), expected[1].values(), strict=True)}
    )
    packed(*second)[0].backward()  # gradients accumulate
    same(gradients(model), {k: 2 * x for k, x in expected[0].items()})
    assert packed.graphs.cache.replays == 3


def accumulated(model, packed, zero=None, clip=None):
    """Gradients after each of two optimizer steps of three packs, of which some are replayed."""
    seen = []
    rounds = list(packs(9))
    for i in range(3):
        for j, made in enumerate(rounds[3 * i : 3 * i + 3]):
            loss, _ = packed(*made)
            (loss * (0.7 - j)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad(set_to_none=zero)
    return seen


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("zero", [True, False])
def test_gradients_of_several_packs_add_up(zero):
    """Eager and replayed ones, with sizes that are captured while gradients wait."""
    model = build(FAMILIES["llama"]())
    packed = replaying(model)
    ours = accumulated(model, packed, zero, clip=3.0)
    plain = accumulated(model, PackedPass(model), zero, clip=3.0)
    for a, b in zip(ours, plain, strict=True):
        same(a, b)
    assert packed.graphs.cache.captures == 2
    assert packed.graphs.cache.replays == 7
    total = sum(p.numel() for p in model.parameters())
    assert packed.graphs.nbytes > packed.graphs._gradients.nbytes >= 8 * total


def test_a_gradient_in_memory_of_the_users_is_added_to(warm):
    model, packed = warm
    made = next(packs())
    expected = plainly(model, made)
    own = [torch.full_like(p, 0.25) for p in model.parameters()]
    for p, mine in list(zip(model.parameters(), own, strict=True))[::2]:
        p.grad = mine
    (packed(*made)[0] * 2).backward()
    (packed(*made)[0] * 2).backward()
    assert packed.graphs.cache.replays == 3
    for i, (p, mine, g) in enumerate(zip(model.parameters(), own, expected.values(), strict=True)):
        assert (p.grad is mine) == (i % 2 == 0)
        torch.testing.assert_close(p.grad, 4 * g + (0 if i % 2 else 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taken", ["before forward", "before backward"])
def test_gradients_that_a_user_keeps_stay(warm, taken):
    """Also views of them; a replay would overwrite them."""
    model, packed = warm
    first, _, second, *_ = packs()
    packed(*first)[0].backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    kept = {name: p.grad.detach() if i % 2 else p.grad for i, (name, p) in enumerate(model.named_parameters())}
    if taken == "before forward":
        model.zero_grad()
        with pytest.warns(UserWarning, match="gradients of an earlier pass are still in use"):
            loss, _ = packed(*second)
    else:
        loss, _ = packed(*second)
        model.zero_grad()
    loss.backward()
    same(gradients(model), plainly(model, second))
    for name, g in kept.items():
        assert torch.equal(g, before[name]), name
    del kept, g
    model.zero_grad()
    packed(*first)[0].backward()
    same(gradients(model), before)
    assert packed.graphs.cache.replays == (3 if taken == "before forward" else 4)


def test_gradients_that_are_kept_while_a_size_is_captured_stay(warm):
    model, packed = warm
    first, other, *_ = packs()
    packed(*first)[0].backward()
    kept = [p.grad.detach() for p in model.parameters()]
    for _ in range(2):
        packed(*other)[0].backward()
    assert packed.graphs.cache.captures == 2
    before = [g.clone() for g in kept]
    model.zero_grad()
    with pytest.warns(UserWarning, match="gradients of an earlier pass are still in use"):
        packed(*first)[0].backward()
    for g, was in zip(kept, before, strict=True):
        assert torch.equal(g, was)


def test_many_passes_while_a_loss_waits_are_warned_of(warm, monkeypatch):
    monkeypatch.setattr("pmc_fast.cuda_graphs.training.LIMIT", 3)
    _, packed = warm
    made = next(packs())
    waits, _ = packed(*made)
    packed(*made), packed(*made)
    with pytest.warns(UserWarning, match="3 passes ran eagerly, .* while a loss waits for its backward"):
        packed(*made)
    waits.backward()
    before = packed.graphs.cache.replays
    packed(*made)
    assert packed.graphs.cache.replays == before + 1


def test_a_weight_with_other_strides_is_left_to_autograd(warm):
    model, packed = warm
    made, layer = next(packs()), model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    assert not layer.weight.is_contiguous()
    before = packed.graphs.cache.replays
    three_times(model, packed, made)
    packed(*made)[0].backward()
    assert layer.weight.grad.stride() == layer.weight.stride()
    assert packed.graphs.cache.replays == before


def test_hooks_of_parameters_run(warm):
    model, packed = warm
    made = next(packs())
    expected = plainly(model, made)
    seen = []
    hooks = [
        model.model.norm.weight.register_hook(lambda g: g * 3),
        model.lm_head.weight.register_post_accumulate_grad_hook(seen.append),
    ]
    packed(*made)[0].backward()
    same(gradients(model), expected | {"model.norm.weight": 3 * expected["model.norm.weight"]})
    assert len(seen) == 1
    for hook in hooks:
        hook.remove()
    loss, _ = packed(*made)
    model.lm_head.weight.register_post_accumulate_grad_hook(seen.append)
    with pytest.raises(PMCError, match="got hooks between"):
        loss.backward()
    assert packed.graphs.cache.replays == 2


def test_gradients_come_in_grad_alone(warm):
    model, packed = warm
    leaves = list(model.parameters())
    calls = (
        lambda loss: torch.autograd.grad(loss, leaves),
        lambda loss: torch.autograd.grad(loss, leaves[:1], allow_unused=True),
        lambda loss: loss.backward(inputs=leaves[:2]),
    )
    made = next(packs())
    loss, _ = packed(*made)
    for call in calls:
        with pytest.raises(PMCError, match=r"use cuda_graphs=False for torch.autograd.grad"):
            call(loss)
    assert model.lm_head.weight.grad is None
    loss.backward(inputs=leaves, retain_graph=True)
    same(gradients(model), plainly(model, made))
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()


@pytest.mark.usefixtures("on_cpu")
def test_while_a_loss_waits_other_sizes_run_eagerly_too():
    model = build(FAMILIES["llama"]())
    packed = replaying(model)
    train(model, packed, rounds=4)
    first, second, *_ = packs()
    expected = [plainly(model, made) for made in (first, second)]
    a, _ = packed(*first)
    b, _ = packed(*second)
    a.backward()
    c, _ = packed(*second)  # b waits, too, but it is an eager pass's
    (b + c).backward()
    same(
        gradients(model), {k: x + 2 * y for (k, x), y in zip(expected[0].items(), expected[1].values(), strict=True)}
    )
    assert packed.graphs.cache.replays == 4


def step(model):
    torch.optim.SGD(model.parameters(), lr=0.0).step()


def move(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


@pytest.mark.parametrize("change", [step, move])
def test_weights_that_change_before_backward_are_found(warm, change):
    """As by autograd, for what it has saved."""
    model, packed = warm
    loss, _ = packed(*next(packs()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    change(model)
    with pytest.raises(RuntimeError, match="a weight was changed between"):
        loss.backward()


class Counting(Tape):
    """Notes the shapes of what each part of a capture makes."""

    parts: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.made = []
        Counting.parts.append(self.made)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        used = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        fresh = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.made += [tuple(t.shape) for t in fresh if t.untyped_storage().data_ptr() not in used]
        return out


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tied", [False, True])
def test_no_gradient_of_a_linear_layer_is_made_beside_the_buffers(tied):
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = tied
    model = build(config)
    packed, made = replaying(model, Counting), next(packs())
    Counting.parts.clear()
    for _ in range(2):
        packed(*made)[0].backward()
    assert packed.graphs.cache.replays == 1
    weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    _, forward, backward = Counting.parts
    assert len(backward) > len(weights)
    assert not [shape for shape in forward if shape in weights or shape[::-1] in weights]
    # of the tokens' embeddings alone, whose sum over equal tokens is torch's own
    assert [shape for shape in backward if shape in weights or shape[::-1] in weights] == [(61, 32)]


def test_a_loss_that_nobody_needs_costs_nothing(warm):
    model, packed = warm
    first, _, second, *_ = packs()
    packed(*first)
    gc.collect()
    loss, _ = packed(*second)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward a second time"):
        loss.backward()
    same(gradients(model), plainly(model, second))


def test_second_derivatives_are_refused(warm):
    model, packed = warm
    loss, _ = packed(*next(packs()))
    with pytest.raises(PMCError, match="second derivatives"):  # also where the incoming gradient is a constant
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def switch_train(model):
    model.train()
    model.config.attention_dropout = 0.0


def new_storage(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone() * 1.1


def new_parameter(model):
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach() * 2)


@pytest.mark.parametrize("change", [switch_train, new_storage, new_parameter])
def test_what_moves_is_captured_again(warm, change):
    model, packed = warm
    change(model)
    three_times(model, packed, next(packs()))
    assert packed.graphs.cache.captures == 2


def hook(model):
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)


def checkpoint(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()


def drop_out(model):
    model.model.layers[0].mlp.add_module("idle", torch.nn.Dropout(0.5))
    model.train()


@pytest.mark.parametrize("change", [hook, checkpoint, drop_out])
def test_what_a_replay_would_miss_is_computed(warm, change):
    model, packed = warm
    before = packed.graphs.cache.replays
    change(model)
    three_times(model, packed, next(packs()))
    assert packed.graphs.cache.replays == before


def test_no_gradients_no_graph(warm):
    _, packed = warm
    before = packed.graphs.cache.replays
    made, scale = next(packs())
    with torch.no_grad():
        assert not packed(made, scale)[0].requires_grad
    assert packed.graphs.cache.replays == before


@pytest.mark.usefixtures("on_cpu")
def test_a_pass_that_asks_for_a_number_is_computed_and_said_so():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build(tf.LlamaConfig(**SIZES, rope_parameters=scaling, max_position_embeddings=512))
    packed, made = replaying(model), next(packs())
    packed(*made)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: a training pass can't be captured .* runs eagerly"):
        packed(*made)[0].backward()
    same(gradients(model), plainly(model, made))
    model.zero_grad()
    packed(*made)[0].backward()
    same(gradients(model), plainly(model, made))


@pytest.mark.usefixtures("on_cpu")
def test_a_size_that_fails_runs_eagerly_and_the_other_is_replayed():
    class FailsOnce(Tape):
        failures = 0

        def record(self, *parts):
            if not FailsOnce.failures:
                FailsOnce.failures = 1
                raise RuntimeError("out of memory")
            return super().record(*parts)

    model = build(FAMILIES["llama"]())
    other, packed = copy.deepcopy(model), replaying(model, FailsOnce)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: a training pass can't be captured .*memory") as warned:
        ours = train(model, packed, rounds=9)
    agree(ours, train(other, PackedPass(other), rounds=9))
    assert len(warned) == 1
    cache = packed.graphs.cache
    assert (cache.captures, cache.replays) == (
        1,
        3,
    )  # the second size: 4 of 9 passes, of which the first runs eagerly


class Faulty(Tape):
    """Replays another loss than it captured."""

    def __init__(self):
        super().__init__()
        self.fault = 50.0


class Idle(Tape):
    """Replays nothing, and leaves what was there."""

    def record(self, *parts):
        super().record(*parts)
        return [lambda: None for _ in parts]


class Forgetful(Tape):
    """Leaves out what writes the gradient of one weight."""

    def record(self, *parts):
        (forward, backward), buffer = super().record(*parts), self.buffer
        return [forward, lambda: (backward(), buffer[: len(buffer) // 2].zero_())]


class Unscaled(Tape):
    """Forgets the upstream gradient."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "add_d_head" in str(func) or func is torch.ops.aten.mul.Tensor:
            args = tuple(torch.ones(()).to(a) if isinstance(a, torch.Tensor) and a.dim() == 0 else a for a in args)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("what", ["loss", "nothing", "gradients", "padding", "factor"])
def test_a_replay_that_computes_something_else_is_not_used(what, monkeypatch):
    model = build(FAMILIES["llama"]())
    recorders = {"loss": Faulty, "nothing": Idle, "gradients": Forgetful, "padding": Tape, "factor": Unscaled}
    packed, made = replaying(model, recorders[what]), next(packs())
    if what == "gradients":
        caller = Gradients.caller

        def noted(gradients, call):
            [Forgetful.buffer] = gradients.buffers.values()
            return caller(gradients, call)

        monkeypatch.setattr(Gradients, "caller", noted)
    if what == "padding":
        monkeypatch.setattr(
            "pmc_fast.cuda_graphs.training.pad", lambda *a: pad(*a) | {"input_ids": pad(*a)["input_ids"][::-1]}
        )
    packed(*made)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM: .*its replay does not compute what the pass computes"):
        packed(*made)[0].backward()
    same(gradients(model), plainly(model, made))
    assert packed.graphs._gradients is None  # as large as the model


@pytest.mark.usefixtures("on_cpu")
def test_a_new_parameter_on_the_same_memory_gets_its_gradient(warm):
    model, packed = warm
    model.load_state_dict(model.state_dict(), assign=True)
    three_times(model, packed, next(packs()))
    for p in model.parameters():
        p.requires_grad_(False)
    assert not packed(*next(packs()))[0].requires_grad


@pytest.mark.usefixtures("on_cpu")
def test_under_autocast_attention_is_in_low_precision_and_replayed(monkeypatch):
    """Rotary embeddings leave float32 behind, which no varlen kernel takes: autocast casts for torch's attention alone."""
    monkeypatch.setattr("pmc_fast.cuda_graphs.training.DTYPES", (torch.bfloat16,))
    seen = set()

    def noted(query, key, value, *rest, scale=None, window_size=(-1, -1)):
        seen.update(t.dtype for t in (query, key, value))
        return varlen_attn(query, key, value, *rest, scale=scale, window_size=window_size)

    monkeypatch.setattr(op, "_varlen_attn", lambda: noted)
    model = build(FAMILIES["llama"](), torch.float32)
    packed, made = replaying(model), next(packs())
    with torch.autocast("cpu", torch.bfloat16):
        expected = plainly(model, made)
        for _ in range(4):
            model.zero_grad()
            packed(*made)[0].backward()
            same(gradients(model), expected, 2e-2)
    assert seen == {torch.bfloat16}
    assert packed.graphs.cache.replays == 3
    for name, g in gradients(model).items():  # a product is added in float32: autograd's is rounded before
        linear = "proj" in name or "lm_head" in name
        assert (g != g.bfloat16()).any() == linear or not linear, name
        assert not linear or torch.equal(expected[name], expected[name].bfloat16().float())


@pytest.mark.usefixtures("on_cpu")
def test_a_parameter_outside_the_loss_has_no_gradient():
    model = build(FAMILIES["llama"]())
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    packed, made = replaying(model), next(packs())
    for _ in range(3):
        model.zero_grad()
        packed(*made)[0].backward()
    assert packed.graphs.cache.replays == 2
    assert model.idle.grad is None
    assert model.lm_head.weight.grad is not None


@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "phi", "granite"])
def test_gpu_gradients(family):
    """Replayed gradients are as near to float64's as those of the plain passes."""
    model = build(FAMILIES[family](), torch.bfloat16).to("cuda")
    wide, packed = copy.deepcopy(model).cpu().double(), PackedPass(model, cuda_graphs=True)
    for made in packs():
        exact, plain = plainly(wide, made), plainly(model, made)
        for _ in range(3):
            model.zero_grad()
            loss, _ = packed(*made)
            (loss * 0.5).backward()
            # none is kept: the next pass would run eagerly
            for name, g in {name: g.cpu().double() for name, g in gradients(model).items()}.items():
                error = (2 * g - exact[name]).norm()
                bound = 3 * (plain[name].cpu().double() - exact[name]).norm() + 1e-2 * exact[name].norm()
                assert error <= bound, name
    assert packed.graphs.cache.replays > 7


@needs_gpu
def test_gpu_backward_adds_to_grad_in_place():
    """Three packs add up, with a factor each; a replay allocates nothing as large as the gradients."""
    model = build(FAMILIES["llama"](), torch.bfloat16).to("cuda")
    wide, packed = copy.deepcopy(model).cpu().double(), PackedPass(model, cuda_graphs=True)
    train(model, packed, rounds=4)
    wide.load_state_dict(model.state_dict())
    three = list(packs(3))
    for zero in (True, False):
        model.zero_grad(set_to_none=zero)
        for factor, made in zip((1.0, -0.5, 0.3), three, strict=True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            (packed(*made)[0] * factor).backward()
            assert torch.cuda.max_memory_allocated() - before < packed.graphs._gradients.nbytes / 2
        exact = [plainly(wide, made) for made in three]
        for name, p in model.named_parameters():
            want = exact[0][name] - 0.5 * exact[1][name] + 0.3 * exact[2][name]
            largest = max(e[name].norm() for e in exact)
            assert (p.grad.cpu().double() - want).norm() <= 0.05 * largest + 0.05 * want.norm(), name
    assert packed.graphs.cache.replays == 2 + 6


@needs_gpu
def test_gpu_autocast_trains_alike_and_follows_the_weights():
    model = build(FAMILIES["llama"](), torch.float32).to("cuda")
    other, (made, _) = copy.deepcopy(model), next(packs())
    mean = torch.full((len(made.targets),), 1 / len(made.targets))
    losses = []
    for m, graphs in ((model, True), (other, False)):
        packed, optimizer = PackedPass(m, cuda_graphs=graphs), torch.optim.AdamW(m.parameters(), lr=3e-3, fused=True)
        seen = []
        for _ in range(12):
            with torch.autocast("cuda", torch.bfloat16):
                loss, _ = packed(made, mean)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        losses.append(seen)
        if graphs:
            assert packed.graphs.cache.replays == 11
    assert abs(losses[0][-1] - losses[0][0]) > 0.1  # it trains
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-2, atol=2e-2)


@needs_gpu
def test_gpu_float32_is_computed_as_ever():
    model = build(FAMILIES["llama"](), torch.float32).to("cuda")
    packed, made = PackedPass(model, cuda_graphs=True), next(packs())
    for _ in range(3):
        packed(*made)[0].backward()
    assert packed.graphs.cache.replays == 0
