"""What passes hold, counted without data, against the allocator's count of real ones."""

import pytest
import torch
import transformers

from pmc_fast.config import RequestConfig
from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.errors import PMCError
from pmc_fast.jobs.memory import ALWAYS, PHASES, Amount, Choice, Memory, Work
from pmc_fast.models.fused_layers import use_checkpointing
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.models.pass_memory import Shape
from pmc_fast.rollout import RolloutEngine
from pmc_fast.trainer.master_weights import MasterWeights
from pmc_fast.utils.labels import IGNORED
from tests.families import FAMILIES, SIZES

F32, BF16 = torch.float32, torch.bfloat16
LENGTH = 64
WIDER = SIZES | {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 4,
                 "vocab_size": 997, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "gemma3": transformers.Gemma3TextConfig,
    "phi": transformers.PhiConfig,
}


def config_of(family, **more):
    heads = {"num_key_value_heads": 4} if family == "phi" else {}
    return CONFIGS[family](**WIDER | heads | more)


def with_adapter(model):
    peft = pytest.importorskip("peft")
    how = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, how)


def allocated(work):
    """Return the most bytes that were allocated at once while `work` ran, and those that are left."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def steps(config, dtype, low, prepare, tokens, *, checkpointing=False):
    """Return the peak of two optimizer steps beside parameters and masters, and the pack that they train."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = prepare(base).train()
    if checkpointing:
        use_checkpointing(base)
    rows = torch.randint(2, config.vocab_size, (tokens // LENGTH, LENGTH)).tolist()
    half = LENGTH // 2
    [p] = pack([[Encoded(ids, [IGNORED] * half + ids[half:])] for ids in rows], 1 << 20)
    packed = PackedPass(base, autocast_dtype=low)
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-5, fused=True)
    if any(q.dtype == BF16 for q in model.parameters() if q.requires_grad):
        optimizer = MasterWeights(optimizer)
    scale = torch.full((len(p.targets),), 1 / len(p.targets))
    packed(p, scale, model=model)[0].backward()  # what is compared and cached once
    optimizer.zero_grad()

    def two():
        for _ in range(2):
            packed(p, scale, model=model)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    return allocated(two)[0], p


def same(model):
    return model


@pytest.mark.parametrize(
    ("family", "dtype", "low", "prepare", "more"),
    [
        ("llama", F32, None, same, {"tie_word_embeddings": True}),
        ("llama", F32, None, same, {"tie_word_embeddings": False, "vocab_size": 4999}),
        ("llama", F32, None, with_adapter, {}),
        ("llama", F32, BF16, same, {}),
        ("llama", F32, None, same, {"checkpointing": True}),
        ("gemma3", BF16, None, same, {}),
        ("phi", F32, None, same, {}),
    ],
)
def test_the_plan_is_what_a_step_takes(family, dtype, low, prepare, more):
    """From 3 % below (offsets, masks, a row's statistics are not counted) to 10 % above the allocator's peak: the
    float32 head's gradient and a chunk of logits, say, are counted as if all were held to the end of the forward pass.
    """
    checkpointing = more.pop("checkpointing", False)
    config = config_of(family, **more)
    peak, p = steps(config, dtype, low, prepare, 1024, checkpointing=checkpointing)
    work = Work(Amount(len(p)), Amount(len(p.targets)), LENGTH, Amount(0), 0, 0, 0)
    settings = RequestConfig(optimizer="adamw_torch_fused")
    memory = Memory(settings, Shape(config, dtype, prepare), work, "cpu", low)
    plan = memory.plan(Choice(1 << 20, cuda_graphs=False, checkpointing=checkpointing))
    there = ("parameters", "float32 masters")  # before the first step
    held = [i for i in plan.items if i.name not in there and "rollout" not in i.name]
    planned = max(sum(i.most for i in held if phase in i.phases) for phase in PHASES)
    assert 0.97 * peak <= planned <= 1.1 * peak, (peak, planned, plan)
    assert not plan.unknown


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_token_of_a_rollout_holds_what_is_counted(family):
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=F32).eval()
    engine = RolloutEngine(model)
    made = engine([[3, 5, 7], [8, 9]], num_samples=3, temperature=1.0, max_new_tokens=6)
    slots = made.counters["pool_bytes"] / Shape(config, F32).passes("cpu", None).cached
    assert slots == engine._step._span


def test_layers_are_counted_by_their_kind():
    def saved(**more):
        return Shape(config_of("llama", **more), F32).passes("cuda", None).saved.each

    two, three, seven = (saved(num_hidden_layers=n) for n in (2, 3, 7))
    assert seven == pytest.approx(two + 5 * (three - two))

    def widen(model):  # a layer of another kind, as families have them
        wide = config_of("llama", intermediate_size=400, num_hidden_layers=1)
        model.model.layers[1] = transformers.AutoModelForCausalLM.from_config(wide, dtype=F32).model.layers[0]
        return model

    mixed = Shape(config_of("llama", num_hidden_layers=3), F32, widen).passes("cuda", None).saved.each
    wide = saved(num_hidden_layers=2, intermediate_size=400) - saved(num_hidden_layers=1, intermediate_size=400)
    assert mixed == pytest.approx(two + wide)


def test_what_depends_on_numbers_is_named():
    def routed(model):
        mlp = model.model.layers[0].mlp
        plain = mlp.forward
        mlp.forward = lambda x: plain(x[:, : int(x.sum())])  # as many rows as the numbers say
        return model

    shape = Shape(config_of("llama"), F32, routed)
    with pytest.raises(PMCError, match=r"^LlamaForCausalLM: what its passes hold can't be counted without data"):
        shape.passes("cpu", None)
    work = Work(Amount(100), Amount(50), 20, Amount(100), 20, 50, 8)
    plan = Memory(RequestConfig(optimizer="galore_adamw"), shape, work, "cpu", None).plan(Choice(1 << 13, False))
    assert plan.unknown[0] == "what the optimizer galore_adamw keeps"
    assert plan.unknown[1].startswith("LlamaForCausalLM: what its passes hold")
    weights = next(i for i in plan.items if i.name == "parameters")
    assert weights.phases == ALWAYS
    assert weights.most == 4 * sum(p.numel() for p in shape.model.parameters())
