"""Exporting a stack as one model or one adapter, and taking its last request back."""

import json
from typing import Any

import torch

from ..errors import PMCError
from ..jobs.outputs import ROOM
from ..models import loading
from ..utils.files import check_output, written_aside
from . import adapters
from .record import CLAIM
from .stack import Stack, locked

CONTENTS = "requests.json"
# the values of vLLM's --max-lora-rank (MaxLoRARanks in vllm/config/lora.py), which has to be the adapter's rank or above
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def merge(
    stack: str, output: str, *, model: str = "", adapter: bool = False, save_dtype: str = "auto"
) -> dict[str, Any]:
    """Write all requests of a stack as one model, or as one PEFT adapter; neither stack nor base model is changed.

    Parameters
    ----------
    stack : str
    output : str
        A new or empty directory.
    model : str
        Path of the base model, if it has moved.
    adapter : bool
        Write one adapter, whose rank is the sum of all requests', instead of a model.
    save_dtype : {"auto", "float32", "bfloat16", "float16"}
        Dtype of the model that is written; auto: the base model's.

    Returns
    -------
    dict
        The content of requests.json in `output`: ``weights``, the hash of the effective weights, which is the last
        record's, and ``saved``, that of the saved weights: they are equal where `save_dtype` is float32. Of an adapter,
        ``rank`` and ``vllm_max_lora_rank``: what vLLM has to be given, or None if it takes no such rank.
    """
    check_output(output, 0)
    existing = _existing(stack)
    with existing.model(model) as source:
        loaded = loading.load_model(source, device=torch.device("cpu"))
    contents: dict[str, Any] = {
        "claim": CLAIM,
        "base": loading.weights_hash(loaded.model),
        "requests": existing.links(),
    }
    contents["data"] = {"earlier": existing.earlier()}  # for runs that start from this output
    contents["weights"] = existing.apply(loaded.model)
    if adapter:
        return _write_adapter(existing, output, source, contents)
    tokenizer = loading.load_tokenizer(source)
    dtype = loaded.checkpoint_dtype if save_dtype == "auto" else getattr(torch, save_dtype)
    path = check_output(output, sum(p.numel() for p in loaded.model.parameters()) * dtype.itemsize + ROOM)
    loaded.model.to(dtype)
    contents |= {"dtype": str(dtype).removeprefix("torch."), "saved": loading.weights_hash(loaded.model)}
    with written_aside(path) as directory:
        loaded.model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    return contents


def _write_adapter(stack: Stack, output: str, source: str, contents: dict[str, Any]) -> dict[str, Any]:
    one = adapters.concatenated([adapters.read(request.directory) for request in stack.requests])
    contents["rank"] = rank = max(len(f.a) for f in one.factors.values())
    contents["vllm_max_lora_rank"] = next((r for r in VLLM_RANKS if r >= rank), None)
    size = sum((f.a.numel() + f.b.numel()) * f.a.itemsize for f in one.factors.values())
    with written_aside(check_output(output, size + ROOM)) as directory:
        adapters.write(one, directory, source)
        (directory / CONTENTS).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    return contents


def roll_back(stack: str, request: str = "", *, model: str = "") -> dict[str, str]:
    """Remove the last request of a stack, after checking that the weights without it have the recorded hash.

    Returns
    -------
    dict
        ``request``; ``kept``: its directory's new path; ``weights``: the computed hash of the effective weights.

    Raises
    ------
    PMCError
        `request` is not the last one, or the hash differs. Nothing was changed then.
    """
    _existing(stack)
    with locked(stack):
        existing = _existing(stack)
        last = existing.check_last(request)
        remaining = Stack(stack)
        remaining.requests.pop()
        with existing.model(model) as source:
            loaded = loading.load_model(source, device=torch.device("cpu"))
        weights, recorded = remaining.apply(loaded.model), last.record["model"]["before"]
        if weights != recorded:
            raise PMCError(
                f"request {last.name} was not rolled back: the weights without it hash to {weights[:12]}, its record says "
                f"{recorded[:12]}: this is not the model that it was trained on"
            )
        return {"request": last.name, "kept": str(existing.roll_back()), "weights": weights}


def _existing(stack: str) -> Stack:
    found = Stack(stack)
    found.require_requests()
    return found
