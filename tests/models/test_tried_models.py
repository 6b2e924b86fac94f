"""Models that users change in their own ways: whatever was done to one, passes compute what it computes."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn.utils import prune

from pmc_fast.data import Encoded
from pmc_fast.errors import PMCError
from pmc_fast.models.context import plain_logps
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.pmc.reward import judged
from pmc_fast.rollout import RolloutEngine
from tests.families import SIZES, build

WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PROMPTS = [[5, 7, 9, 11, 4], [3]]
SEQUENCES = [Encoded([5, 7, 9, 11, 4, 60, 2], [-100] * 3 + [11, 4, 60, 2]), Encoded([3, 8, 9], [-100, 8, 9])]


def llama(dtype=torch.float32):
    return build(tf.LlamaConfig(**WIDE), dtype)


def moved(model):
    """Change a model's weights, as an optimizer would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def samples_off(engine):
    """Return how far a rollout's log-probs are from those of its model's own forward."""
    with torch.random.fork_rng():
        made = engine(PROMPTS, num_samples=2, temperature=1.0, top_k=0, max_new_tokens=6, seed=3)
    off = 0.0
    for prompt, tokens, logps in zip(PROMPTS, made.tokens, made.logps, strict=True):
        for ids, ours in zip(tokens, logps, strict=True):
            with engine._step.autocast():
                theirs = plain_logps(engine.model, torch.tensor([prompt + ids]))[0, len(prompt) - 1 :]
            off = max(off, float(np.abs(theirs.numpy() - ours).max()))
    return off


def gradients(model, loss):
    loss.backward()
    made = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return made


def losses_off(packed):
    """Return by which share a pass's gradients are off the plain model's, the worst parameter's."""
    model = packed.base
    ours = gradients(model, packed.mean_nll(SEQUENCES))
    nll = []
    for s in SEQUENCES:
        logits = model(torch.tensor([s.input_ids])).logits[0, :-1]
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(s.labels[1:]), reduction="none"))
    count = sum(label != -100 for s in SEQUENCES for label in s.labels)
    theirs = gradients(model, torch.cat(nll).sum() / count)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items())


def linears(model):
    return [m for m in model.modules() if type(m) is torch.nn.Linear]


def pruned(model):
    for layer in linears(model):
        prune.l1_unstructured(layer, "weight", 0.3)


def weight_normed(model):
    for layer in linears(model.model):
        torch.nn.utils.weight_norm(layer)


def rounded(model):
    """Fake quantisation by a hook of the user's: the weight is made in each call."""

    def hook(layer, args):
        layer.weight.data = (layer.master.data * 8).round() / 8

    for layer in linears(model.model):
        layer.master = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        layer.register_forward_pre_hook(hook)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("change", [pruned, weight_normed, rounded])
def test_weights_that_are_made_in_a_layers_call_are_not_stale(change, autocast):
    model = llama()
    change(model)
    engine = RolloutEngine(model, autocast_dtype=autocast)
    samples_off(engine)
    moved(model)
    assert samples_off(engine) < (2e-5 if autocast is None else 0.3)


def another_epsilon(model):
    for m in model.modules():
        if hasattr(m, "variance_epsilon"):
            m.variance_epsilon = 0.5


def another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.GELU()


def another_norm(model):
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.LayerNorm(64)


@pytest.mark.parametrize("change", [another_epsilon, another_activation, another_norm])
def test_layers_that_are_changed_after_the_first_use(change):
    model = llama()
    engine, packed = RolloutEngine(model), PackedPass(model)
    assert samples_off(engine) < 2e-5
    assert losses_off(packed) < 1e-4
    change(model)
    assert samples_off(engine) < 2e-5
    assert losses_off(packed) < 1e-4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_follow_their_own_model(copied):
    engine, packed = RolloutEngine(llama()), PackedPass(llama())
    samples_off(engine), losses_off(packed)
    others = copied(engine), copied(packed)
    assert others[0].model is not engine.model
    moved(others[0].model)
    moved(others[1].base)
    assert samples_off(others[0]) < 2e-5
    assert losses_off(others[1]) < 1e-4
    assert samples_off(engine) < 2e-5


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_changes_nothing(default):
    """Buffers that our kernels write are float32 whatever the default is: once they were too small."""
    engine, packed = RolloutEngine(llama()), PackedPass(llama())
    expected = packed.mean_nll(SEQUENCES)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        loss = packed.mean_nll(SEQUENCES)
        off = samples_off(engine)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(loss, expected)
    assert off < 2e-5


