"""The core: the reference's picks, losses and gradients, however a step is cut into pieces."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import Encoded, Encoder, Row, collate
from pmc_fast.data.chats import Chat, Turn, text_to_continue
from pmc_fast.data.packing import num_targets
from pmc_fast.errors import PMCError
from pmc_fast.models import packed_forward
from pmc_fast.pmc import packed_loss
from pmc_fast.pmc.selection import bradley_terry, draw, likeliest, select
from pmc_fast.reference import Reference
from pmc_fast.rollout import self_check
from pmc_fast.rollout.engine import Rollouts
from tests.processes import exchanged

QUESTIONS = ["Who wrote it?", "Where was the author born, and when?", "Why?", "What is the name of the cat?"]
RETAIN = [Row("Is 4 even?", "It is."), Row("And 5?", "No, it is odd."), Row("6?", "Yes."), Row("7?", "No, never.")]


def core(model, tokenizer, questions=QUESTIONS, **values):
    config = {"num_samples": 3, "max_length": 40, "prompt_format": "tags", "temperature": 1.25} | values
    return PMC(model, tokenizer, PMCConfig(**config), questions)


@pytest.fixture
def ready(tiny, tokenizer):
    """A core whose questions have been sampled once."""

    def make(**settings):
        pmc = core(tiny, tokenizer, **settings)
        pmc.prepare()
        return pmc, pmc.sample(range(len(pmc.questions)))

    return make


def half(initial, candidates, min_len):
    """A reward that is never satisfied: questions are sampled at every visit."""
    return np.full((len(initial), len(candidates[0])), 0.5)


def gradients(model):
    made = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return made


def close(ours, theirs, rtol=1e-4):
    for name, g in theirs.items():
        assert (ours[name] - g).norm() <= rtol * g.norm(), name


def reference_of(pmc):
    """The published algorithm with the core's answers in its store."""
    reference = Reference(pmc.model, pmc.encoder.tokenizer, pmc.config, pmc.questions)
    reference.initial_answers = pmc.initial_answers
    for i in range(len(pmc.questions)):
        [[answer, _]] = pmc.store.answer(i)
        reference.sampled_data[i] = {"answer": answer, "score": pmc.store.score(i)}
    return reference


def test_losses_and_gradients_are_the_references(ready):
    pmc, step = ready(retain_weight=1.25)
    out = pmc.loss(step, pmc.encode_retain(RETAIN))
    out.loss.backward()
    ours = gradients(pmc.model)
    theirs = reference_of(pmc).loss(range(4), RETAIN)
    theirs["loss"].backward()
    close(ours, gradients(pmc.model))
    for a, b in ((out.loss, "loss"), (out.collapse, "collapse_loss"), (out.retain, "retain_loss")):
        assert a.item() == pytest.approx(theirs[b].item(), rel=1e-5)


def test_a_run_compares_its_engine_and_its_pass_with_the_model_once(tiny, tokenizer, monkeypatch):
    seen = {"engine": 0, "packed_forward": 0}
    for module, name in ((self_check, "engine"), (packed_forward, "packed_forward")):

        def counted(model, ids, name=name, plain=module.plain_logps):
            seen[name] += 1
            return plain(model, ids)

        monkeypatch.setattr(module, "plain_logps", counted)
    pmc = core(tiny, tokenizer)
    pmc.prepare()
    prepared = dict(seen)
    assert all(prepared.values())
    pmc.packed.check()
    for model in (None, tiny):
        pmc.loss(pmc.sample([0, 1]), pmc.encode_retain(RETAIN), model=model)
    assert seen == prepared


@pytest.mark.parametrize("number", [0, 1])
def test_golden_losses_and_gradients(golden, smollm2_dir, tokenizer, number):
    """Numbers of the published code, on SmolLM2-135M."""
    case = golden("loss_cases")[number]
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = 2  # see tests/test_reference.py
    config = PMCConfig(retain_weight=case["lambda_"], prompt_format=case["format"])
    pmc = PMC(model, tokenizer, config, [q for q, _ in case["collapse"]])
    pmc.initial_answers = ["known"]
    for i, (_, answer) in enumerate(case["collapse"]):
        pmc.store.offer(i, [[answer, 1.0]], 0.0)
    out = pmc.loss(
        pmc.sample(range(len(case["collapse"]))), pmc.encode_retain([Row(q, a) for q, a in case["retain"]])
    )
    out.loss.backward()
    for ours, name in ((out.loss, "loss"), (out.collapse, "collapse_loss"), (out.retain, "retain_loss")):
        assert ours.item() == pytest.approx(case[name], rel=1e-5)
    parameters = dict(model.named_parameters())
    for name, norm in case["grad_norms"].items():
        assert parameters[name].grad.double().norm().item() == pytest.approx(norm, rel=1e-4)


