"""The packed pass through transformers models: gradients of the plain, unpadded passes, whatever wraps the model."""

import pytest
import torch
import transformers as tf
from torch.nn.parallel import DistributedDataParallel

from pmc_fast.data import Encoded, collate
from pmc_fast.data.packing import num_targets, pack, unpad
from pmc_fast.errors import PMCError
from pmc_fast.models import packed_attention as op
from pmc_fast.models import packed_forward, patching
from pmc_fast.models.packed_forward import PackedPass, causal_lm
from pmc_fast.ops import row_scales, weighted_nll
from tests.families import FAMILIES, REFUSED, build
from tests.processes import exchanged

IGNORED = -100


def answer(prompt, ids):
    return Encoded([*prompt, *ids], [IGNORED] * len(prompt) + list(ids))


GROUPS = [
    [answer([5, 7, 9], [11, 4, 2])],
    [answer([8, 8, 3, 30, 41], a) for a in ([17, 22, 6, 9, 2], [50, 2], [2])],
    [answer([3], [13, 2])],
    [answer([5, 7], [12, 33, 6, 20, 9, 40, 21, 2])],
]
FLAT = [s for group in GROUPS for s in group]
WEIGHTS = torch.tensor([0.3, 0.5, 0.2, 0.1, 0.7, -0.2], dtype=torch.float64)


def plain_loss(model, dtype=torch.float64):
    """A pass of its own for every sequence."""
    total = 0
    for s, weight in zip(FLAT, WEIGHTS.tolist(), strict=True):
        logits = model(input_ids=torch.tensor([s.input_ids]), use_cache=False).logits[0, :-1].to(dtype)
        labels = torch.tensor(s.labels[1:])
        total = total + weight * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total


def packed_loss(base, max_tokens=1000, groups=GROUPS, **how):
    total = 0
    for p in pack(groups, max_tokens):
        scale = row_scales(WEIGHTS[p.sequences], p.cu_targets, p.targets, reduction="sum")
        total = total + PackedPass(base)(p, scale, **how)[0]
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs, rtol=1e-5):  # transformers' RMS norms round to float32 whatever the model is
    assert ours.keys() == theirs.keys()
    for name, g in theirs.items():
        assert (ours[name] - g).norm() <= rtol * g.norm() + 1e-12, name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_plain_models(family):
    model = build(FAMILIES[family]())
    theirs = gradients(model, plain_loss(model))
    for max_tokens in (1000, 14):
        loss = packed_loss(model, max_tokens)
        torch.testing.assert_close(loss, plain_loss(model))
        same(gradients(model, loss), theirs)
    PackedPass(model).check()


