"""Other methods: gradients and losses against plain torch, what they refuse, and that each moves its objective."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import log_softmax

from pmc_fast.config import PMCConfig
from pmc_fast.data import Row
from pmc_fast.errors import PMCError
from pmc_fast.methods import EUL, FLAT, IDK, METHODS, NPO, REFUSALS, Batch, RetainOnly, SimNPO, Unlearner
from pmc_fast.pmc.losses import dpo, npo, simnpo

ROWS = [
    Row("Who wrote it?", "Ann wrote it."),
    Row("Where?", "In a small town in the north."),
    Row("Why?", "For fun."),
]
KEPT = [Row("Is 4 even?", "It is."), Row("And 5?", "No, it is odd.")]
CHOSEN = [2, 0]
LAMBDA = 1.7
# the others: test_mollm.py, test_divergences.py
SUMMED = [n for n, method in METHODS.items() if not method.apart and not any(method().divergences)]


def answer_logps(model, tokenizer, question, answer):
    """The log-probs of an answer's tokens from the model's plain forward pass, with its tag and eos: [M]."""
    prompt = tokenizer(f"Question: {question}\n", add_special_tokens=False).input_ids
    ids = tokenizer(f"Question: {question}\nAnswer: {answer}", add_special_tokens=False).input_ids
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    logps = log_softmax(model(ids).logits[0, :-1].double(), -1)
    return logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def mean_ce(answers):
    return -torch.cat(answers).mean()


def flat(refused, forgotten, divergence):
    """FLAT's loss of one question from the definition of a conjugate, sup over t of u t - f(t), on a grid."""
    f, g = {
        "kl": (lambda t: t * t.log(), lambda v: v),
        "pearson": (lambda t: (t - 1) ** 2, lambda v: v),
        "total_variation": (lambda t: (t - 1).abs() / 2, lambda v: v.tanh() / 2),
        "jensen_shannon": (
            lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(), lambda v: (2 / (1 + (-v).exp())).log()
        ),
    }[divergence]  # fmt: skip
    t = torch.cat([torch.logspace(-5, 2, 20_001, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    u = g(forgotten)
    return (u * t - f(t)).max() - g(refused)


def losses(name, answers, refused, reference, refused_reference):
    """Each method's loss of its forget questions, from lists of token log-probs [M]."""
    sums, lengths = torch.stack([a.sum() for a in answers]), torch.tensor([len(a) for a in answers])
    before, refused_before = (torch.stack([a.sum() for a in of]) for of in (reference, refused_reference))
    zero = torch.zeros((), dtype=torch.float64)
    return {
        "ga": lambda: -mean_ce(answers),
        "grad_diff": lambda: -mean_ce(answers),
        "idk": lambda: mean_ce(refused),
        "dpo": lambda: dpo(torch.stack([a.sum() for a in refused]), sums, refused_before, before, 0.3),
        "npo": lambda: npo(sums, before, 0.3),
        "simnpo": lambda: simnpo(sums, lengths, 0.3, 0.1),
        "flat": lambda: torch.stack([
            (f.exp().mean() - 1).exp() - r.exp().mean() for f, r in zip(answers, refused, strict=True)
        ]).mean(),
        "retain_only": lambda: zero,
    }[name]()  # fmt: skip


def made(model, tokenizer, name, *, max_tokens=8192, **parameters):
    own = {f.name for f in dataclasses.fields(METHODS[name])}
    wanted = {"retain_weight": LAMBDA, "beta": 0.3, "gamma": 0.1} | parameters
    method = METHODS[name](**{key: value for key, value in wanted.items() if key in own})
    return Unlearner(model, tokenizer, PMCConfig(prompt_format="tags", max_tokens=max_tokens), method, ROWS)


@pytest.mark.parametrize("max_tokens", [8192, 40])  # one pack, and several
@pytest.mark.parametrize("name", SUMMED)
def test_gradients_and_loss_are_those_of_the_paper(tiny, tokenizer, name, max_tokens):
    task = made(tiny, tokenizer, name, max_tokens=max_tokens)
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    refusals = [REFUSALS[i] for i in CHOSEN]

    def every(texts, rows):
        return [answer_logps(tiny, tokenizer, row.question, text) for row, text in zip(rows, texts, strict=True)]

    chosen = [ROWS[i] for i in CHOSEN]
    with torch.no_grad():
        reference, refused_reference = every([r.answer for r in chosen], chosen), every(refusals, chosen)
        task.prepare()
        for p in tiny.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    loss = task.backward(CHOSEN, kept)
    ours = [p.grad.clone() for p in tiny.parameters()]
    tiny.zero_grad()
    answers, refused = every([r.answer for r in chosen], chosen), every(refusals, chosen)
    retain = mean_ce(every([r.answer for r in KEPT], KEPT))
    expected = losses(name, answers, refused, reference, refused_reference) + LAMBDA * retain
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for mine, p in zip(ours, tiny.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()))


def random_batch(seed=0, sizes=(3, 1, 6)):
    g = torch.Generator().manual_seed(seed)
    logps = {kind: -torch.rand(sum(sizes), generator=g, dtype=torch.float64) * 4 for kind in ("forget", "template")}
    offsets = dict.fromkeys(logps, torch.tensor([0, *sizes]).cumsum(0))
    reference = {kind: -torch.rand(len(sizes), generator=g, dtype=torch.float64) * 9 for kind in logps}
    return Batch({kind: of.requires_grad_() for kind, of in logps.items()}, offsets, reference)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "retain_only"])