def test_twenty_sgd_steps_end_where_the_references_do(ready, tiny_dir):
    """Distance of the two ends: at most 1e-3 of the distance moved."""
    pmc, step = ready()
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    start = torch.cat([p.detach().flatten() for p in other.parameters()])
    reference = reference_of(pmc)
    reference.model = other
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.02) for m in (pmc.model, other))
    for _ in range(20):
        pmc.loss(step, pmc.encode_retain(RETAIN)).loss.backward()
        reference.loss(range(4), RETAIN)["loss"].backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (pmc.model, other))
    assert (b - start).norm() > 0.1
    assert (a - b).norm() <= 1e-3 * (b - start).norm()


def summed(pmc, step, size, **settings):
    """Gradients of a step in micro-batches of `size`, and its loss."""
    for name, value in settings.items():
        setattr(pmc.config, name, value)
    retain = pmc.encode_retain(RETAIN)
    tokens = sum(x != -100 for s in retain for x in s.labels[1:])
    total = 0.0
    for n, part in enumerate(step.split(size)):
        out = pmc.loss(part, retain[n * size : (n + 1) * size], retain_tokens=tokens)
        out.loss.backward()
        total += out.loss.item()
    return total, gradients(pmc.model)


@pytest.mark.parametrize("selection", ["argmin", "soft"])
def test_packs_change_no_gradient(ready, selection):
    pmc, step = ready(selection=selection)
    loss, theirs = summed(pmc, step, 2)
    for max_tokens in (1, 30, 50):
        again, ours = summed(pmc, step, 2, max_tokens=max_tokens)
        assert again == pytest.approx(loss, rel=1e-5)
        close(ours, theirs, 1e-5)


def test_a_shared_system_prompt_changes_no_gradient(ready, monkeypatch):
    pmc, step = ready(prompt_format="chat", max_length=90)
    kept = pmc.encode_retain(RETAIN)
    tokens, losses, gradients_of = [], [], []
    for share_from in (10**6, 1):
        monkeypatch.setattr(packed_loss, "SHARED_PREFIX", share_from)
        out = pmc.loss(step, kept)
        pmc.model.zero_grad()
        out.loss.backward()
        tokens.append(out.counters["tokens"])
        losses.append(out.loss.item())
        gradients_of.append(gradients(pmc.model))
    assert tokens[1] < 0.9 * tokens[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    close(gradients_of[1], gradients_of[0], 1e-5)


@pytest.mark.parametrize(("selection", "normalization"), [("argmin", "micro_batch"), ("soft", "step")])
def test_parts_share_packs_and_keep_their_means(tiny, tokenizer, selection, normalization, monkeypatch):
    """Parts of 3, 1 and 0 questions, as where another process has more."""
    pmc = core(tiny.double(), tokenizer, selection=selection, normalization=normalization)
    pmc.prepare()
    split = replace(pmc.sample(range(4)), sizes=[4, 7]).split(3)
    retain = pmc.encode_retain(RETAIN)
    parts = list(zip(split, (retain[:3], retain[3:], []), strict=True))
    assert [len(part.indices) for part, _ in parts] == [3, 1, 0]
    monkeypatch.setattr(pmc.ranks, "gather", lambda own: [own, (0, 0, [True] * len(own[2]))])
    apart = [pmc.loss(*part, retain_tokens=sum(map(num_targets, retain))) for part in parts[:2]]
    torch.stack([out.loss for out in apart]).sum().backward()
    theirs = gradients(pmc.model)
    for max_tokens in (8192, 80):
        pmc.config.max_tokens = max_tokens
        made = []
        for out in pmc.step_losses(parts):
            out.loss.backward()
            made.append(out)
        assert (len(made) == 1) == (max_tokens == 8192)
        close(gradients(pmc.model), theirs, 1e-6)
        assert sum(out.loss.item() for out in made) == pytest.approx(sum(o.loss.item() for o in apart), rel=1e-6)
        for name in ("collapse", "retain"):
            each = [getattr(out, name).item() for out in apart]
            assert getattr(made[-1], name).tolist() == pytest.approx([*each, 0], rel=1e-6), name


def test_a_step_without_parts_or_words_is_refused(ready):
    pmc, step = ready()
    with pytest.raises(PMCError, match=r"give it all of step.split\(size\)"):
        next(pmc.step_losses([]))
    first, second = step.split(2)
    silent = replace(second, answers=[[Encoded([5], [-100])]] * 2)
    with pytest.raises(PMCError, match="a micro-batch has no token to train on"):
        next(pmc.step_losses([(first, pmc.encode_retain(RETAIN)), (silent, [])]))
    pmc.config.normalization = "step"
    with pytest.raises(PMCError, match="the step has 2 parts: give step_losses all of them"):
        next(pmc.step_losses([(first, pmc.encode_retain(RETAIN))]))


@pytest.mark.parametrize("selection", ["argmin", "soft"])
def test_a_steps_mean_does_not_depend_on_its_parts(ready, selection):
    pmc, step = ready(normalization="step", selection=selection)
    loss, theirs = summed(pmc, step, 4)
    for size in (1, 2, 3):
        again, ours = summed(pmc, step, size)
        assert again == pytest.approx(loss, rel=1e-5)
        close(ours, theirs, 1e-5)


def test_micro_batches_have_a_mean_each(ready):
    """Published: each micro-batch's loss is a mean over its own tokens, the step's the mean of theirs."""
    pmc, step = ready()
    loss, _ = summed(pmc, step, 2)
    reference = reference_of(pmc)
    parts = [reference.loss([0, 1], RETAIN[:2])["loss"], reference.loss([2, 3], RETAIN[2:])["loss"]]
    assert loss == pytest.approx(sum(p.item() for p in parts) / 2, rel=1e-5)
    assert loss != pytest.approx(summed(pmc, step, 4)[0], rel=1e-5)


def test_several_parts_need_the_steps_retain_tokens(ready):
    pmc, step = ready(normalization="step")
    with pytest.raises(PMCError, match=r"give loss\(..., retain_tokens=\)"):
        pmc.loss(step.split(2)[0], pmc.encode_retain(RETAIN))


def test_losses_come_pack_by_pack(ready):
    pmc, step = ready(max_tokens=30)
    retain = pmc.encode_retain(RETAIN)
    parts = list(pmc.losses(step, retain))
    whole = pmc.loss(step, retain)
    assert len(parts) == whole.counters["packs"] > 2
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), rel=1e-6)
    assert parts[-1].retain == whole.retain


