"""Products of several layers computed as one: on the CPU, where rollouts do not, so that every path is run."""

import functools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast.errors import PMCError
from pmc_fast.models.context import plain_logps
from pmc_fast.models.joined_weights import join_weights, joined, siblings
from pmc_fast.ops.fp8_linear import fp8_rows
from pmc_fast.rollout import RolloutEngine, self_check, weights
from pmc_fast.rollout import engine as engine_module
from pmc_fast.rollout.weights import JoinedProduct, Weights
from pmc_fast.trainer.master_weights import MasterWeights
from tests.families import FAMILIES, HOW, PROMPTS, build
from tests.rollout.test_rollout_graphs import taped

SHORT = HOW | {"num_samples": 3, "max_new_tokens": 8}
ATTENTION = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(weights, "JOINED", ("cuda", "cpu"))


class Products(TorchDispatchMode):
    """Counts matrix products and keeps their numbers of columns."""

    def __init__(self):
        super().__init__()
        self.columns = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.columns.append(out.shape[-1])
        return out


def products_of(engine):
    forwards = engine._step.weights.forwards().values()
    found = [getattr(forward.func, "__self__", None) for forward in forwards]
    return list(dict.fromkeys(p for p in found if isinstance(p, JoinedProduct)))


def same(ours, expected, atol=1e-7):
    assert ours.tokens == expected.tokens
    for a, b in zip((x for s in ours.logps for x in s), (x for s in expected.logps for x in s), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("low", [None, torch.bfloat16], ids=["own", "copies"])
@pytest.mark.parametrize("family", FAMILIES)
def test_joined_products_are_the_layers_own(family, low, monkeypatch):
    dtype = torch.float64 if low is None else torch.float32
    expected = RolloutEngine(build(FAMILIES[family](), dtype), autocast_dtype=low)(PROMPTS, **SHORT)
    monkeypatch.setattr(weights, "JOINED", ("cpu",))
    model = build(FAMILIES[family](), dtype)
    groups = len(list(siblings(model)))
    assert groups == {"gpt_neox": 0, "gpt2": 0, "phi": 2}.get(family, 4)
    if low is None:
        assert join_weights(model) == groups
    engine = RolloutEngine(model, autocast_dtype=low)
    same(engine(PROMPTS, **SHORT), expected, 1e-7 if low is None else 0.05)
    found = engine._step.weights.forwards()
    products = {
        f.func.__self__ for f in found.values() if isinstance(getattr(f.func, "__self__", None), JoinedProduct)
    }
    assert len(products) == groups


def test_three_products_become_one_and_two_become_one(on_cpu):
    model = build(FAMILIES["llama"]())
    engine, found = RolloutEngine(model), []
    for expected in (2 * [32, 16, 16, 32, 48, 48, 32], 2 * [64, 32, 96, 32]):
        engine.check()
        step = engine._step

        def counted(rows, compute=step._compute):
            with Products() as made:
                out = compute(rows)
            found.append(made.columns)
            return out

        step._compute = counted
        engine(PROMPTS, **SHORT)
        del step._compute
        assert {tuple(columns) for columns in found} == {(*expected, 61)}
        found.clear()
        join_weights(model)


def layers_of(model, *names):
    return [m for n, m in model.named_modules() if n.endswith(names)]


def hooked_output(model):
    for layer in layers_of(model, "k_proj", "up_proj"):
        layer.register_forward_hook(lambda module, args, out: out.view(-1) and None if out.dim() < 2 else out * 1.5)


def hooked_input(model):
    for layer in layers_of(model, "v_proj", "gate_proj"):
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def input_of_its_own(model):
    """A v_proj whose parent's input it does not read: hooks and a replaced forward are seen, this is not."""
    for layer in model.model.layers:
        inner = layer.self_attn.v_proj

        class Halves(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.base_layer = inner

            def forward(self, x):
                return self.base_layer(x * 0.5)

        layer.self_attn.v_proj = Halves(inner)


def input_that_changes(model):
    """A q_proj after which the parent's input is another, in the same tensor."""
    for layer in model.model.layers:

        class Changes(torch.nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.base_layer = inner

            def forward(self, x):
                out = self.base_layer(x)
                x.mul_(0.5)
                return out

        layer.self_attn.q_proj = Changes(layer.self_attn.q_proj)


@pytest.mark.parametrize(
    "change", [hooked_output, hooked_input, input_of_its_own, input_that_changes], ids=lambda f: f.__name__
)
def test_what_sees_or_changes_an_input_is_heard(change, monkeypatch):
    made = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(weights, "JOINED", devices)
        model = build(FAMILIES["llama"]())
        join_weights(model)
        change(model)
        made.append(RolloutEngine(model)(PROMPTS, **SHORT))
    same(made[1], made[0])
    assert made[1].tokens != RolloutEngine(build(FAMILIES["llama"]()))(PROMPTS, **SHORT).tokens


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"], [*ATTENTION, "gate_proj", "up_proj"]], ids=len)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_stay_their_layers_own(targets, dtype, monkeypatch):
    """Merged into copies that lie side by side, and in bfloat16 beside a joined product of what they wrap."""
    import peft

    made = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(weights, "JOINED", devices)
        model = build(FAMILIES["llama"](), dtype)
        join_weights(model)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            lora = peft.get_peft_model(model, config)
        engine = RolloutEngine(lora)
        made.append(engine(PROMPTS, **SHORT))
    joins = [product._sizes for product in products_of(engine)]
    attention = [sizes for sizes in joins if sizes != [48, 48]]
    together = {1: [16, 16], 2: None, 5: [32, 16, 16]}[len(targets)] if dtype == torch.float64 else [32, 16, 16]
    assert attention == ([together] * 2 if together else [])
    if dtype == torch.float64:
        same(made[1], made[0])
    else:  # bfloat16 rounds sums of another order otherwise
        pairs = zip((s for p in made[0].tokens for s in p), (s for p in made[1].tokens for s in p), strict=True)
        assert np.mean([a == b for a, b in pairs]) >= 0.9


def test_weights_that_change_or_move_under_captured_steps(on_cpu):
    model = build(FAMILIES["llama"]())
    join_weights(model)
    engine = taped(model)
    for _ in range(3):
        last = engine(PROMPTS, **HOW)
    assert last.counters["graph_captures"] == 0 < last.counters["graph_replays"]
    assert len(products_of(engine)) == 4

    def plain():
        fresh = build(FAMILIES["llama"]())
        fresh.load_state_dict(model.state_dict())
        return RolloutEngine(fresh)(PROMPTS, **HOW).tokens

    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight.neg_()
    changed = engine(PROMPTS, **HOW)
    assert changed.counters["graph_captures"] == 0
    assert changed.tokens == plain() != last.tokens
    attention.k_proj.weight = torch.nn.Parameter(-attention.k_proj.weight.detach())
    moved = [engine(PROMPTS, **HOW) for _ in range(3)]
    assert [m.tokens for m in moved] == [plain()] * 3
    assert moved[0].tokens != changed.tokens
    assert attention.k_proj not in engine._step.weights.forwards()
    attention.q_proj.register_forward_hook(lambda module, args, out: -out)
    hooked = [engine(PROMPTS, **HOW).tokens for _ in range(3)]
    assert hooked[0] == hooked[2] != moved[0].tokens


# --- weights of 8 bits

FP8 = SHORT | {"rollout_dtype": "fp8"}


def in_8_bits(model):
    """Replace the forward of all layers but the head by a product, in float64, of numbers rounded to 8 bits."""

    def rounded(x):
        y, scale = fp8_rows(x)
        return y.double() * scale.double()[:, None]

    def product(w, b, x):
        y = rounded(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) @ w.T
        return y if b is None else y + b

    for layer in model.modules():
        if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
            layer.forward = functools.partial(product, rounded(layer.weight.detach()), layer.bias)
    return model


@pytest.mark.parametrize("joins", [False, True], ids=["apart", "joined"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_samples_in_8_bits_are_those_of_the_rounded_model(family, joins, monkeypatch):
    monkeypatch.setattr(weights, "JOINED", ("cpu",) if joins else ())
    model = build(FAMILIES[family]())
    engine = RolloutEngine(model)
    exact = engine(PROMPTS, **SHORT)
    assert engine.fp8_error is None
    ours = engine(PROMPTS, **FP8)
    assert engine.fp8_error > 0
    oracle = in_8_bits(build(FAMILIES[family]()))
    errors, moved = [], []
    for prompt, samples, logps in zip(PROMPTS, ours.tokens, ours.logps, strict=True):
        for tokens, own in zip(samples, logps, strict=True):
            ids = torch.tensor([prompt + tokens])
            for found, judge in ((errors, oracle), (moved, model)):
                found += abs(plain_logps(judge, ids)[0, len(prompt) - 1 :].numpy() - own).tolist()
    assert np.mean(errors) < 0.1 * np.mean(moved)  # not 0: numbers of other last digits may be rounded otherwise
    assert np.median(errors) < 1e-4
    same(engine(PROMPTS, **SHORT), exact, 0)  # as if nothing had been


def test_8_bit_copies_follow_the_weights_and_are_captured(on_cpu):
    model = build(FAMILIES["llama"]())
    engine = taped(model)
    for change in (1.0, -0.5):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "proj" in name:
                    p.mul_(change)
        expected = RolloutEngine(model, pad_steps=True)(PROMPTS, **FP8)
        for _ in range(3):
            ours = engine(PROMPTS, **FP8)
            assert ours.tokens == expected.tokens
        assert ours.counters["graph_replays"] > ours.counters["graph_captures"] == 0
    linear = [m for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]
    assert ours.counters["copy_bytes"] == sum(m.weight.numel() + 4 * len(m.weight) for m in linear)
    for _ in range(3):
        assert engine(PROMPTS, **SHORT).tokens == RolloutEngine(model, pad_steps=True)(PROMPTS, **SHORT).tokens
        assert engine(PROMPTS, **FP8).tokens == expected.tokens


@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_adapters_in_8_bits(low):
    """Merged before rounding, or beside what they wrap."""
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        lora = peft.get_peft_model(build(FAMILIES["llama"](), torch.float32), config)
    engine = RolloutEngine(lora, autocast_dtype=low)
    ours = engine(PROMPTS, **FP8)
    if low is None:
        assert ours.tokens == RolloutEngine(lora.merge_and_unload())(PROMPTS, **FP8).tokens
    else:
        assert 0 < engine.fp8_error < 1


def test_what_is_wrong_in_8_bits_is_refused(monkeypatch):
    model = build(FAMILIES["llama"]())

    def twice(x):
        y, scale = fp8_rows(x)
        return y, scale * 2

    with monkeypatch.context() as patch:
        patch.setattr(weights, "fp8_rows", twice)
        engine = RolloutEngine(model)
        engine(PROMPTS, **SHORT)  # the model's own are as they were
        with pytest.raises(PMCError, match=r"rollout_dtype is 'fp8', but a product of LlamaForCausalLM is off by 1"):
            engine(PROMPTS, **FP8)
    with monkeypatch.context() as patch:  # the exact path is compared first
        patch.setattr(
            engine_module.ModelStep,
            "attend",
            lambda self, layer, q, k, v, *rest: v.transpose(1, 2).repeat(1, 1, 2, 1),
        )
        with pytest.raises(PMCError, match="rollouts do not compute what the model computes"):
            RolloutEngine(model)(PROMPTS, **FP8)
    with pytest.raises(PMCError, match="rollout_dtype is 'int8': it must be auto or fp8"):
        RolloutEngine(model)(PROMPTS, **SHORT, rollout_dtype="int8")
    with pytest.raises(PMCError, match="GPT2LMHeadModel has no linear layer of multiples of 16"):
        RolloutEngine(build(FAMILIES["gpt2"]()))(PROMPTS, **FP8)
    monkeypatch.setattr(self_check, "why_no_fp8", lambda device, dtype: f"a card of {dtype}")
    with pytest.raises(PMCError, match=r"rollout_dtype is 'fp8', but a card of torch.bfloat16: use auto"):
        RolloutEngine(model, autocast_dtype=torch.bfloat16)(PROMPTS, **FP8)


# --- the parts


def pair(bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    memory = torch.randn(7, 4, generator=generator, dtype=dtype)
    more = torch.randn(7, generator=generator, dtype=dtype)
    layers = [torch.nn.Linear(4, n, bias=bias, dtype=dtype) for n in (2, 5)]
    for layer, w, b in zip(layers, memory.split((2, 5)), more.split((2, 5)), strict=True):
        layer.weight.data = w
        if bias:
            layer.bias.data = b
    return layers, JoinedProduct({m: Weights(m.weight, m.bias) for m in layers})


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_no_part_is_stale(bias):
    (a, b), product = pair(bias)
    first, second = product.forwards().values()
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    with Products() as made:
        torch.testing.assert_close(second(x), b(x))  # in any order
        torch.testing.assert_close(first(x), a(x))
    assert made.columns.count(7) == 1
    torch.testing.assert_close(first(x), a(x))
    x.mul_(2)
    torch.testing.assert_close(second(x), b(x))  # changed since
    torch.testing.assert_close(first(x), a(x))
    assert product._apart
    for change in ("another", "again", "equal"):
        (a, b), product = pair(bias)
        first, second = product.forwards().values()
        torch.testing.assert_close(first(x), a(x))
        if change == "again":
            torch.testing.assert_close(first(x), a(x))
        other = {"another": y, "again": x, "equal": x.clone()}[change]
        torch.testing.assert_close(second(other), b(other))
        assert product._apart
        with Products() as made:
            torch.testing.assert_close(first(y), a(y))
            torch.testing.assert_close(second(y), b(y))
        assert 7 not in made.columns
    with torch.inference_mode():
        (a, b), product = pair(bias)
        first, second = product.forwards().values()
        z = torch.randn(3, 4, dtype=torch.float64)
        torch.testing.assert_close(first(z), a(z))
        z.mul_(2)
        torch.testing.assert_close(second(z), b(z))


def test_what_lies_side_by_side():
    memory = torch.arange(24.0).view(6, 4)
    a, b, c = memory.split((1, 2, 3))
    assert torch.equal(joined([a, b, c]), memory)
    assert joined([a, b]).shape == (3, 4)
    assert joined([a]).data_ptr() == memory.data_ptr()
    for others in ([b, a], [a, c], [a, b.clone()], [a, b.view(torch.int32)], [a, memory.view(-1)[4:8]], [memory.T]):
        assert joined(others) is None
    assert joined([torch.nn.Parameter(a), b]).requires_grad is False


def test_joining_leaves_the_model_as_it_was(tmp_path):
    """Names, values, files, gradients and optimizer steps; parameters stay the same objects."""
    made = []
    for joins in (False, True):
        model = build(FAMILIES["qwen2"](), torch.bfloat16)
        before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
        if joins:
            assert join_weights(model) == 4
            assert join_weights(model) == 0  # a part of a storage is not moved again
        for name, p in model.named_parameters():
            assert id(p) == before[name][0]
            assert torch.equal(p, before[name][1])
            assert p.is_contiguous()
        optimizer = MasterWeights(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
        for _ in range(2):
            ids = torch.tensor([PROMPTS[2]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folder = tmp_path / str(joins)
        model.save_pretrained(folder)
        made.append((list(model.state_dict()), (folder / "model.safetensors").read_bytes()))
    assert made[0] == made[1]
    attention = model.model.layers[0].self_attn
    for tensors in (
        [getattr(attention, n).weight for n in ATTENTION],
        [getattr(attention, n).bias for n in ATTENTION],
    ):
        assert joined(tensors) is not None  # after steps, too
        assert torch.equal(joined(tensors), torch.cat(list(tensors)))


def test_memory_that_others_may_hold_is_not_moved():
    def attention():
        return build(FAMILIES["llama"](), torch.float32)

    model = attention()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj.weight = first.k_proj.weight  # shared
    assert join_weights(model) == 2
    model = attention()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        p.data = part.view(p.shape)
    addresses = [p.data_ptr() for p in model.parameters()]
    assert join_weights(model) == 0
    assert [p.data_ptr() for p in model.parameters()] == addresses
    model = attention()
    for layer in model.model.layers:
        layer.self_attn.v_proj.bfloat16()
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.T.contiguous().T
    assert join_weights(model) == 0
