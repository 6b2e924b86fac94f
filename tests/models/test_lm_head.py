"""output_head gives weighted_nll what each family's own forward computes."""

import pytest
import torch
import transformers

from pmc_fast.errors import PMCError
from pmc_fast.models.lm_head import output_head
from pmc_fast.ops import gather_logps, weighted_nll

SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},  # head bias
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt_neox": {"num_key_value_heads": 2},
}


def make(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SMALL | FAMILIES[family]))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(30)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_models_own(family):
    model = make(family)
    ids = torch.randint(1, 50, (1, 9))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        expected = out.logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        head = output_head(model)
        ours = gather_logps(out.hidden_states[-1][0, :-1], head.weight, ids[0, 1:], **head.options())
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def lora(model, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["lm_head", "q_proj"], init_lora_weights=False, **settings
    )
    return peft.get_peft_model(model, config)


def test_lora_on_the_head_is_in_the_effective_weight():
    model = lora(make("llama"))
    ids = torch.randint(1, 50, (1, 9))
    out = model(ids, output_hidden_states=True)
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
    head = output_head(model)
    ours, _ = weighted_nll(
        out.hidden_states[-1][0, :-1], head.weight, ids[0, 1:], torch.full((8,), 1 / 8), **head.options()
    )
    torch.testing.assert_close(ours, loss)
    assert any("lm_head.lora_A" in n for n in names)
    got = torch.autograd.grad(ours, [p for p in model.parameters() if p.requires_grad])
    for name, a, b in zip(names, expected, got, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)
    with model.disable_adapter():
        assert output_head(model).weight is model.get_output_embeddings().base_layer.weight


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_are_more_than_b_a_are_refused(settings):
    model = make("phi") if "lora_bias" in settings else make("llama")
    with pytest.raises(PMCError, match="leave lm_head out"):
        output_head(lora(model, **settings).train())


@pytest.mark.parametrize(
    ("family", "settings"),
    [("hyperclovax", {"logits_scaling": 4.0}), ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 16})],
)
def test_families_with_other_scales_are_refused(family, settings):
    """They multiply by what Granite divides by, or name their cap otherwise: only a comparison shows it."""
    FAMILIES[family] = settings
    try:
        model = make(family)
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {family}")
    with pytest.raises(PMCError, match="this family is not supported"):
        output_head(model)


def test_other_heads_are_refused_by_name():
    model = make("llama")
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(16, 50)))
    with pytest.raises(PMCError, match="the head is a Sequential"):
        output_head(model)
