"""Layers lent for training: the model's own results and gradients, and nothing left behind."""

import functools

import pytest
import torch
import transformers as tf

from pmc_fast import lending
from pmc_fast.lending import ROTARY, CpuLayers
from pmc_fast.ops.gemm import gemm_serves
from pmc_fast.ops.train_layers import rms_norm
from tests.families import SIZES

KINDS = ("RMSNorm", "MLP", "Linear") if gemm_serves(torch.zeros(1, 1)) else ("RMSNorm", "MLP")
FAMILIES = {  # and what of them must be lent
    "llama": (lambda: tf.LlamaConfig(**SIZES), KINDS),
    "qwen2": (lambda: tf.Qwen2Config(**SIZES), KINDS),
    "qwen3": (lambda: tf.Qwen3Config(**SIZES), KINDS),
    "gemma3": (lambda: tf.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8), (KINDS[0], *KINDS[2:])),
    "phi": (lambda: tf.PhiConfig(**SIZES | {"num_key_value_heads": 4}), KINDS[2:]),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64), KINDS[2:]),
}


@pytest.fixture(autouse=True)
def thin_layers_too(monkeypatch):
    """The tiny models have no others."""
    monkeypatch.setattr(lending, "THIN", 1)


def build(config, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        for p in model.parameters():  # else biases are 0 and the weights of norms 1
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.05)
    return model.train()


def tokens(batch=1, seed=0):
    return torch.randint(1, 61, (batch, 21), generator=torch.Generator().manual_seed(seed))


def lent(model):
    return {m for m in model.modules() if "forward" in vars(m)}


def step(model, ids, layers=None):
    """Return logits and gradients of one training step; backward runs when all is given back."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    if layers is None:
        logits = model(ids, use_cache=False).logits
    else:
        with layers.lend():
            logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def agree(ours, expected):
    assert ours[1].keys() == expected[1].keys()
    for a, b in [(ours[0], expected[0]), *((ours[1][n], expected[1][n]) for n in expected[1])]:
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-9


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_as_by_itself(family, batch):
    config, kinds = FAMILIES[family]
    model, ids = build(config()), tokens(batch)
    layers, expected = CpuLayers(model, training=True), step(model, ids)
    agree(step(model, ids, layers), expected)
    with layers.lend():
        assert lent(model) == {m for m in model.modules() if type(m).__name__.endswith(kinds)}
    assert not lent(model)


def test_thin_layers_stay(monkeypatch):
    monkeypatch.setattr(lending, "THIN", 40)
    model = build(FAMILIES["llama"][0]())
    with CpuLayers(model, training=True).lend():
        linears = {m for m in lent(model) if isinstance(m, torch.nn.Linear)}
    assert linears == set()  # one side of each has 32
    wide = build(tf.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 96}))
    with CpuLayers(wide, training=True).lend():
        names = {n for n, m in wide.named_modules() if m in lent(wide) and isinstance(m, torch.nn.Linear)}
    mlps = {f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")}
    assert names == ({*mlps, "lm_head"} if "Linear" in KINDS else set())


def test_rotary_is_lent_and_given_back_after_an_error():
    from transformers.models.llama import modeling_llama

    model, before = build(tf.LlamaConfig(**SIZES)), getattr(modeling_llama, ROTARY)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    with CpuLayers(model, training=True).lend():
        rotate = getattr(modeling_llama, ROTARY)
        assert isinstance(rotate, functools.partial)
        assert "_Rotary" in str(rotate(q, q, cos, sin)[0].grad_fn)
        slope = torch.autograd.grad(rotate(q, q, cos.requires_grad_(), sin)[0].sum(), cos)  # torch's own then
        assert slope[0].abs().sum() > 0
    with pytest.raises(ZeroDivisionError), CpuLayers(model, training=True).lend():
        _ = 1 / 0
    assert getattr(modeling_llama, ROTARY) is before
    assert not lent(model)


def test_for_rollouts_nothing_has_gradients_and_linear_layers_stay():
    model = build(tf.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        with CpuLayers(model).lend():
            torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=1e-5)
            assert {type(m).__name__ for m in lent(model)} == {"LlamaRMSNorm", "LlamaMLP"}


def test_lora_trains_its_adapters_with_their_dropout():
    peft = pytest.importorskip("peft")
    names = ["q_proj", "gate_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=names, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(build(tf.LlamaConfig(**SIZES)), settings).train()
    expected = step(model, tokens())
    layers = CpuLayers(model, training=True)
    ours = step(model, tokens(), layers)
    agree(ours, expected)
    assert all("lora" in n for n in ours[1])
    with layers.lend():
        kinds = {type(m).__name__ for m in lent(model)}
    assert {"LlamaRMSNorm", "LlamaMLP", *KINDS[2:]} <= kinds  # the MLP too: dropout repeats with its seed


def test_hooks_still_run():
    model = build(tf.LlamaConfig(**SIZES))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(y) or y * 2)
    model.model.norm.register_forward_pre_hook(lambda m, x: (x[0] * 0.5,))
    expected = step(model, tokens())
    seen.clear()
    layers = CpuLayers(model, training=True)
    agree(step(model, tokens(), layers), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_stay(reentrant):
    model = build(tf.LlamaConfig(**SIZES))
    layers, expected = CpuLayers(model, training=True), step(model, tokens())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with layers.lend():
        assert not lent(model)
    agree(step(model, tokens(), layers), expected)
    model.eval()  # does not checkpoint
    with layers.lend():
        assert lent(model)


def test_autocast_finds_torchs_layers():
    model = build(tf.LlamaConfig(**SIZES))
    layers = CpuLayers(model, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens(), use_cache=False).logits
        with layers.lend():
            assert not lent(model)
    with layers.lend(), torch.autocast("cpu", torch.bfloat16):  # switched on later, as accelerate does
        assert lent(model)
        ours = model(tokens(), use_cache=False).logits
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_other_types_and_replaced_forwards_are_left_alone():
    model = build(tf.LlamaConfig(**SIZES)).double()
    layers = CpuLayers(model, training=True)
    with layers.lend():
        assert not lent(model)
    model = build(tf.LlamaConfig(**SIZES))
    layers = CpuLayers(model, training=True)
    with layers.lend():
        pass
    norm = model.model.norm
    norm.forward = own = lambda x: x * 3
    expected = step(model, tokens())
    agree(step(model, tokens(), layers), expected)
    assert norm.forward is own
    del norm.forward
    with layers.lend():
        expected = model.double()(tokens(), use_cache=False).logits  # moved while lent
    assert expected.dtype == torch.float64


class DroppingMLP(torch.nn.Module):
    """Looks like a gated MLP, but has a dropout that eval mode hides."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act_fn, self.drop = torch.nn.SiLU(), torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.down_proj(self.drop(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class CappedRMSNorm(torch.nn.Module):
    """Looks like an RMS norm, but caps its result."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps).clamp(max=1.0)


class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_only_looks_alike_is_not_lent():
    model = torch.nn.Sequential(DroppingMLP(), CappedRMSNorm(), ScaledLinear(8, 8)).eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    layers = CpuLayers(model, training=True)
    with layers.lend():
        assert lent(model) <= {m for m in model.modules() if type(m) is torch.nn.Linear}
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
