"""Models and adapters that PMC would not train as they are: refused by name, before the initial answers."""

import inspect

import peft
import pytest
import torch
import transformers as tf

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.errors import PMCError
from pmc_fast.models.lm_head import output_head
from pmc_fast.models.packed_forward import PackedPass, causal_lm
from pmc_fast.models.supported import check_model
from pmc_fast.rollout import rollout
from tests.families import HOW, PROMPTS, SIZES, build

SEQUENCES = [Encoded([5, 7, 9, 11, 4], [-100, -100, 9, 11, 4]), Encoded([3, 13, 2], [-100, 13, 2])]


def llama(**settings):
    return build(tf.LlamaConfig(**SIZES, **settings), torch.float32)


def lora(model=None, **settings):
    given = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    return peft.get_peft_model(model or llama(), peft.LoraConfig(**given))


def adapter(kind, **settings):
    return peft.get_peft_model(llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **settings))


def frozen():
    return llama().requires_grad_(False)


REFUSED = {
    "a saved head": (lambda: lora(modules_to_save=["lm_head"]), "the head is a ModulesToSaveWrapper"),
    "tied tokens": (lambda: lora(llama(tie_word_embeddings=True), trainable_token_indices=[3, 4]),
                    "the head is a TrainableTokensWrapper"),
    "DoRA on the head": (lambda: lora(target_modules=["lm_head"], use_dora=True), "dropout, a bias or is a variant"),
    "dropout on the head": (lambda: lora(target_modules=["lm_head"], lora_dropout=0.1), "dropout, a bias or"),
    "AdaLoRA on the head": (lambda: adapter("AdaLoraConfig", target_modules=["q_proj", "lm_head"], total_step=10),
                            "the head is a SVDLinear"),
    "LoHa on the head": (lambda: adapter("LoHaConfig", target_modules=["q_proj", "lm_head"]), "the head is a Linear of peft.tuners.loha"),
    "prompt tuning": (lambda: adapter("PromptTuningConfig", num_virtual_tokens=3), "PROMPT_TUNING, which adds tokens"),
    "prefix tuning": (lambda: adapter("PrefixTuningConfig", num_virtual_tokens=3), "PREFIX_TUNING, which adds tokens"),
    "p-tuning": (lambda: adapter("PromptEncoderConfig", num_virtual_tokens=3), "P_TUNING, which adds tokens"),
    "aLoRA": (lambda: lora(alora_invocation_tokens=[7, 9]), "an activated LoRA, switched on by tokens of the prompt"),
    "LLaMA-Adapter": (lambda: adapter("AdaptionPromptConfig", adapter_len=2, adapter_layers=1), "ADAPTION_PROMPT"),
    "an adapter not trained": (lambda: lora(inference_mode=True), "no parameter to train, all are frozen"),
    "a frozen model": (frozen, "no parameter to train, all are frozen"),
    "a T5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                               num_heads=2)), "encoder-decoder"),
    "no head": (lambda: llama().model, "no output embeddings"),
    "DataParallel": (lambda: torch.nn.DataParallel(llama()), "the model is a DataParallel"),
    "a name": (lambda: "gpt2", "the model is a str"),
    "meta": (lambda: llama().to("meta"), "on the meta device"),
    "a quantised head": (lambda: torch.ao.quantization.quantize_dynamic(llama(), {torch.nn.Linear}),
                         "the head is a Linear of torch.ao"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_the_initial_answers(what, tokenizer):
    make, reason = REFUSED[what]
    model = make()
    if isinstance(model, torch.nn.Module):
        model.train()
    with pytest.raises(PMCError, match=reason) as refused:
        PMC(model, tokenizer, PMCConfig(prompt_format="tags"), ["Who?"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("how", [{"lora_dropout": 0.1}, {}], ids=str)
def test_dropout_on_the_head_counts_where_it_will_be_trained(how):
    model = lora(target_modules=["q_proj", "lm_head"], **how).eval()
    check_model(model)
    if how:
        with pytest.raises(PMCError, match="has dropout"):
            check_model(model, training=True)
    else:
        check_model(model, training=True)


def test_adapters_that_are_served():
    """Tokens of embeddings that are not tied to the head are trained as any other weight."""
    model = lora(trainable_token_indices=[5, 9])
    check_model(model)
    (made,) = pack([[s] for s in SEQUENCES], 100)
    ours, _ = PackedPass(causal_lm(model))(made, torch.ones(len(made.targets)), model=model)
    plain = sum(
        model(torch.tensor([s.input_ids]), labels=torch.tensor([s.labels])).loss * sum(x >= 0 for x in s.labels)
        for s in SEQUENCES
    )
    torch.testing.assert_close(ours, plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 5
    for a, b in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_rollouts_refuse_an_adapter_that_is_added_later():
    model = lora()
    rollout(model, PROMPTS, **HOW)
    model.add_adapter("asked", peft.LoraConfig(alora_invocation_tokens=[7], target_modules=["q_proj"]))
    with pytest.raises(PMCError, match="'asked' is an activated LoRA"):
        rollout(model, PROMPTS, **HOW)


@pytest.fixture
def packed():
    """A packed pass that its first check has accepted."""
    made = PackedPass(llama())
    made.check()
    return made


def computed(packed, **how):
    (made,) = pack([[s] for s in SEQUENCES], 100)
    return packed(made, torch.ones(len(made.targets)), **how)


def doubled(module, args, out):
    return out * 2


@pytest.mark.parametrize("kind", ["forward", "full_backward", "full_backward_pre"])
def test_hooks_on_the_head_are_refused_in_every_pass(packed, kind):
    computed(packed)
    handle = getattr(packed.base.lm_head, f"register_{kind}_hook")(lambda *args: None)
    with pytest.raises(PMCError, match=r"the head has a hook \(.*<lambda>\) that would not see logits"):
        computed(packed)
    handle.remove()
    computed(packed)


def test_hooks_inside_a_head_with_lora_are_refused():
    """Its weight is formed from its parts, none of which is called."""
    model = lora(target_modules=["lm_head"])
    packed = PackedPass(causal_lm(model))
    computed(packed, model=model)
    model.base_model.model.lm_head.lora_B["default"].register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(PMCError, match="the head has a hook"):
        computed(packed, model=model)


def test_hooks_on_the_models_output_are_refused(packed):
    wrapper = lora(packed.base)
    computed(packed, model=wrapper)
    handle = wrapper.register_forward_hook(doubled)
    with pytest.raises(PMCError, match=r"PeftModelForCausalLM has a hook on its output \(doubled\)"):
        computed(packed, model=wrapper)
    handle.remove()
    packed.base.register_forward_hook(doubled)
    with pytest.raises(PMCError, match=r"LlamaForCausalLM has a hook on its output \(doubled\)"):
        computed(packed)


def test_a_head_whose_forward_was_replaced_is_refused(packed):
    own = packed.base.lm_head.forward
    packed.base.lm_head.forward = lambda x: own(x) * 2
    with pytest.raises(PMCError, match="the head's forward was replaced on the Linear itself"):
        computed(packed)


def test_hooks_before_the_head_run_in_every_pass(packed):
    """On the decoder, and on the head's input."""
    model = packed.base
    model.model.register_forward_hook(lambda m, args, out: tf.modeling_outputs.BaseModelOutputWithPast(out[0] * 0.5))
    model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
    _, logps = computed(packed)
    theirs = []
    for s in SEQUENCES:
        all_ = model(torch.tensor([s.input_ids])).logits[0].log_softmax(-1)
        theirs += [all_[t - 1, s.labels[t]] for t in range(1, len(s.labels)) if s.labels[t] >= 0]
    torch.testing.assert_close(logps.float(), torch.stack(theirs))


MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
def test_a_routers_loss_is_refused_where_the_model_would_add_it(family, tokenizer):
    model = build(tf.AutoConfig.for_model(family, **SIZES, **MIXTURES[family]), torch.float32)
    packed, ids = PackedPass(model), torch.tensor([SEQUENCES[0].input_ids])
    packed.check()
    whole = [Encoded(ids[0].tolist(), ids[0].tolist())]
    torch.testing.assert_close(packed.mean_nll(whole), model(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    model.config.output_router_logits = True
    assert model(ids, labels=ids).loss > packed_loss_without(model, ids) + 1e-3
    with pytest.raises(PMCError, match=f"{type(model).__name__} has output_router_logits on"):
        packed.mean_nll(whole)
    with pytest.raises(PMCError, match="output_router_logits = False"):
        PMC(model, tokenizer, PMCConfig(prompt_format="tags"), ["Who?"])
    with torch.no_grad():  # a likelihood has no such part
        torch.testing.assert_close(packed.mean_nll(whole), packed_loss_without(model, ids), atol=1e-5, rtol=1e-5)
    model.router_aux_loss_coef = 0.0
    torch.testing.assert_close(packed.mean_nll(whole), model(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)


def packed_loss_without(model, ids):
    return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])


def test_every_causal_model_with_a_loss_of_its_own_is_known():
    """What transformers' models add to their loss, they add under these settings and no other."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    added = {}
    for family, names in NAMES.items():
        name = names[0] if isinstance(names, (list, tuple)) else names
        try:
            source = inspect.getsource(getattr(tf, name).forward)
        except (AttributeError, ImportError, OSError, RuntimeError):
            continue  # needs what is not installed
        if "loss +" in source:
            added[family] = source
    assert len(added) > 8
    # of several codebooks each has a head, and a list of heads is refused
    known = ("if output_router_logits:", "z_loss_coefficient", "num_codebooks")
    assert not {family for family, source in added.items() if not any(k in source for k in known)}


def test_no_top_k_is_0():
    for ask in (lambda: PMCConfig(top_k=None), lambda: rollout(llama(), PROMPTS, **HOW | {"top_k": None})):
        with pytest.raises(PMCError, match=r"top_k is None: it must be 0 \(all tokens\) or more"):
            ask()


def scaled(logits):
    return logits * 2


def scaled_in_place(logits):
    return logits.mul_(2)


def with_dropout(logits):
    return torch.nn.functional.dropout(logits, 0.2)


@pytest.mark.parametrize("change", [scaled, scaled_in_place, with_dropout])
def test_logits_that_differ_in_train_mode_alone_are_refused(change):
    """Checks before the run are in eval mode, and training forms no logits: its first pass compares."""

    class Changes(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if self.training:
                out.logits = change(out.logits)
            return out

    torch.manual_seed(0)
    model = Changes(tf.LlamaConfig(**SIZES)).eval()
    packed = PackedPass(model)
    packed.check()
    output_head(model)
    made = pack([[s] for s in SEQUENCES], 100)[0]
    scale = torch.ones(len(made.targets))
    packed(made, scale)  # in eval mode as ever
    model.train()
    with pytest.raises(PMCError, match="Changes: its logits in train mode are not what"):
        packed(made, scale)
    state = torch.get_rng_state()
    with pytest.raises(PMCError, match="Changes: its logits in train mode are not what"):
        output_head(model)
    assert torch.equal(torch.get_rng_state(), state)