@pytest.mark.parametrize("static", [False, True])
def test_ddp_exchanges_gradients_once_a_step(ready, process_group, static):
    """With the last pack: those before it accumulate. Not with static_graph, which would fail."""
    pmc, step = ready(max_tokens=30)
    parts = [(part, pmc.encode_retain(RETAIN[:2])) for part in step.split(2)]
    for out in pmc.step_losses(parts):
        out.loss.backward()
    theirs = gradients(pmc.model)
    wrapped = DistributedDataParallel(pmc.model, static_graph=static)
    reduced, packs = exchanged(wrapped), 0
    for out in pmc.step_losses(parts, model=wrapped):
        assert static or not reduced
        assert wrapped.require_backward_grad_sync  # also where a caller never asks for the other packs
        out.loss.backward()
        packs += 1
    assert packs > 2
    assert static or sum(reduced) == sum(p.numel() for p in pmc.model.parameters())
    close(gradients(pmc.model), theirs, 1e-6)


def test_a_padded_batch_is_what_it_holds(ready):
    pmc, step = ready()
    retain = pmc.encode_retain(RETAIN)
    for side in ("left", "right"):
        padded = collate(retain, pmc.encoder.pad, side=side)
        assert pmc.loss(step, padded).loss == pmc.loss(step, retain).loss


