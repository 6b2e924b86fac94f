"""How far samples of 8-bit rollouts are from the model's: `python -m benchmarks.fp8_rollouts [--model DIR]`.

On the demo's prompts: the total variation between the two distributions of the next token, at each token of the model's
greedy answers, and the share of greedy answers that are equal. By default on the demo's model (`make demo DEMO=--short`
makes it). On a GPU the model computes in bfloat16, on the CPU in float32. What 8 bits bring in time only a card shows:
`python -m benchmarks.card_probe rollouts`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import TOFU
from pmc_fast.config import PMCConfig
from pmc_fast.data import Encoder, load_rows
from pmc_fast.models import patching
from pmc_fast.models.context import autocast
from pmc_fast.models.loading import load_model, load_tokenizer, resolve_device
from pmc_fast.rollout import RolloutEngine
from pmc_fast.rollout.weights import RolloutWeights


@torch.no_grad()
def distances(
    model: Any,
    low: torch.dtype | None,
    weights: RolloutWeights,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
) -> np.ndarray:
    """Return 0.5 * sum |p - p_fp8| over the tokens of the answers, each predicted from the model's own history."""
    found = []
    forwards = weights.forwards()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=model.device)
        both = []
        for replaced in ({}, forwards):
            with autocast(model.device, low), patching.forwards(replaced):
                logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            both.append(logits.double().softmax(-1))
        found.append(((both[0] - both[1]).abs().sum(-1) / 2).cpu().numpy())
    return np.concatenate(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory; by default the demo's model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model is None:
        from examples.demo_model import finetuned_model

        args.model = str(finetuned_model())
    device = resolve_device(args.device)
    loaded = load_model(args.model, device=device, param_dtype="auto")
    model, low = loaded.model.eval(), loaded.autocast_dtype
    encoder = Encoder(load_tokenizer(args.model), PMCConfig(), model.generation_config)
    prompts = [encoder.prompt(row.question) for row in load_rows(f"{TOFU}/forget20.jsonl")[: args.questions]]
    engine = RolloutEngine(model, autocast_dtype=low)
    how = {"num_samples": 1, "temperature": 0.0, "max_new_tokens": args.max_new_tokens, "stop_ids": encoder.stops}
    greedy = {kind: engine(prompts, rollout_dtype=kind, **how).tokens for kind in ("auto", "fp8")}
    pairs = [(a, b) for [a], [b] in zip(greedy["auto"], greedy["fp8"], strict=True)]
    shared = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) for a, b in pairs
    ]
    tv = distances(model, low, RolloutWeights(model, low, fp8=True), prompts, [a for a, _ in pairs])
    result = {
        "model": Path(args.model).name, "device": device.type, "prompts": len(prompts), "tokens": len(tv),
        "total_variation": {"mean": tv.mean(), **{f"p{p}": np.percentile(tv, p) for p in (50, 90, 99)}, "max": tv.max()},
        "equal_greedy_answers": float(np.mean([a == b for a, b in pairs])),
        "equal_greedy_tokens": sum(shared) / sum(len(a) for a, _ in pairs),  # before the first that differs
        "logp_error": engine.fp8_error,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
