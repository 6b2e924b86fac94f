"""Layers lent for training: the model's own results and gradients, and nothing left behind."""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
import transformers as tf

from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.models.fused_layers import ROTARY, FusedLayers
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.ops.layers import rms_norm
from pmc_fast.rollout import RolloutEngine
from tests.families import HOW, PROMPTS, SIZES

KINDS = ("RMSNorm", "MLP")
FAMILIES = {  # and what of them must be lent
    "llama": (lambda: tf.LlamaConfig(**SIZES), KINDS),
    "qwen2": (lambda: tf.Qwen2Config(**SIZES), KINDS),
    "qwen3": (lambda: tf.Qwen3Config(**SIZES), KINDS),
    "gemma3": (lambda: tf.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=8), KINDS[:1]),
    "phi": (lambda: tf.PhiConfig(**SIZES | {"num_key_value_heads": 4}), ()),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64), ()),
}


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
        with layers.replaced():
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
    layers, expected = FusedLayers(model, training=True), step(model, ids)
    agree(step(model, ids, layers), expected)
    with layers.replaced():
        assert lent(model) == {m for m in model.modules() if type(m).__name__.endswith(kinds)}
    assert not lent(model)


def test_rotary_is_lent_and_given_back_after_an_error():
    from transformers.models.llama import modeling_llama

    model, before = build(tf.LlamaConfig(**SIZES)), getattr(modeling_llama, ROTARY)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    with FusedLayers(model, training=True).replaced():
        rotate = getattr(modeling_llama, ROTARY)
        assert isinstance(rotate, functools.partial)
        assert "_Rotary" in str(rotate(q, q, cos, sin)[0].grad_fn)
        slope = torch.autograd.grad(rotate(q, q, cos.requires_grad_(), sin)[0].sum(), cos)  # torch's own then
        assert slope[0].abs().sum() > 0
    with pytest.raises(ZeroDivisionError), FusedLayers(model, training=True).replaced():
        _ = 1 / 0
    assert getattr(modeling_llama, ROTARY) is before
    assert not lent(model)


def test_for_rollouts_nothing_has_gradients():
    model = build(tf.LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        with FusedLayers(model).replaced():
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
    layers = FusedLayers(model, training=True)
    ours = step(model, tokens(), layers)
    agree(ours, expected)
    assert all("lora" in n for n in ours[1])
    with layers.replaced():
        kinds = {type(m).__name__ for m in lent(model)}
    assert {"LlamaRMSNorm", "LlamaMLP"} <= kinds  # the MLP too: dropout repeats with its seed


def test_hooks_still_run():
    model = build(tf.LlamaConfig(**SIZES))
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(y) or y * 2)
    model.model.norm.register_forward_pre_hook(lambda m, x: (x[0] * 0.5,))
    expected = step(model, tokens())
    seen.clear()
    layers = FusedLayers(model, training=True)
    agree(step(model, tokens(), layers), expected)
    assert len(seen) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_stay(reentrant):
    model = build(tf.LlamaConfig(**SIZES))
    layers, expected = FusedLayers(model, training=True), step(model, tokens())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with layers.replaced():
        assert not lent(model)
    agree(step(model, tokens(), layers), expected)
    model.eval()  # does not checkpoint
    with layers.replaced():
        assert lent(model)


def test_autocast_finds_torchs_layers():
    model = build(tf.LlamaConfig(**SIZES))
    layers = FusedLayers(model, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens(), use_cache=False).logits
        with layers.replaced():
            assert not lent(model)
    with layers.replaced(), torch.autocast("cpu", torch.bfloat16):  # switched on later, as accelerate does
        assert lent(model)
        ours = model(tokens(), use_cache=False).logits
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, expected)


