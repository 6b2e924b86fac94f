"""Refuses models with parts that our passes would ignore, before work starts and in every pass."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from ..cuda_graphs.recorder import HOOKS
from ..errors import PMCError
from .lm_head import check_head

# PEFT methods whose modules compute each token separately
TOKENWISE = frozenset(
    (
        "LORA", "ADALORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "LN_TUNING", "VERA", "FOURIERFT", "HRA", "VBLORA",
        "BONE", "MISS", "RANDLORA", "ROAD", "TRAINABLE_TOKENS", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA",
    )
)  # fmt: skip
AFTER = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")  # receive the output, or its gradient


def check_model(model: Any, *, training: bool | None = None) -> None:
    """Refuse a model that a PMC loss would not train, or not as its own forward computes.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    training : bool, optional
        Whether it will be trained in train mode, where dropout counts; by default its current mode.

    Raises
    ------
    PMCError
        Anything that is not supported, by name.
    """
    name = type(model).__name__
    if not hasattr(model, "get_output_embeddings"):
        raise PMCError(f"the model is a {name}: give a transformers causal language model, bare or PEFT's")
    if getattr(model.config, "is_encoder_decoder", False):
        raise PMCError(f"{name} is an encoder-decoder model: pmc_fast needs a causal language model")
    if any(p.is_meta for p in model.parameters()):
        raise PMCError(f"{name} has weights on the meta device (offloaded, or not loaded): load it whole")
    check_adapters(model)
    base: Any = getattr(model, "get_base_model", lambda: model)()
    head = base.get_output_embeddings()
    if head is None:
        raise PMCError(f"{name} has no output embeddings: pmc_fast needs a causal language model")
    check_head(head, training=training)
    check_pass(base, model)
    for module in model.modules():
        if getattr(module, "merged_adapters", None) and any(p.requires_grad for p in module.parameters()):
            raise PMCError(
                f"adapter {module.merged_adapters[0]!r} is merged into the weights, where it gets no gradient: call "
                "unmerge_adapter() to train it, or merge_and_unload() to train the model as a whole"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise PMCError(
            f"{name} has no parameter to train, all are frozen: set requires_grad, or load its adapter with "
            "is_trainable=True"
        )


def has_dropout(model: Any) -> bool:
    """Return whether passes in train mode draw random masks: of a dropout layer, or of attention's weights."""
    layers = (torch.nn.Dropout, torch.nn.AlphaDropout, torch.nn.Dropout1d)
    rates = (m.p if isinstance(m, layers) else getattr(m, "attention_dropout", 0.0) for m in model.modules())
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def check_float16(model: Any, autocast_dtype: torch.dtype | None) -> None:
    """Refuse to compute in float16 on the CPU, for which there are no kernels."""
    on_cpu = {autocast_dtype or p.dtype for p in model.parameters() if p.device.type == "cpu"}
    if torch.float16 in on_cpu:
        raise PMCError(
            "the model would compute in float16 on the CPU: load it in float32 or bfloat16, and use no fp16"
        )


def check_adapters(model: Any) -> None:
    """Refuse PEFT adapters that add tokens, or whose effect on one token depends on others."""
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(config, "peft_type", None)
        kind = str(getattr(kind, "value", kind))
        if getattr(config, "is_prompt_learning", False):
            raise PMCError(f"adapter {name!r} is PEFT's {kind}, which adds tokens of its own: use LoRA")
        if getattr(config, "alora_invocation_tokens", None):
            raise PMCError(
                f"adapter {name!r} is an activated LoRA, switched on by tokens of the prompt: use plain LoRA"
            )
        if kind not in TOKENWISE:
            raise PMCError(f"adapter {name!r} is PEFT's {kind}, which pmc_fast does not know: use LoRA")


def check_pass(base: Any, call: Any) -> None:
    """Refuse hooks and losses that a pass of `call` would ignore, because it computes no logits and no loss of the model.

    Hooks of the layers inside run as usual, and so do those before the head.
    """
    if torch.is_grad_enabled():
        _check_router(base)
    head = base.get_output_embeddings()
    if "forward" in vars(head) and not hasattr(head, "_hf_hook"):  # accelerate's brings inputs to its device
        raise PMCError(
            f"the head's forward was replaced on the {type(head).__name__} itself, which training does not call"
        )
    for name, module in head.named_modules():
        hook = next(_hooks(module, HOOKS if name else AFTER), None)
        if hook is not None:
            raise PMCError(
                f"the head has a hook ({hook}) that would not see logits, since training computes none: remove it"
            )
    inside = set(base.modules())
    around = [m for m in call.modules() if m not in inside] if isinstance(call, torch.nn.Module) else []
    for module in (base, *around):
        hook = next(_hooks(module, AFTER[:1]), None)
        if hook is not None:
            raise PMCError(
                f"{type(module).__name__} has a hook on its output ({hook}) that would see no logits, since training "
                "computes none: remove it"
            )


def _check_router(base: Any) -> None:
    """Refuse the auxiliary loss of a mixture of experts, which depends on all tokens of a batch."""
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    if any(getattr(c, "output_router_logits", False) for c in (config, base.config)):
        weights = [getattr(base, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
        if next((w for w in weights if w is not None), None) != 0:
            raise PMCError(
                f"{type(base).__name__} has output_router_logits on, which adds the router's auxiliary loss to its own, "
                "and PMC's has none: set model.config.output_router_logits = False (or in its config.json)"
            )
    if getattr(config, "z_loss_coefficient", 0):
        raise PMCError(
            f"{type(base).__name__} has z_loss_coefficient {config.z_loss_coefficient:g}, a loss of its own that PMC's "
            "would leave out: set it to 0 in model.config"
        )


def _hooks(module: Any, kinds: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of a module's hooks except those of FSDP2, which gather parameters."""
    for kind in kinds:
        for hook in getattr(module, kind).values():
            function = hook.func if isinstance(hook, functools.partial) else hook
            if not str(getattr(function, "__module__", "")).startswith("torch.distributed.fsdp"):
                yield getattr(function, "__qualname__", type(function).__name__)