def test_mean_nll_is_the_padded_batchs_loss():
    model = build(FAMILIES["gpt2"]())
    batch = collate(FLAT, 0)
    theirs = gradients(model, model(**batch).loss)
    for max_tokens in (8192, 10):
        same(gradients(model, PackedPass(model).mean_nll(FLAT, max_tokens=max_tokens)), theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_what_a_mask_hides_inside_prompts_is_hidden(family):
    """Where pad is eos, a mask made by comparison hides the prompts' eos too: positions go on over the gaps."""
    model = build(FAMILIES[family]())
    batch = collate(
        [answer(p, a) for p, a in [([5, 2, 7], [4, 2]), ([8, 2, 2, 9, 2, 3], [6, 6, 6, 2]), ([3], [2])]], 2
    )
    batch["attention_mask"] = batch["input_ids"] != 2
    theirs = model(**batch, use_cache=False)
    ours = PackedPass(model).mean_nll(unpad(batch))
    torch.testing.assert_close(ours, theirs.loss.double(), atol=1e-6, rtol=1e-6)  # its logits are rounded to float32
    same(gradients(model, ours), gradients(model, theirs.loss))
    visible = model(**batch | {"attention_mask": torch.ones_like(batch["input_ids"])}, use_cache=False)
    assert abs(ours - visible.loss) > 1e-3


def test_shared_prompts_change_nothing():
    model = build(FAMILIES["llama"]())
    alone = packed_loss(model, groups=[[s] for s in FLAT])
    same(gradients(model, packed_loss(model)), gradients(model, alone))


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_by_name(family):
    config, _ = REFUSED[family]
    model = build(config(), torch.float32)
    with pytest.raises(PMCError, match=f"(?i){type(model).__name__[:5]}.*not supported"):
        PackedPass(model).check()


@pytest.fixture
def llama():
    return build(FAMILIES["llama"]())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(llama, reentrant):
    theirs = gradients(llama, plain_loss(llama))
    llama.train()
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    calls = []
    llama.model.layers[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    loss = packed_loss(llama)
    same(gradients(llama, loss), theirs)
    assert len(calls) == 2  # computed again in backward, long after the pass has put the attention back


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(llama, backend):
    theirs = gradients(llama, plain_loss(llama))
    torch._dynamo.reset()
    compiled = torch.compile(llama, backend=backend)
    same(gradients(llama, packed_loss(llama, model=compiled)), theirs)


def test_compiled_in_place(llama):
    theirs = gradients(llama, plain_loss(llama))
    torch._dynamo.reset()
    llama.compile(backend="eager")
    same(gradients(llama, packed_loss(llama)), theirs)


@pytest.mark.parametrize("unused", [False, True])
def test_ddp_sees_the_pass(llama, process_group, unused):
    """Its hooks run (a gradient bucket is reduced), and it finds the loss in the output."""
    theirs = gradients(llama, plain_loss(llama))
    wrapped = DistributedDataParallel(llama, find_unused_parameters=unused)
    reduced = exchanged(wrapped)
    same(gradients(llama, packed_loss(llama, model=wrapped)), theirs)
    assert sum(reduced) == sum(p.numel() for p in llama.parameters())


def test_autocast_is_that_of_the_plain_pass():
    model = build(FAMILIES["llama"](), torch.float32)
    exact = gradients(model, packed_loss(model))
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = gradients(model, plain_loss(model)), gradients(model, packed_loss(model))
    for name, g in exact.items():
        assert (ours[name] - g).norm() <= 2 * (theirs[name] - g).norm() + 1e-6, name
        assert not torch.equal(ours[name], g)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj,lm_head"])
def test_lora(llama, targets):
    """Also on the head; what is frozen gets no gradient, and none is computed for it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets.split(","), init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama, config).double()
    theirs = gradients(model, plain_loss(model))
    base = causal_lm(model)
    ours = gradients(model, packed_loss(base, model=model))
    same(ours, theirs)
    assert ours
    assert all("lora" in name for name in ours)


def test_a_frozen_head_computes_no_gradient_for_itself(monkeypatch):
    model = build(FAMILIES["llama"]())
    model.lm_head.weight.requires_grad_(False)
    made = []
    monkeypatch.setattr("pmc_fast.ops.nll_chunked.run", (lambda run: lambda *a: [made.append(a[8]), run(*a)][1])(
        __import__("pmc_fast.ops.nll_chunked", fromlist=["run"]).run))  # fmt: skip
    packed_loss(model).backward()
    assert made == [(True, False, False)]


def test_logps_are_those_of_each_target(llama):
    (p,) = pack(GROUPS, 1000)
    _, logps = PackedPass(llama)(p, torch.zeros(len(p.targets), dtype=torch.float64))
    expected = []
    for s in FLAT:
        with torch.no_grad():
            all_ = llama(torch.tensor([s.input_ids])).logits[0].log_softmax(-1)
        expected += [float(all_[t - 1, s.labels[t]]) for t in range(1, len(s.labels)) if s.labels[t] != IGNORED]
    torch.testing.assert_close(logps, torch.tensor(expected, dtype=torch.float64))
    assert not logps.requires_grad
    assert len(expected) == sum(map(num_targets, FLAT))


def test_nothing_is_left_behind(llama):
    before = (llama.config._attn_implementation, "forward" in vars(llama), "forward" in vars(llama.lm_head))
    packed_loss(llama)
    llama.model.layers[1].register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_loss(llama)
    assert before == (llama.config._attn_implementation, "forward" in vars(llama), "forward" in vars(llama.lm_head))


def test_a_forward_of_the_instances_own_comes_back(llama):
    own = llama.forward
    llama.forward = lambda *a, **k: own(*a, **k)
    mine = llama.forward
    packed_loss(llama)
    assert llama.forward is mine


def test_an_attention_that_is_wrong_is_found(llama):
    """The first-use check compares with the plain model."""
    right = op.attention
    wrong = lambda module, q, k, v, mask, **kw: right(module, q, k * 1.1, v, mask, **kw)  # noqa: E731
    patching.register_attention(op.ATTENTION, wrong)
    try:
        with pytest.raises(PMCError, match="a packed pass does not compute what the model computes"):
            PackedPass(llama).check()
    finally:
        patching.register_attention(op.ATTENTION, right)


def test_weights_of_several_targets_on_one_row(llama):
    """The prompt's last row predicts the first token of all answers: one row, several targets."""
    (p,) = pack(GROUPS, 1000)
    assert len(p.hidden_rows) < len(p.targets)
    hidden = torch.randn(len(p.hidden_rows), 32, dtype=torch.float64)
    loss, _ = weighted_nll(hidden, llama.lm_head.weight, p.targets, torch.ones(len(p.targets)).double(), p.rows)
    logits = hidden[p.rows] @ llama.lm_head.weight.T
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, p.targets, reduction="sum"))


def test_dropout_runs_in_train_mode():
    model = build(tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.5,
                                resid_pdrop=0.0, embd_pdrop=0.0))  # fmt: skip
    assert packed_loss(model) == packed_loss(model)
    model.train()
    assert packed_loss(model) != packed_loss(model)


@pytest.fixture
def compared(monkeypatch):
    """The models whose own forward pass a check computed."""
    made, plain = [], packed_forward.plain_logps
    monkeypatch.setattr(packed_forward, "plain_logps", lambda call, ids: [made.append(call), plain(call, ids)][1])
    return made


def test_a_pass_is_compared_once_for_each_way_that_the_model_is_called(llama, compared):
    packed, compiled = PackedPass(llama), torch.compile(llama, backend="eager")
    for model in (None, llama, compiled, compiled, None):
        packed.check(model=model)
    assert set(compared) == {llama, compiled}
    once = len(compared) // 2
    packed.check(torch.bfloat16)
    llama.to(torch.bfloat16)
    packed.check()
    own = llama.forward
    llama.forward = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate wraps it
    packed.check()
    assert len(compared) == 5 * once


def test_what_fails_a_check_fails_it_again(llama):
    llama.lm_head.weight.data.fill_(torch.nan)
    packed = PackedPass(llama)
    for _ in range(2):
        with pytest.raises(PMCError, match="off by nan"):
            packed.check()


def test_a_pass_computes_in_its_own_precision():
    model = build(FAMILIES["llama"](), torch.float32)
    (p,) = pack(GROUPS, 1000)
    scale = torch.ones(len(p.targets))
    with torch.autocast("cpu", torch.bfloat16):
        expected = PackedPass(model)(p, scale)[1]
    low = PackedPass(model, autocast_dtype=torch.bfloat16)
    low.check()
    assert torch.equal(low(p, scale)[1], expected)
    assert not torch.equal(PackedPass(model)(p, scale)[1], expected)
