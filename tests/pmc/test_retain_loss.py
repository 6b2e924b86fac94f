"""retain_loss "kl": the divergence from the untouched model on pairs to keep, against plain torch."""

import copy
import json

import peft
import pytest
import torch

from pmc_fast import PMC, PMCConfig
from pmc_fast.errors import PMCError
from pmc_fast.models import teacher
from pmc_fast.models.teacher import Teacher
from pmc_fast.pmc import packed_loss
from tests.pmc.test_algorithm import QUESTIONS, RETAIN, core, gradients

LAMBDA = 1.7


def logits(model, sequence):
    """Those that predict a sequence's targets, from the model's own forward pass: [M, V], float64."""
    at = [t for t, label in enumerate(sequence.labels[1:]) if label != -100]
    return model(torch.tensor([sequence.input_ids])).logits[0, at].double()


def plain(model, untouched, answers, kept):
    """CE(answers) and KL(untouched || model) on kept, means over their targets."""
    ce = torch.cat([
        torch.nn.functional.cross_entropy(
            logits(model, s), torch.tensor([x for x in s.labels[1:] if x != -100]), reduction="none"
        )
        for s in answers
    ]).mean()  # fmt: skip
    parts = []
    for s in kept:
        with torch.no_grad():
            before = logits(untouched, s).log_softmax(1)
        parts.append((before.exp() * (before - logits(model, s).log_softmax(1))).sum(1))
    return ce, torch.cat(parts).mean()