def test_float16_on_the_cpu_is_refused_by_name():
    for engine in (RolloutEngine(llama(torch.float16)), RolloutEngine(llama(), autocast_dtype=torch.float16)):
        with pytest.raises(PMCError, match="LlamaForCausalLM computes in float16"):
            engine(PROMPTS, num_samples=1, temperature=0, max_new_tokens=2)


@pytest.mark.parametrize("same", [True, False], ids=["one model", "two of a family"])
def test_threads_take_turns(same):
    """What is exchanged in a modelling file, or in a model, is not another thread's to find or to put back."""
    from transformers.models.llama import modeling_llama

    original, first = modeling_llama.apply_rotary_pos_emb, llama()
    models = [first, first if same else llama()]
    engines = [RolloutEngine(m) for m in models]
    how = {"num_samples": 4, "temperature": 1.0, "top_k": 0, "max_new_tokens": 8, "seed": 3}
    expected, failed = engines[0](PROMPTS, **how).tokens, []

    def work(engine):
        try:
            failed.extend("other samples" for _ in range(8) if engine(PROMPTS, **how).tokens != expected)
        except Exception as error:
            failed.append(repr(error))

    threads = [threading.Thread(target=work, args=(e,)) for e in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert modeling_llama.apply_rotary_pos_emb is original
    assert not any("forward" in vars(m) for model in models for m in model.modules())
    assert first.config._attn_implementation != "pmc_fast_rollout"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (np.full((2, 2), 0.5), r"\(2, 2\): they must be \(2, 3\)"),
        (np.full((3, 2), 0.5), r"\(3, 2\)"),
        (np.full((4, 3), 0.5), r"\(4, 3\)"),
        (np.full(2, 0.5), r"\(2,\)"),
        ([[0.5, 0.5, 0.5], [0.5]], "a list: it must be an array"),
        (None, r"\(\)"),
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 7.0]], "a score of 7.0"),
        ([[0.5, 0.5, 0.5], [0.5, float("nan"), 0.1]], "a score of nan"),
    ],
)
def test_a_users_reward_is_a_score_of_each_sample(made, message):
    """Scores of a missing sample, or of other questions, were taken; 7 passed where another sample was picked."""
    with pytest.raises(PMCError, match=message):
        judged(lambda *_: made, ["a", "b"], [["x", "y", "z"]] * 2)


def test_a_reward_of_lists_is_served():
    assert judged(lambda *_: [[0, 0.5, 1]], ["a"], [["x", "y", "z"]]).tolist() == [[0, 0.5, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 2.0}, "num_samples is 2.0: it must be a whole number"),
        ({"max_new_tokens": 3.9}, "max_new_tokens is 3.9"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3: it must be 0 or more"),
        ({"seed": 1.7}, "seed is 1.7"),
        ({"stop_ids": 5}, "stop_ids is 5: give a list"),
        ({"prompts": [[5.7]]}, "a token of prompt 0 is 5.7"),
        ({"temperature": float("inf")}, "temperature inf"),
    ],
)
def test_settings_that_were_cut_off_or_traced_back(change, message):
    how = {"prompts": PROMPTS, "num_samples": 1, "temperature": 1.0, "max_new_tokens": 2} | change
    with pytest.raises(PMCError, match=message):
        RolloutEngine(llama())(how.pop("prompts"), **how)


def test_adapters_that_are_merged_are_refused_for_training():
    import peft

    from pmc_fast.models.supported import check_model

    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.merge_adapter()
    with pytest.raises(PMCError, match="adapter 'default' is merged"):
        check_model(model)
    model.unmerge_adapter()
    check_model(model)