def test_other_types_and_replaced_forwards_are_left_alone():
    model = build(tf.LlamaConfig(**SIZES)).double()
    layers = FusedLayers(model, training=True)
    with layers.replaced():
        assert not lent(model)
    model = build(tf.LlamaConfig(**SIZES))
    layers = FusedLayers(model, training=True)
    with layers.replaced():
        pass
    norm = model.model.norm
    norm.forward = own = lambda x: x * 3
    expected = step(model, tokens())
    agree(step(model, tokens(), layers), expected)
    assert norm.forward is own
    del norm.forward
    with layers.replaced():
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


class ClampedMLP(torch.nn.Module):
    """Looks like a gated MLP and is one for small numbers, but clamps large ones."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act_fn, self.limit = torch.nn.SiLU(), 16

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit))


class ClampedRMSNorm(CappedRMSNorm):
    """Looks like an RMS norm and is one for small numbers."""

    def forward(self, x):
        return rms_norm(x.clamp(-100, 100), self.weight, self.eps)


class EmptyRMSNorm(CappedRMSNorm):
    """Has its weight elsewhere, as under ZeRO-3."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0))


class GatedRMSNorm(CappedRMSNorm):
    """Needs a gate beside its input."""

    def forward(self, x, gate=None):
        return rms_norm(x, self.weight, self.eps) * gate.sigmoid()


class ScaledLinear(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_only_looks_alike_is_not_lent():
    alike = (
        DroppingMLP(),
        ClampedMLP(),
        ClampedRMSNorm(),
        CappedRMSNorm(),
        EmptyRMSNorm(),
        GatedRMSNorm(),
        ScaledLinear(8, 8),
    )
    model = torch.nn.Sequential(*alike).eval()
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    layers = FusedLayers(model, training=True)
    with layers.replaced():
        assert not lent(model)
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)


def computed(model):
    layers = FusedLayers(model, training=True)
    with layers.replaced():
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("kind", ["mlp", "norm", "rotary"])
def test_a_clamp_beyond_the_numbers_of_the_trial_is_kept(kind, monkeypatch):
    """As in a model of remote code: large activations are clamped, in a layer of any kind that we replace."""
    from transformers.models.llama import modeling_llama

    model = build(tf.LlamaConfig(**SIZES))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e4)
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.mul_(300)
            layer.self_attn.q_proj.weight.mul_(100)
    if kind == "mlp":
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", ClampedMLP.forward)
        for layer in model.model.layers:
            layer.mlp.limit = 16
    elif kind == "norm":
        norm = modeling_llama.LlamaRMSNorm.forward
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: norm(self, x.clamp(-100, 100)))
    else:
        own = getattr(modeling_llama, ROTARY)
        clamped = lambda q, k, cos, sin: own(q.clamp(-5, 5), k.clamp(-5, 5), cos, sin)  # noqa: E731
        monkeypatch.setattr(modeling_llama, ROTARY, clamped)
    expected = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(computed(model), expected, atol=1e-4, rtol=1e-4)


def test_a_hook_on_an_activation_is_heard_whenever_it_comes():
    model = build(tf.LlamaConfig(**SIZES))
    layers = FusedLayers(model, training=True)
    step(model, tokens(), layers)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, x, y: y * 3)
    agree(step(model, tokens(), layers), step(model, tokens()))


