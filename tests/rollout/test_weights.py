"""Products of several layers computed as one: on the CPU, where rollouts do not, so that every path is run."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast.models.joined_weights import join_weights, joined, siblings
from pmc_fast.rollout import RolloutEngine, weights
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
    found = engine._step._weights.forwards()
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
    joins = [f.func.__self__._sizes for f in engine._step._weights.forwards().values() if hasattr(f.func, "__self__")]
    attention = [sizes for sizes in joins if sizes != [48, 48]]
    together = {1: [16, 16], 2: None, 5: [32, 16, 16]}[len(targets)] if dtype == torch.float64 else [32, 16, 16]
    assert attention == ([together] * 2 * len(together) if together else [])
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
    assert engine._step._weights.forwards()  # joined

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
    assert attention.k_proj not in engine._step._weights.forwards()
    attention.q_proj.register_forward_hook(lambda module, args, out: -out)
    hooked = [engine(PROMPTS, **HOW).tokens for _ in range(3)]
    assert hooked[0] == hooked[2] != moved[0].tokens


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