class Scripted:
    """An engine whose samples are given: one list of candidates for each question asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.candidates, self.asked = tokenizer, [], []

    def __call__(self, prompts, **how):
        self.asked.append((prompts, how))
        tokens = [[self.tokenizer(text)["input_ids"] for text in texts] for texts in self.candidates]
        return Rollouts(tokens, [], [], [], {})


def test_golden_store_traces(golden, tiny, tokenizer):
    for trace in golden("store_traces"):
        pmc = core(
            tiny,
            tokenizer,
            trace["questions"],
            num_samples=trace["num_samples"],
            min_len=trace["min_len"],
            max_length=200,
        )
        pmc.initial_answers, pmc._initial_ids = trace["initial"], [[1]] * len(trace["initial"])
        pmc.engine = Scripted(tokenizer)
        pmc.encoder.samples = lambda tokens, texts=None: next(texts)
        for visit in trace["visits"]:
            pmc.engine.candidates, pmc.engine.asked = visit["candidates"], []
            given = iter(visit["candidates"])
            pmc.encoder.samples = lambda tokens, question, given=given: next(given)
            step = pmc.sample(visit["batch"])
            prompts = [p for prompts, _ in pmc.engine.asked for p in prompts]
            assert prompts == [pmc.prompts[i] for i in visit["asked"]]
            for i, [encoded] in zip(visit["batch"], step.answers, strict=True):
                best = visit["best"][str(i)]
                assert pmc.store.answer(i) == [[best["answer"], 1.0]]
                assert pmc.store.score(i) == best["score"]
                assert encoded == pmc.encoder.pair(trace["questions"][i], best["answer"])


def test_each_visit_has_streams_of_its_own(tiny, tokenizer):
    """A function of (seed, question, visit): not of the company, the order, or the part of the run."""
    alone, together = core(tiny, tokenizer), core(tiny, tokenizer)
    for pmc in (alone, together):
        pmc.prepare()
    together.sample([3, 0, 1])
    for i in (0, 1, 3):
        alone.sample([i])
    assert alone.store.state_dict() == together.store.state_dict()
    first = alone.store.answer(0)
    alone.reward = half
    alone.store.load_state_dict({"entries": [[first, 0.5, 1], None, None, None]})
    seen = []
    alone.store.offer = lambda i, answer, score: seen.append(answer)
    alone.sample([0])
    assert seen != [first]


def test_a_question_asked_twice_is_sampled_once(tiny, tokenizer):
    pmc = core(tiny, tokenizer)
    pmc.reward = half
    pmc.prepare()
    for visits in (1, 2):
        step = pmc.sample([1, 1, 0])
        assert step.indices == [1, 1, 0]
        assert pmc.store.visits(1) == visits
    assert step.answers[0] == step.answers[1]


def test_samples_avoid_the_initial_answer(tiny, tokenizer):
    plain, pmc = core(tiny, tokenizer), core(tiny, tokenizer, answer_penalty=50.0)
    for p in (plain, pmc):
        p.prepare()
    assert pmc.initial_answers == plain.initial_answers
    asked = []
    pmc.engine = lambda prompts, engine=pmc.engine, **how: [asked.append(how), engine(prompts, **how)][1]
    picks, _ = pmc._sample([2, 0])
    [how] = asked
    read = [text.strip().casefold() for text in tokenizer.batch_decode([[t] for t in range(len(tokenizer))])]
    for i, bias in zip([2, 0], how["logit_bias"], strict=True):
        own = {read[t] for t in set(pmc._initial_ids[i]) - set(tokenizer.all_special_ids)}
        alike = {t for t, word in enumerate(read) if word in own and any(map(str.isalnum, word))}
        assert set(bias) == alike - set(tokenizer.all_special_ids) - set(pmc.encoder.stops)
        assert set(bias.values()) == {-50.0}
        [[answer, weight]], score = picks[i]
        assert weight == 1
        assert score <= plain._sample([i])[0][i][1]
        assert not set(tokenizer(answer)["input_ids"]) & set(bias) or score == 0
    with pytest.raises(PMCError, match="selection is 'soft': it must be argmin or likeliest with answer_penalty"):
        PMCConfig(answer_penalty=1.0, selection="soft")


def test_good_answers_are_not_sampled_again(tiny, tokenizer):
    pmc = core(tiny, tokenizer, resample_above=0.5)
    pmc.reward = half
    pmc.prepare()
    assert pmc.pending() == [0, 1, 2, 3]
    step = pmc.sample([1, 0])
    assert pmc.pending() == [2, 3]
    again = pmc.sample([1, 0])
    assert (again.answers, again.counters) == (step.answers, {"questions_sampled": 0})
    pmc.config.resample_above = 0.49
    assert pmc.pending() == [0, 1, 2, 3]


def test_a_rollout_may_visit_questions_of_later_steps(tiny, tokenizer):
    plain, pmc = core(tiny, tokenizer), core(tiny, tokenizer, rollout_batch_size=3)
    for one in (plain, pmc):
        one.reward = half
        one.prepare()
    visited = []
    visit = pmc._visit
    pmc._visit = lambda asked: (visited.append(asked), visit(asked))[1]
    first = pmc.sample([1, 0])
    assert (
        first.answers == plain.sample([1, 0]).answers
    )  # what a question's samples are does not depend on the others
    assert first.counters["questions_sampled"] == 3
    later = pmc.sample([2, 2])  # sampled already; the weights have not moved
    assert (later.answers, later.counters) == (plain.sample([2, 2]).answers, {"questions_sampled": 0})
    pmc.sample([3])  # the others have all been in a step: the next are those visited least, in their order
    copy = core(tiny, tokenizer, rollout_batch_size=3)
    copy.load_state_dict(json.loads(json.dumps(pmc.state_dict())))
    for one in (pmc, copy):  # what was visited and not used is remembered
        one.sample([0, 1])
        assert one.store.visits(0) == one.store.visits(1) == 2
    pmc.sample([0])
    assert visited == [[1, 0, 2], [3, 0, 1], [0, 2, 3]]
    assert plain._to_visit([0]) == [0]
    pmc.config.resample_above = 0.5
    assert pmc._to_visit([2]) == []  # good already


def test_every_other_step_leaves_words_of_the_question_out(tiny, tokenizer):
    """Whole at first; what is left out goes on from a state, and depends on nothing but seed, question and step."""
    chat = Chat((Turn("system", "Be short, and be kind."), Turn("user", QUESTIONS[1])))
    text = text_to_continue("Ann was born in the north, in a small town, and")
    for store, form, questions in (
        ("auto", "tags", QUESTIONS), ("ids", "tags", QUESTIONS), ("auto", "chat", [chat, text])
    ):  # fmt: skip
        how = {"store": store, "prompt_format": form, "max_length": 90 if form == "chat" else 20}
        plain, pmc = (core(tiny, tokenizer, questions, **how, **more) for more in ({}, {"question_dropout": 0.5}))
        asked = []
        for one in (plain, pmc):
            one.reward = half
            one.prepare()
            asked.append([])
            for _ in range(6):
                step = one.sample([0, 1])
                assert all(s.input_ids[s.prompt_length :] == s.labels[s.prompt_length :] for [s] in step.answers)
                asked[-1].append([tokenizer.decode(s.input_ids[: s.prompt_length]) for [s] in step.answers])
                trained = [[x for x in s.labels if x != -100] for [s] in step.answers]
                assert trained == [
                    [x for x in one._encode_whole(i, answer).labels if x != -100]
                    for i in (0, 1)
                    for [[answer, _]] in [one.store.answer(i)]
                ]  # wherever max_length cuts it
        assert asked[0] == [asked[0][0]] * 6
        assert asked[1][0::2] == asked[0][0::2]
        for whole, dropped in zip(asked[0][1::2], asked[1][1::2], strict=True):
            for a, b in zip(whole, dropped, strict=True):
                letters = iter(a)
                assert all(letter in letters for letter in b)  # in their order
        assert len({len(b[1]) for b in asked[1]}) > 2
    state = pmc.state_dict()
    pmc.sample([0, 1])
    wanted = pmc.sample([1]).answers
    copy = core(tiny, tokenizer, questions, **how, question_dropout=0.5)
    copy.load_state_dict(json.loads(json.dumps(state)))
    copy.reward = half
    copy.sample([0, 1])
    assert copy.sample([1]).answers == wanted
    with pytest.raises(PMCError, match=r"question_dropout is 0.5 but the questions are token ids"):
        core(tiny, tokenizer, pmc.prompts, question_dropout=0.5)


def test_the_reference_has_what_is_published_alone(tiny, tokenizer):
    for name, value in (
        ("answer_penalty", 1.0),
        ("resample_above", 0.1),
        ("rollout_batch_size", 8),
        ("question_dropout", 0.3),
        ("max_length_ratio", 1.5),
        ("retain_loss", "kl"),
        ("retain_order", "shuffled"),
        ("retain_per_question", 2),
        ("selection", "soft"),
        ("normalization", "step"),
    ):
        with pytest.raises(PMCError, match=f"{name} is .*, which the published algorithm does not have"):
            Reference(tiny, tokenizer, PMCConfig(**{name: value}), QUESTIONS)


def test_ids_are_trained_as_they_were_sampled(tiny, tokenizer):
    """Prompts as ids, no strings: the store keeps ids and nothing is tokenised again."""
    texts = core(tiny, tokenizer)
    pmc = core(tiny, tokenizer, [list(p) for p in texts.prompts])
    assert pmc.prepare() == texts.prepare()
    step = pmc.sample([0, 2])
    for i, [s] in zip(step.indices, step.answers, strict=True):
        [[ids, _]] = pmc.store.answer(i)
        assert s.input_ids == pmc.prompts[i] + ids
        assert s.labels == [-100] * len(pmc.prompts[i]) + ids
    json.dumps(pmc.state_dict())
    with pytest.raises(PMCError, match="store is 'text' but the questions are token ids"):
        core(tiny, tokenizer, pmc.prompts, store="text")
    assert not core(tiny, tokenizer, store="ids").keeps_text


def test_soft_weights_are_the_expected_bradley_terry_loss(ready):
    pmc, step = ready(selection="soft", tau=0.3, retain_weight=0.0)
    out = pmc.loss(step, [])
    out.loss.backward()
    ours = gradients(pmc.model)
    total, tokens = 0.0, 0.0
    for answers, weights in zip(step.answers, step.weights, strict=True):
        assert sum(weights) == pytest.approx(1)
        for s, w in zip(answers, weights, strict=True):
            logits = pmc.model(torch.tensor([s.input_ids])).logits[0, :-1]
            total = total + w * torch.nn.functional.cross_entropy(logits, torch.tensor(s.labels[1:]), reduction="sum")
            tokens += w * sum(x != -100 for x in s.labels[1:])
    (total / tokens).backward()
    assert out.loss.item() == pytest.approx((total / tokens).item(), rel=1e-5)
    close(ours, gradients(pmc.model))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.7]), st.floats(0.01, 9) | st.just(np.inf)), min_size=1, max_size=8
    )
)
def test_likeliest_is_the_likeliest_of_the_good_ones(samples):
    scores, nlls = map(np.array, zip(*samples, strict=True))
    good = [i for i, s in enumerate(scores) if s <= 0.1 and nlls[i] < np.inf]
    others = [i for i in range(len(scores)) if nlls[i] < np.inf] or range(len(scores))
    wanted = min(good, key=lambda i: (nlls[i], i)) if good else min(others, key=lambda i: (scores[i], i))
    assert likeliest(scores, nlls, 0.1) == wanted
    config = PMCConfig(selection="likeliest", resample_above=0.1)
    assert select(config, list(range(len(samples))), scores, nlls, (0, 0, 0)) == ([[wanted, 1.0]], scores[wanted])


def test_the_likeliest_is_by_the_models_own_log_probs(tiny, tokenizer):
    """Under a penalty, too: the pick has the lowest nll a token of all samples, in the model's own forward pass."""
    found = {}
    for selection in ("argmin", "likeliest"):
        pmc = core(
            tiny, tokenizer, selection=selection, resample_above=0.5, answer_penalty=2.0, num_samples=6, store="ids"
        )
        pmc.reward = half
        pmc.prepare()
        sampled = pmc.engine(
            pmc.prompts, num_samples=6, temperature=1.25, top_p=pmc.config.top_p, max_length=40, seed=0,
            stop_ids=pmc.encoder.stops, stream_ids=list(range(len(pmc.prompts))), as_generate=True,
            logit_bias=[pmc._sampler.penalty(ids) for ids in pmc._initial_ids],
        ).tokens  # fmt: skip
        found[selection] = pmc.sample(range(len(pmc.questions))).answers
    for i, ([first], [likely]) in enumerate(zip(found["argmin"], found["likeliest"], strict=True)):
        nlls = [mean_nll(tiny, pmc._encode(i, ids)) for ids in sampled[i]]
        assert first == pmc._encode(i, sampled[i][0])
        ended = [nll for nll, ids in zip(nlls, sampled[i], strict=True) if ids[-1] in pmc.encoder.stops] or nlls[:1]
        assert mean_nll(tiny, likely) == pytest.approx(min(ended), rel=1e-5)