def test_a_hook_inside_lora_is_heard_in_rollouts():
    """Merged into one product, its parts are not called."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build(tf.LlamaConfig(**SIZES)), settings).eval()
    engine = RolloutEngine(model)
    engine(PROMPTS, **HOW)
    for name, module in model.named_modules():
        if name.endswith("up_proj.lora_B.default"):
            module.register_forward_hook(lambda m, x, y: y * -20)
    hooked = engine(PROMPTS, **HOW).tokens
    assert hooked == RolloutEngine(model)(PROMPTS, **HOW).tokens  # whose first use compares with the model itself


class Halved(torch.Tensor):
    """A weight that is not what its memory holds, as a quantised one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(torch.Tensor) / 2 if isinstance(a, cls) else a for a in args]
        if func is torch.nn.functional.linear:
            return func(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_weights_of_other_classes_are_the_models_own(training):
    model = build(tf.LlamaConfig(**SIZES)).eval()
    for layer in model.model.layers:
        linear = layer.mlp.down_proj
        weight = linear.weight.detach().as_subclass(Halved)
        del linear.weight
        linear.weight = weight
    expected = model(tokens(), use_cache=False).logits
    with FusedLayers(model, training=training).replaced(), torch.no_grad():
        torch.testing.assert_close(model(tokens(), use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    engine = RolloutEngine(model)
    assert engine(PROMPTS, **HOW).tokens == engine(PROMPTS, **HOW).tokens


# --- on CUDA; without a GPU Triton's interpreter stands in, which cuts bfloat16 where it should round


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16
CUDA_FAMILIES = ["llama", "qwen3", "gemma3", "phi"]
needs_gpu = pytest.mark.skipif(
    not GPU, reason="needs a GPU: python -m pytest tests/models/test_fused_layers.py on one"
)


def lower(model):
    return model.to(DEVICE, HALF)


def exactly(model, ids):
    """Return logits and gradients of the same weights in float64."""
    return step(copy.deepcopy(model).double(), ids)


def as_near(ours, plain, exact):
    """Ours is as near to the exact numbers as the model's own layers are."""
    assert ours[1].keys() == plain[1].keys()
    for a, b, e in [(ours[0], plain[0], exact[0]), *((ours[1][n], plain[1][n], exact[1][n]) for n in plain[1])]:
        assert a.dtype == b.dtype
        a, b, unit = a.double(), b.double(), torch.finfo(a.dtype).eps
        assert (a - e).abs().max() <= 3 * (b - e).abs().max() + unit * e.abs().max()


@pytest.mark.parametrize("family", CUDA_FAMILIES)
def test_a_half_precision_model_trains_as_by_itself_on_cuda(family):
    config, kinds = FAMILIES[family]
    model = lower(build(config()))
    ids = tokens().to(DEVICE)
    layers = FusedLayers(model, training=True, backend="cuda")
    as_near(step(model, ids, layers), step(model, ids), exactly(model, ids))
    with layers.replaced():
        assert lent(model) == {m for m in model.modules() if type(m).__name__.endswith(kinds)}
    assert not lent(model)


def test_rotary_is_lent_on_cuda():
    from transformers.models.llama import modeling_llama

    q = torch.randn(1, 2, 5, 8, device=DEVICE, dtype=HALF, requires_grad=True)
    cos, sin = (torch.randn(1, 5, 8, device=DEVICE, dtype=HALF) for _ in range(2))
    model = lower(build(tf.LlamaConfig(**SIZES)))
    for training in (False, True):
        with FusedLayers(model, training, backend="cuda").replaced():
            rotated = getattr(modeling_llama, ROTARY)(q, q[:, :1], cos, sin)[0]
            assert "_Rotary" in str(rotated.grad_fn)
            wide = getattr(modeling_llama, ROTARY)(q, q, cos.float(), sin.float())[0]
            assert wide.dtype == torch.float32
            assert "_Rotary" in str(wide.grad_fn)
            double = getattr(modeling_llama, ROTARY)(q.double(), q.double(), cos, sin)[0]
            assert "_Rotary" not in str(double.grad_fn)


@pytest.mark.parametrize("family", CUDA_FAMILIES)
def test_under_autocast_all_types_on_cuda_are_the_models_own(family):
    model, ids = build(FAMILIES[family][0]()).to(DEVICE), tokens().to(DEVICE)
    exact, seen = exactly(model, ids), {}
    for name, m in model.named_modules():
        m.register_forward_hook(
            lambda m, x, y, name=name: seen.setdefault(name, []).append(getattr(y, "dtype", None))
        )
    layers = FusedLayers(model, training=True, backend="cuda")
    made = {}
    for how in (None, layers):
        seen.clear()
        with torch.autocast(DEVICE, HALF):
            made[how] = step(model, ids, how)
        # layers are tried on numbers of both types: the last call is the pass's
        made[how, "types"] = {name: kinds[-1] for name, kinds in seen.items() if "act_fn" not in name}
    assert made[None, "types"] == made[layers, "types"]
    as_near(made[layers], made[None], exact)


def test_autocast_switched_on_later_keeps_gradients():
    """Layers tried inside of autocast leave no weight in its cache, cast without gradients."""
    model, ids = build(tf.LlamaConfig(**SIZES)).to(DEVICE), tokens().to(DEVICE)
    layers = FusedLayers(model, training=True, backend="cuda")
    with layers.replaced(), torch.autocast(DEVICE, HALF):
        model(ids, use_cache=False).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_other_roundings_and_activations_stay_on_cuda():
    model = lower(build(tf.Olmo2Config(**SIZES)))
    with FusedLayers(model, backend="cuda").replaced():  # rounds once, after the weight
        assert {type(m).__name__ for m in lent(model)} == {"Olmo2MLP"}
    model = lower(build(tf.LlamaConfig(**SIZES, hidden_act="gelu")))
    with FusedLayers(model, backend="cuda").replaced():
        assert {type(m).__name__ for m in lent(model)} == {"LlamaRMSNorm"}


def test_a_model_that_moved_is_tried_again():
    model = build(tf.LlamaConfig(**SIZES)).to(DEVICE).double()
    layers = FusedLayers(model, backend="cuda")
    with layers.replaced():
        assert not lent(model)
    lower(model)
    with layers.replaced():
        assert {type(m).__name__ for m in lent(model)} == {"LlamaRMSNorm", "LlamaMLP"}


def test_rollouts_run_on_layers_of_cuda():
    model = build(tf.LlamaConfig(**SIZES)).to(DEVICE).eval()
    how = HOW | {"num_samples": 2, "max_new_tokens": 5}
    expected = RolloutEngine(model)(PROMPTS, **how).tokens
    engine = RolloutEngine(model)
    engine._step._layers = FusedLayers(model, backend="cuda")
    assert engine(PROMPTS, **how).tokens == expected  # and the check of a first use passed


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", CUDA_FAMILIES)
def test_rollouts_on_a_gpu(family, autocast, graphs):
    model = build(FAMILIES[family][0]()).eval().to("cuda", torch.float32 if autocast else HALF)
    engine = RolloutEngine(model, autocast_dtype=HALF if autocast else None, cuda_graphs=graphs)
    made = [engine(PROMPTS, **HOW) for _ in range(3)]  # compares log-probs with the model's own first
    assert made[2].counters["graph_replays"] > 0 or not graphs
    assert made[2].tokens == made[1].tokens
    with engine._step.prepared():
        assert {type(m).__name__ for m in lent(model)} >= {k for k in kinds_of(model) if k.endswith("RMSNorm")}


def kinds_of(model):
    return {type(m).__name__ for m in model.modules()}


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", CUDA_FAMILIES)
def test_a_packed_pass_on_a_gpu(family, autocast):
    model = build(FAMILIES[family][0]()).to("cuda", torch.float32 if autocast else HALF).eval()
    packed = pack([[Encoded(ids, list(ids))] for ids in PROMPTS], 1000)[0]
    scale = torch.full((len(packed.targets),), 1 / len(packed.targets))

    def computed(run):
        """Return log-probs, of which some are always unlucky, and gradients."""
        run.base.zero_grad(set_to_none=True)
        loss, logps = run(packed, scale)
        loss.backward()
        return logps.cuda(), {n: p.grad.cuda() for n, p in run.base.named_parameters() if p.grad is not None}

    made = {}
    for name, lends in (("ours", True), ("plain", False)):
        run = PackedPass(model)
        if not lends:
            run._layers.replaced = nullcontext
        run.check(HALF if autocast else None)
        with torch.autocast("cuda", HALF, enabled=autocast):
            made[name] = computed(run)
    exact = computed(PackedPass(copy.deepcopy(model).cpu().double()))
    as_near(made["ours"], made["plain"], exact)
