"""Methods that hold the untouched model: gradients and losses against plain torch, of whole models and of adapters."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import log_softmax

from pmc_fast.config import PMCConfig
from pmc_fast.errors import PMCError
from pmc_fast.methods import EUL, ICU, MOLLM, GradDiff, Memorize, RetainOnly, Unlearner, extrapolate
from tests.methods.test_methods import CHOSEN, KEPT, LAMBDA, ROWS

METHODS = [EUL(retain_weight=LAMBDA, alpha=0.7, gamma=0.3), ICU(retain_weight=LAMBDA, beta=0.6), Memorize(beta=1.3)]
NAMES = ["EUL", "ICU", "Memorize"]


def distributions(model, tokenizer, rows):
    """Of the answers' tokens: log-probs of all tokens in their place [M, V], and of themselves [M]."""
    every, own = [], []
    for row in rows:
        prompt = tokenizer(f"Question: {row.question}\n", add_special_tokens=False).input_ids
        ids = tokenizer(f"Question: {row.question}\nAnswer: {row.answer}", add_special_tokens=False).input_ids
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        logps = log_softmax(model(ids).logits[0, :-1].double(), -1)[len(prompt) - 1 :]
        every.append(logps)
        own.append(logps.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(every), torch.cat(own)


def expected_loss(method, model, before, tokenizer, rows):
    """The methods' formulas as their papers have them."""
    forget, own = distributions(model, tokenizer, rows)
    kept, kept_own = distributions(model, tokenizer, KEPT)
    with torch.no_grad():
        forget_before, kept_before = (distributions(before, tokenizer, of)[0] for of in (rows, KEPT))
    kl_forget = (forget_before.exp() * (forget_before - forget)).sum(1).mean()
    kl_kept = (kept_before.exp() * (kept_before - kept)).sum(1).mean()
    if isinstance(method, EUL):
        own_part = method.alpha * kl_kept - (1 - method.alpha) * kl_forget + method.gamma * own.mean()
        return own_part - method.retain_weight * kept_own.mean()
    if isinstance(method, ICU):
        return own.mean() - method.retain_weight * kept_own.mean() + method.beta * kl_kept
    return -own.mean() + method.beta * kl_kept


def moved(model):
    """Move a model's trained parameters as training does."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


def compare(method, model, before, tokenizer, max_tokens=8192):
    task = Unlearner(model, tokenizer, PMCConfig(prompt_format="tags", max_tokens=max_tokens), method, ROWS)
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    trained = [p.requires_grad for p in model.parameters()]
    task.prepare()
    moved(model)
    loss = task.backward(CHOSEN, kept)
    assert [p.requires_grad for p in model.parameters()] == trained
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = [p.grad.clone() for p in parameters]
    model.zero_grad()
    expected = expected_loss(method, model, before, tokenizer, [ROWS[i] for i in CHOSEN])
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for mine, p in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=2e-3, atol=2e-5 * float(p.grad.abs().max()))
    return task


@pytest.mark.parametrize("max_tokens", [8192, 40])  # one pack, and several
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_gradients_and_loss_are_those_of_the_paper(tiny, tokenizer, method, max_tokens):
    task = compare(method, tiny, copy.deepcopy(tiny), tokenizer, max_tokens)
    assert task.teacher.packed.base is not tiny


@pytest.mark.parametrize(
    ("method", "same"),
    [
        (GradDiff(retain_weight=0.6), ICU(retain_weight=0.0, beta=0.6)),
        (ICU(retain_weight=LAMBDA, beta=0.6), ICU(retain_weight=0.0, beta=LAMBDA + 0.6)),
    ],
)
def test_retain_loss_kl_takes_the_place_of_the_cross_entropy(tiny, tokenizer, method, same):
    found = []
    for one, retain_loss in ((method, "kl"), (same, "nll")):
        model = copy.deepcopy(tiny)
        config = PMCConfig(prompt_format="tags", retain_loss=retain_loss)
        task = Unlearner(model, tokenizer, config, one, ROWS)
        task.prepare()
        moved(model)
        loss = task.backward(CHOSEN, [task.encoder.pair(row.question, row.answer) for row in KEPT])
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (ours, gradient), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("method", "why"),
    [(MOLLM(), "MOLLM mixes two losses"), (RetainOnly(), "RetainOnly trains on retain pairs alone")],
)
def test_retain_loss_kl_is_refused_where_nothing_would_move(tiny, tokenizer, method, why):
    with pytest.raises(PMCError, match=f"retain_loss is 'kl' and {why}"):
        Unlearner(tiny, tokenizer, PMCConfig(prompt_format="tags", retain_loss="kl"), method, ROWS)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_new_adapter_is_switched_off_and_an_old_one_copied(tiny, tokenizer, method, new):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny, config)
    if not new:
        moved(model)
    task = compare(method, model, copy.deepcopy(model), tokenizer)
    assert (task.teacher.packed is task.packed) == new


def test_an_adapter_beside_trained_weights_needs_a_copy(tiny, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny, config)
    model.get_input_embeddings().weight.requires_grad_()
    task = compare(METHODS[1], model, copy.deepcopy(model), tokenizer)
    assert task.teacher.packed is not task.packed


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_under_autocast_the_untouched_model_diverges_from_itself_by_nothing(tiny, tokenizer, method):
    losses = []
    for weighted in (method, dataclasses.replace(method, **{"alpha" if isinstance(method, EUL) else "beta": 0.0})):
        task = Unlearner(
            tiny, tokenizer, PMCConfig(prompt_format="tags"), weighted, ROWS, autocast_dtype=torch.bfloat16
        )
        task.prepare()
        losses.append(task.backward(CHOSEN, [task.encoder.pair(row.question, row.answer) for row in KEPT]))
        assert all(p.grad.isfinite().all() for p in tiny.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_eul_alternates_between_data(tiny, tokenizer):
    task = Unlearner(tiny, tokenizer, PMCConfig(prompt_format="tags"), METHODS[0], ROWS)
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    with pytest.raises(PMCError, match="call prepare"):
        task.backward(CHOSEN, kept)
    task.prepare()
    both = task.backward(CHOSEN, kept)
    gradients = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()
    assert task.backward([], kept) + task.backward(CHOSEN) == pytest.approx(both, rel=1e-4)
    for mine, p in zip(gradients, tiny.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=2e-3, atol=2e-5 * float(p.grad.abs().max()))


def test_icu_drops_what_is_forgotten():
    answers = ["Ann", "In a small town in the north.", "It was written by Ann in 1901.", "Ann"]
    said = ["It was Ann.", "He wrote poems about the sea.", "It was written by Ann, they say.", ""]
    assert ICU.left(answers, said) == [0, 2]
    assert ICU.left(answers, said, bleu=0.9) == []
    assert ICU.left(answers, answers, bleu=0.9) == [0, 1, 2, 3]


@pytest.fixture
def memorised(taught, tokenizer):
    """A model that learned answers by heart, and its weights before."""
    before = {name: p.detach().clone() for name, p in taught.named_parameters()}
    task = Unlearner(taught, tokenizer, PMCConfig(prompt_format="tags"), Memorize(), ROWS)
    task.prepare()
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    optimizer = torch.optim.SGD(taught.parameters(), lr=0.01)
    for _ in range(6):
        task.backward([0, 1, 2], kept)
        optimizer.step()
        optimizer.zero_grad()
    return taught, before


def nll(model, tokenizer):
    with torch.no_grad():
        return -float(distributions(model, tokenizer, ROWS)[1].mean())


def test_extrapolation_forgets_what_was_memorised(memorised, tokenizer):
    model, before = memorised
    learned = {name: p.detach().clone() for name, p in model.named_parameters()}
    untouched = copy.deepcopy(model)
    untouched.load_state_dict(before, strict=False)
    extrapolate(model, before, 2.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, 3 * before[name] - 2 * learned[name])
    forgets, knows = nll(model, tokenizer), nll(untouched, tokenizer)
    model.load_state_dict(learned, strict=False)
    assert nll(model, tokenizer) < knows < forgets


def test_extrapolation_refuses(tiny):
    before = {name: p.detach().clone() for name, p in tiny.named_parameters()}
    with pytest.raises(PMCError, match="alpha is 0: it must be above 0"):
        extrapolate(tiny, before, 0)
    name, weight = before.popitem()
    with pytest.raises(PMCError, match=f"before has no {name}"):
        extrapolate(tiny, before)
    assert torch.equal(dict(tiny.named_parameters())[name], weight)