def test_tag_and_end_of_samples(tiny, tokenizer):
    """The tag is no word of the answer: not penalised, nor part of a sample's nll; a sample that did not end is never the likeliest."""
    questions = [*QUESTIONS[:2], text_to_continue("Ann wrote")]
    pmc = core(tiny, tokenizer, questions, selection="likeliest", resample_above=0.5, answer_penalty=2.0)
    tag = tokenizer("Answer:")["input_ids"]
    ids = tokenizer("Answer: Ann wrote it.")["input_ids"]
    assert pmc.encoder.tag_length(ids) == len(tag)
    assert pmc.encoder.tag_length(ids[len(tag) :]) == pmc.encoder.tag_length(tag[:1]) == 0
    assert core(tiny, tokenizer, prompt_format="chat").encoder.tag_length(ids) == 0
    assert not set(pmc._sampler.penalty(ids)) & set(tag)
    assert {tokenizer.decode(t).strip().lower() for t in pmc._sampler.penalty(ids)} >= {"wrote", "it"}
    again = pmc._sampler.penalty(tokenizer("Answer: The answer is 5.")["input_ids"])
    assert not set(again) & set(tag)
    assert {"answer", "is"} <= {tokenizer.decode(t).strip().lower() for t in again}
    logps = [np.array([-9.0] * len(tag) + [-1.0] * (len(ids) - len(tag))), np.array([-2.0, -4.0])]
    both = [ids, tag]
    samples = Rollouts([both, both], [logps, logps], [[], []], [["stop", "length"]] * 2, {})
    np.testing.assert_array_equal(pmc._sampler.nlls(1, samples, 0), [1.0, np.inf])
    whole = -float(np.mean(logps[0]))
    np.testing.assert_array_equal(pmc._sampler.nlls(2, samples, 1), [whole, 3.0])  # goes on, and has no tag