def test_a_method_says_whether_its_gradient_depends_on_the_log_probs(name):
    method = METHODS[name]()
    gradients = []
    for seed in (0, 1):
        batch = random_batch(seed)
        objective = method.objective(batch)
        gradients.append(torch.autograd.grad(objective, [batch.logps[kind] for kind in method.answers]))
    same = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert same == method.linear


@pytest.mark.parametrize("divergence", ["kl", "total_variation", "jensen_shannon", "pearson"])
@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_flat_has_the_conjugates_of_its_divergences(divergence, refused, forgotten):
    p = {
        "template": torch.tensor([refused], dtype=torch.float64),
        "forget": torch.tensor([forgotten], dtype=torch.float64),
    }
    batch = Batch({kind: v.log() for kind, v in p.items()}, dict.fromkeys(p, torch.tensor([0, 1])), {})
    expected = flat(p["template"][0], p["forget"][0], divergence)
    assert float(FLAT(divergence=divergence).objective(batch)) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("name", SUMMED)
def test_training_moves_the_objective(tiny, tokenizer, name):
    task = made(tiny, tokenizer, name)
    task.prepare()
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.05)
    found = []
    for _ in range(6):
        found.append(task.backward([0, 1, 2], kept))
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0]


def test_answers_are_asked_for_before_work_starts(tiny, tokenizer):
    rows = [*ROWS, Row("When?", None)]
    config = PMCConfig(prompt_format="tags")
    for name, method in METHODS.items():
        if method.told:
            with pytest.raises(PMCError, match=r"forget, row 4: no answer is given, and \w+ trains on the answers"):
                Unlearner(tiny, tokenizer, config, METHODS[name](), rows)
        else:
            Unlearner(tiny, tokenizer, config, method(), rows)


def test_misuse_is_refused(tiny, tokenizer):
    task = Unlearner(tiny, tokenizer, PMCConfig(prompt_format="tags"), NPO(), ROWS)
    with pytest.raises(PMCError, match="call prepare"):
        task.backward([0])
    task.prepare()
    with pytest.raises(PMCError, match="index 3 is none of 3 questions"):
        task.backward([3])
    with pytest.raises(PMCError, match="RetainOnly has nothing to train on"):
        made(tiny, tokenizer, "retain_only").backward([0])
    with pytest.raises(PMCError, match="no token of the template answer fits max_length 8"):
        Unlearner(tiny, tokenizer, PMCConfig(prompt_format="tags", max_length=8), IDK(), [Row("A " * 20, None)])
    with pytest.raises(PMCError, match="divergence is 'js': use one of kl"):
        FLAT(divergence="js")
    for make, error in (
        (lambda: NPO(beta=0.0), "NPO: beta is 0.0: it must be above 0"),
        (lambda: SimNPO(beta=0), "SimNPO: beta is 0: it must be above 0"),
        (lambda: SimNPO(gamma=-1.0), "SimNPO: gamma is -1.0: it must be 0 or more"),
        (lambda: FLAT(retain_weight=float("nan")), "FLAT: retain_weight is nan: it must be 0 or more"),
        (lambda: EUL(alpha=2.0), "EUL: alpha is 2.0: it must be between 0 and 1"),
    ):
        with pytest.raises(PMCError, match=error):
            make()


def test_a_step_without_retain_pairs_is_the_objective_alone(tiny, tokenizer):
    task = made(tiny, tokenizer, "npo")
    task.prepare()
    assert task.backward([0, 1]) == pytest.approx(float(npo(torch.zeros(2), torch.zeros(2), 0.3)), rel=1e-5)


def test_answers_whose_weight_is_lost_in_float32_are_not_computed(tiny, tokenizer, monkeypatch):
    """An answer e^-180 times as likely as before: NPO's weight of its tokens, e^-90, is a subnormal number, and slow."""
    model = tiny
    task = Unlearner(model, tokenizer, PMCConfig(prompt_format="tags"), NPO(beta=0.5, retain_weight=LAMBDA), ROWS)
    kept = [task.encoder.pair(row.question, row.answer) for row in KEPT]
    task.prepare()
    task._reference["forget"][0] += 180

    def step(unlearner, indices):
        model.zero_grad()
        loss = unlearner.backward(indices, kept)
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    packs, packed = [], type(task.packed).__call__
    monkeypatch.setattr(
        type(task.packed),
        "__call__",
        lambda self, p, *more, **how: (packs.append(p), packed(self, p, *more, **how))[1],
    )
    plain = Unlearner(model, tokenizer, PMCConfig(prompt_format="tags"), RetainOnly(retain_weight=LAMBDA), ROWS)
    loss, gradients = step(task, [0])
    expected, retained = step(plain, [0])
    assert loss == pytest.approx(expected)  # the objective itself is as good as 0
    torch.testing.assert_close(gradients, retained)
    assert [len(p.sequences) for p in packs[:2]] == [1, len(KEPT)]  # its log-probs, and the pairs alone
    _, both = step(task, [0, 1])
    assert [len(p.sequences) for p in packs[3:]] == [2, 1 + len(KEPT)]
    assert not torch.allclose(both, retained)
    task.method = NPO(beta=0.5, retain_weight=0.0)
    model.zero_grad()
    assert task.backward([0]) == pytest.approx(0, abs=1e-6)  # and nothing to do at all
