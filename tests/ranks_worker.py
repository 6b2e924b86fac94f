"""Trains a tiny model on the processes that torchrun starts, and saves what one of them saw.

torchrun --nproc-per-node 2 tests/ranks_worker.py MODEL OUT ddp fsdp
"""

import os
import sys
from unittest import mock

import numpy as np
import torch
import transformers
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pmc_fast import PMC, PMCConfig
from pmc_fast.data import Row
from pmc_fast.errors import PMCError
from pmc_fast.models.packed_forward import causal_lm
from pmc_fast.pmc import sampler
from pmc_fast.rollout import RolloutEngine

QUESTIONS = ["Who wrote it?", "Where was the author born, and when was it?", "Why?", "Who?", "What is her cat's name?",
             "In which of the many towns of the old country did she write it?", "When?"]  # fmt: skip
RETAIN = [Row(f"Is {n} even?", "It is." if n % 2 == 0 else "No, it is odd and no more than that.") for n in range(14)]
STEPS = [[0, 1, 2, 3], [4, 5, 6], [6, 2, 0, 5], [1], [3, 4]]  # of all processes together; one is left without


def some(initial, candidates, min_len):
    """A reward of its own for each text, hardly ever 0."""
    return np.array([[sum(map(ord, c)) % 97 / 97 for c in of] for of in candidates])


def shard(model):
    """Shard layer by layer as accelerate does: a tied head in one unit with the embedding, another in its own."""
    base = causal_lm(model)
    embedding, norm, head = base.model.embed_tokens, base.model.norm, base.lm_head
    for layer in base.model.layers:
        fully_shard(layer)
    if base.config.tie_word_embeddings:
        fully_shard([embedding, norm, head])
    else:
        fully_shard(embedding)
        fully_shard([norm, head], reshard_after_forward=False)
    return fully_shard(model)


def lora(model):
    import peft

    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return adapted


def load(path, case):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if "untied" in case:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    if "checkpointing" in case:
        model.gradient_checkpointing_enable()
    if "lora" in case:
        model = lora(model)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(path, case, part_size, wrap=lambda model: model):
    """Take the steps of a case; with "cut" a process's samples may all be cut, and another's not."""
    shortest = 1 if "cut" in case else sampler.SHORTEST_CUT
    counted = {"autospec": True, "side_effect": RolloutEngine.__call__}
    with (
        mock.patch.object(sampler, "SHORTEST_CUT", shortest),
        mock.patch.object(RolloutEngine, "__call__", **counted) as rollout,
    ):
        return take_steps(path, case, part_size, wrap) | {"rollouts": rollout.call_count}


def take_steps(path, case, part_size, wrap):
    """Take the steps by plain gradient descent; return each step's gradients, the store and the counters."""
    groups = "groups" in case  # a mean each, of two questions at most, on one process as on two
    part_size, steps = (2, STEPS[:4]) if groups else (part_size, STEPS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = load(path, case)
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    config = PMCConfig(
        num_samples=3,
        max_length=40,
        prompt_format="tags",
        temperature=1.25,
        normalization="micro_batch" if groups else "step",
        max_tokens=64,
        seed=rank if "differ" in case else 0,
        retain_loss="kl" if "kl" in case else "nll",
        max_length_ratio=0.5 if "cut" in case else 0.0,
    )
    pmc = PMC(model, tokenizer, config, QUESTIONS, reward=some)
    if "before" in case:
        pmc.prepare()
    wrapped = wrap(model)
    if "before" not in case:
        pmc.prepare()
    wrapped.train()
    made, rng, rows = [], np.random.default_rng(0), []
    for all_indices in steps:
        draws = rng.integers(len(RETAIN), size=len(all_indices))
        mine = np.array_split(np.arange(len(all_indices)), size)[rank]
        step = pmc.sample([all_indices[i] for i in mine])
        retain = pmc.encode_retain([RETAIN[draws[i]] for i in mine])
        tokens = sum(sum(t != -100 for t in s.labels) for s in retain)
        for number, part in enumerate(step.split(part_size)):
            kept = retain[number * part_size : (number + 1) * part_size]
            pmc.loss(part, kept, model=wrapped, retain_tokens=tokens).loss.backward()
        gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.requires_grad}
        for p in model.parameters():
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.5)
                p.grad = None
        made.append(gradients)
        rows.append(step.counters)
    return {"gradients": made, "state": pmc.state_dict(), "counters": rows}


def main():
    path, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    wraps = {"ddp": DistributedDataParallel, "fsdp": shard}
    made = {}
    for case in cases:
        try:
            made[case] = run(path, case, 1, wraps[case.split("-")[0]])
        except PMCError as error:
            made[case] = str(error)
    if distributed.get_rank() == 0:
        torch.save(made, out)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # FSDP holds the group until Python ends, and gloo's threads, where they still run, abort it then