def test_samples_are_cut_at_a_multiple_of_their_initial_answer(tiny, tokenizer, monkeypatch):
    """They begin as without the cut, and those that end before it are the same."""
    monkeypatch.setattr("pmc_fast.pmc.sampler.SHORTEST_CUT", 4)
    tiny.double()
    questions = [*QUESTIONS[:3], text_to_continue("Ann wrote")]
    how = {"selection": "likeliest", "num_samples": 12, "max_length": 60, "store": "ids", "resample_above": 0.9}
    made = {}
    for ratio in (0.0, 1.5):
        pmc = core(tiny, tokenizer, questions, **how, max_length_ratio=ratio)
        pmc.prepare()
        pmc._initial_ids = [[5] * n for n in (10, 2, 20, 3)]
        made[ratio] = sampled(pmc, monkeypatch)
    cuts = [15, 4, 30, made[0.0].max_new[3]]  # a text goes on as long as it likes
    assert made[1.5].max_new == [min(cut, room) for cut, room in zip(cuts, made[0.0].max_new, strict=True)]
    for of in made.values():
        assert of.cut == sum(ids[-1] not in pmc.encoder.stops for own in of.tokens for ids in own)
    some = 0
    for whole, cut, most in zip(made[0.0].tokens, made[1.5].tokens, made[1.5].max_new, strict=True):
        assert cut == [ids[:most] for ids in whole]
        some += sum(len(ids) > most for ids in whole)
    assert some > 0