def moved(model):
    """Move a model's trained weights as some steps would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)


def adapted(tiny):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("max_tokens", [8192, 40])  # one pack, and several
@pytest.mark.parametrize("wrap", [lambda tiny: tiny, adapted], ids=["full", "lora"])
def test_loss_and_gradients_are_those_of_plain_torch(tiny, tokenizer, wrap, max_tokens):
    untouched = copy.deepcopy(tiny)
    model = wrap(tiny)
    pmc = core(model, tokenizer, retain_weight=LAMBDA, retain_loss="kl", max_tokens=max_tokens)
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    answers = [s for [s] in step.answers]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for turn in range(2):
        ce, kl = plain(model, untouched, answers, kept)
        assert (float(kl.detach()) > 1e-3) == bool(turn)
        wanted = torch.autograd.grad(ce + LAMBDA * kl, parameters)
        out = pmc.loss(step, kept)
        out.loss.backward()
        assert float(out.loss.detach()) == pytest.approx(float((ce + LAMBDA * kl).detach()), rel=1e-5)
        assert float(out.collapse) == pytest.approx(float(ce.detach()), rel=1e-5)
        assert float(out.retain) == pytest.approx(float(kl.detach()), rel=1e-4, abs=1e-6)
        for p, g in zip(parameters, wanted, strict=True):
            assert float((p.grad - g).norm()) <= 1e-4 * float(g.norm()) + 1e-7
        model.zero_grad()
        moved(model)
    switched_off = pmc._loss.teacher.packed is pmc.packed  # an adapter; nothing is copied
    assert switched_off == (model is not tiny)


@pytest.mark.parametrize("normalization", ["micro_batch", "step"])
def test_a_step_may_be_cut_into_parts(tiny, tokenizer, normalization):
    pmc = core(tiny, tokenizer, retain_loss="kl", normalization=normalization)
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    moved(tiny)
    parts = list(zip(step.split(2), (kept[:2], kept[2:]), strict=True))
    losses = list(pmc.step_losses(parts))
    torch.stack([m.loss for m in losses]).sum().backward()
    together = gradients(tiny)
    count = sum(sum(label != -100 for label in s.labels[1:]) for s in kept)
    for part, retain in parts:
        pmc.loss(part, retain, retain_tokens=count if normalization == "step" else None).loss.backward()
    for name, g in gradients(tiny).items():
        torch.testing.assert_close(together[name], g, rtol=1e-4, atol=1e-7)


def test_a_pair_is_computed_once_and_another_mask_is_another_pair(tiny, tokenizer, monkeypatch):
    pmc = core(tiny, tokenizer, retain_loss="kl")
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    passes, run = [], Teacher._run

    def counted(packed, pack):
        passes.append(len(pack.targets))
        return run(packed, pack)

    monkeypatch.setattr(Teacher, "_run", staticmethod(counted))
    for chosen in (kept[:2], kept[1:], kept):
        pmc.loss(step, chosen).loss.backward()
    targets = [sum(label != -100 for label in s.labels[1:]) for s in kept]
    assert passes == targets
    shorter = copy.deepcopy(kept[0])
    shorter.labels[shorter.prompt_length] = -100
    assert [len(rows) for rows in pmc._loss.teacher.rows([shorter, kept[0]])] == [targets[0] - 1, targets[0]]


def test_a_resumed_run_compares_with_the_untouched_model(tiny, tokenizer):
    pmc = core(tiny, tokenizer, retain_loss="kl")
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    untouched, state = copy.deepcopy(tiny), json.loads(json.dumps(pmc.state_dict()))
    moved(tiny)
    wanted = float(pmc.loss(step, kept).loss.detach())
    other = core(untouched, tokenizer, retain_loss="kl")
    other.load_state_dict(state)
    untouched.load_state_dict(tiny.state_dict())
    assert float(other.loss(step, kept).loss.detach()) == wanted
    pmc.load_state_dict(state)  # of the same run, whose weights have moved: it knows the untouched model
    assert float(pmc.loss(step, kept).loss.detach()) == wanted
    with pytest.raises(
        PMCError, match=r"these weights are not the untouched model's.* before trained weights are loaded"
    ):
        core(untouched, tokenizer, retain_loss="kl").load_state_dict(state)
    with pytest.raises(PMCError, match="the state is of a run without it"):
        core(untouched, tokenizer, retain_loss="kl").load_state_dict(state | {"untouched_logps": None})
    core(untouched, tokenizer).load_state_dict(state)  # the published loss asks for nothing


def test_prepare_takes_the_model_as_it_is(tiny, tokenizer):
    pmc = core(tiny, tokenizer, retain_loss="kl")
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    moved(tiny)
    assert float(pmc.loss(step, kept).loss.detach()) > float(pmc.loss(step, kept).collapse) + 1e-3
    pmc.prepare()
    assert float(pmc.loss(step, kept).loss.detach()) == pytest.approx(float(pmc.loss(step, kept).collapse), rel=1e-5)


def test_sharded_models_are_refused_before_and_after_prepare(tiny, tokenizer, monkeypatch):
    pmc, late = (core(tiny, tokenizer, retain_loss="kl") for _ in range(2))
    late.prepare()
    step, kept = late.sample(range(4)), late.encode_retain(RETAIN)
    monkeypatch.setattr(packed_loss, "is_sharded", lambda model: True)
    for refused in (pmc.prepare, lambda: late.loss(step, kept)):
        with pytest.raises(PMCError, match="retain_loss is 'kl' and the model is sharded"):
            refused()
    core(tiny, tokenizer).prepare()


def test_without_a_weight_no_model_is_kept(tiny, tokenizer):
    pmc = core(tiny, tokenizer, retain_loss="kl", retain_weight=0.0)
    pmc.prepare()
    out = pmc.loss(pmc.sample(range(4)), pmc.encode_retain(RETAIN))
    assert pmc._loss.teacher is None
    assert float(out.loss.detach()) == pytest.approx(float(out.collapse))


def test_under_autocast_nothing_has_moved_at_first(tiny, tokenizer):
    config = PMCConfig(num_samples=3, max_length=40, prompt_format="tags", retain_loss="kl")
    pmc = PMC(tiny, tokenizer, config, QUESTIONS, autocast_dtype=torch.bfloat16)
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    assert float(pmc.loss(step, kept).retain) < 1e-4  # in passes of other sizes bfloat16 rounds differently
    assert pmc._loss.teacher.rows(kept)[0].dtype == torch.bfloat16
    moved(tiny)
    assert float(pmc.loss(step, kept).retain) > 1e-3


def test_what_does_not_fit_is_computed_again(tiny, tokenizer, monkeypatch):
    pmc = core(tiny, tokenizer, retain_loss="kl")
    pmc.prepare()
    kept = pmc.encode_retain(RETAIN)
    wanted = pmc._loss.teacher.rows(kept)
    pmc._loss.teacher.drop_rows()
    monkeypatch.setattr(teacher, "KEPT", wanted[0].nbytes + wanted[1].nbytes)
    for _ in range(2):
        for ours, theirs in zip(pmc._loss.teacher.rows(kept), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert pmc._loss.teacher._bytes <= teacher.KEPT


def test_frozen_weights_of_an_adapter_stay_frozen(tiny, tokenizer):
    model = adapted(tiny)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    pmc = core(model, tokenizer, retain_loss="kl")
    pmc.prepare()
    pmc.loss(pmc.sample(range(4)), pmc.encode_retain(RETAIN)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and "lora_B" not in name]
    assert pmc._loss.teacher.packed is pmc.packed


def test_passes_through_torch_compile_are_the_same(tiny, tokenizer):
    pmc = core(tiny, tokenizer, retain_loss="kl")
    pmc.prepare()
    step, kept = pmc.sample(range(4)), pmc.encode_retain(RETAIN)
    moved(tiny)
    wanted = float(pmc.loss(step, kept).loss.detach())
    compiled = torch.compile(tiny, backend="eager")
    assert float(pmc.loss(step, kept, model=compiled).loss.detach()) == pytest.approx(wanted, rel=1e-5)