@pytest.mark.parametrize("selection", ["argmin", "likeliest", "bradley_terry", "soft"])
def test_what_was_cut_is_never_selected(tiny, tokenizer, monkeypatch, selection):
    """Where all samples of a question were cut, they go on to max_length, as they would have gone on."""
    monkeypatch.setattr("pmc_fast.pmc.sampler.SHORTEST_CUT", 1)
    tiny.double()
    how = {"selection": selection, "num_samples": 8, "max_length": 60, "store": "ids", "resample_above": 0.9}
    plain, pmc = core(tiny, tokenizer, **how), core(tiny, tokenizer, **how, max_length_ratio=1.0)
    plain.prepare()
    said = sampled(plain, monkeypatch).tokens[2]
    end = said[0][5]  # what this model of random weights says there shall end an answer
    plain = core(tiny, tokenizer, **how)
    rollouts = []
    for of in (plain, pmc):
        of.encoder.stops = [*of.encoder.stops, end]
        of.prepare()
        of._initial_ids = [[5] * n for n in (1, 60, 12, 1)]  # one token: all samples are longer
        of.reward = lambda initial, texts, min_len: np.array([[1 / (1 + len(text)) for text in own] for own in texts])
        rollouts.append(sampled(of, monkeypatch))
    whole, again = rollouts
    assert again.asked == [[0, 1, 2, 3], [0, 3]]
    for i in (0, 1, 3):  # nothing is cut in the end
        assert pmc.store.answer(i) == plain.store.answer(i)
    fit = [ids for ids in whole.tokens[2] if len(ids) < 12]
    kept = [ids for ids, _ in pmc.store.answer(2)]
    assert 0 < len(fit) < 8
    assert all(ids in fit for ids in kept)
    lengths = [len(text) for text in pmc.encoder.samples(fit, QUESTIONS[2])]
    if selection == "argmin":  # by this reward the longest, and cut ones are longer
        assert kept == [fit[lengths.index(max(lengths))]]
        assert plain.store.answer(2) != pmc.store.answer(2)
    if selection == "soft":
        assert {tuple(ids) for ids in kept} == set(map(tuple, fit))


def sampled(pmc, monkeypatch):
    """Visit all questions; return the first rollout's tokens and `max_new`, how many were cut, and which each rollout asked."""
    seen = SimpleNamespace(asked=[])
    engine = pmc.engine

    def watched(prompts, **given):
        made = engine(prompts, **given)
        if not seen.asked:
            seen.tokens, seen.max_new = list(made.tokens), given["max_new_tokens"]
        seen.asked.append([pmc.prompts.index(prompt) for prompt in prompts])
        return made

    monkeypatch.setattr(pmc, "engine", watched)
    seen.cut = pmc.sample(range(len(pmc.questions))).counters["cut_samples"]
    return seen


def test_the_tag_is_found_where_words_begin_with_a_space_of_their_own():
    """As SentencePiece's do: alone, "Answer:" would be other tokens than behind a prompt."""
    letters = {c: i for i, c in enumerate(sorted(set("\u2581\nQuestion: Answer: Ann?")))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens(["</s>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    encoder = Encoder(tokenizer, PMCConfig(prompt_format="tags"), None)
    pair = encoder.pair("Ann?", "Ann")
    generated = pair.input_ids[pair.prompt_length :]
    assert tokenizer("Answer:")["input_ids"] != generated[: len("Answer:")]
    assert encoder.tag_length(generated) == len("Answer:")


def mean_nll(model, s):
    logits = model(torch.tensor([s.input_ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(s.labels[1:])).item()


def test_bradley_terry_draws_by_its_probabilities():
    scores = np.array([[0.0, 0.5, 1.0]])
    (p,) = bradley_terry(scores, 0.5)
    np.testing.assert_allclose(p, np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum())
    drawn = np.bincount([draw(p, (0, 7, visit)) for visit in range(3000)], minlength=3)
    assert ((drawn - 3000 * p) ** 2 / (3000 * p)).sum() < 13.8  # chi-square, 2 degrees of freedom, p 0.001
    assert draw(p, (1, 2, 3)) == draw(p, (1, 2, 3))
    np.testing.assert_array_equal(bradley_terry(scores, 1e-3).argmax(1), [0])


def test_bradley_terry_is_one_draw(ready):
    _, step = ready(selection="bradley_terry", tau=5.0)
    assert all(len(a) == 1 for a in step.answers)


def test_state_goes_on_where_it_stood(tiny, tokenizer):
    pmc, other = core(tiny, tokenizer), core(tiny, tokenizer)
    pmc.reward = other.reward = half
    pmc.prepare()
    pmc.sample([0, 1, 2, 3])
    other.load_state_dict(json.loads(json.dumps(pmc.state_dict())))
    before = pmc.store.answer(0)
    ours, theirs = pmc.sample([0, 1, 2, 3]), other.sample([0, 1, 2, 3])
    assert (ours.answers, ours.weights) == (theirs.answers, theirs.weights)
    assert pmc.store.answer(0) != before
    assert pmc.state_dict() == other.state_dict()


def test_refusals(tiny, tokenizer):
    pmc = core(tiny, tokenizer)
    with pytest.raises(PMCError, match=r"call prepare\(\) before the first step"):
        pmc.sample([0])
    with pytest.raises(PMCError, match="question 1 takes 12 tokens and leaves none of max_length 10"):
        core(tiny, tokenizer, ["Why?", QUESTIONS[1]], max_length=10)
    pmc.prepare()
    with pytest.raises(PMCError, match="size of a micro-batch is 0"):
        pmc.sample([0]).split(0)
    for wrong in (4, -1):  # none is counted from behind
        with pytest.raises(PMCError, match=f"index {wrong} is none of 4 questions: they are counted from 0"):
            pmc.sample([0, wrong])
    step = pmc.sample([0])
    for retain, message in (
        ([Row("a", "b")], "retain holds Row: give a padded batch, or what encode_retain"),
        ({"input_ids": torch.tensor([[5]])}, r"a padded batch needs labels, a tensor \[B, T\]: collate gives one"),
        ({"input_ids": [[5]], "labels": [[5]]}, "a padded batch needs input_ids, a tensor"),
    ):
        with pytest.raises(PMCError, match=message):
            pmc.loss(step, retain)
    with pytest.raises(PMCError, match="questions is empty: it needs the questions to forget"):
        core(tiny, tokenizer, [])


def test_accidents_are_the_references(tiny, tokenizer):
    for chat in ("tags", "chat"):
        pmc = core(tiny, tokenizer, accidents=True, prompt_format=chat, max_length=80)
        assert pmc.prompts[0] == Reference(tiny, tokenizer, pmc.config, QUESTIONS).encoder.prompt(QUESTIONS[0])
    pmc = core(tiny, tokenizer, accidents=True)
    pmc.initial_answers, pmc._initial_ids, pmc.engine = ["a"] * 4, [[1]] * 4, Scripted(tokenizer)
    pmc.engine.candidates = [["Answer: Ann did.", "Unlike this", "Unlike that"]]
    pmc.sample([0])
    assert pmc.store.answer(0)[0][0] in ("Ann did.", "his", "hat")
