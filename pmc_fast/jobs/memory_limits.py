"""Whether a run fits its device, and what is chosen where it does not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import UnlearnConfig
from ..data.packing import num_targets
from ..distributed import Ranks
from ..errors import PMCError
from ..models import loading
from ..models.fsdp import fsdp_launched
from ..models.pass_memory import Shape
from ..rollout.request import MAX_ROWS
from .memory import GIB, Amount, Choice, Memory, Work
from .methods import method_of
from .outputs import TrainingTarget
from .plan import Plan
from .progress import Monitor

LEAST_TOKENS = 512  # of a pass or a graph: smaller ones save little
LIMITED = ("cuda",)  # devices for which choices are made: others swap, and their memory is shared


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the data; by default of none, where max_length bounds them."""

    prompts: Sequence[int] = ()  # of the forget questions
    answers: Sequence[int] = ()  # to them, as far as they are given
    retain: Sequence[int] = ()  # of pairs
    retain_answers: Sequence[int] = ()
    asked: Sequence[int] = ()  # numbers of questions that an evaluation asks at once


def work_of(config: UnlearnConfig, lengths: Lengths, device: str) -> Work:
    """Return what a step computes and a rollout holds at most, and as expected where the data say it."""
    c, longest = config, config.max_length
    questions, method = c.batch_size * c.gradient_accumulation_steps, method_of(c)
    n = c.num_samples if method is None or c.chosen_filter.samples else 1  # of each; others but evaluate
    known = bool(lengths.prompts and lengths.retain)
    prompts = sorted(lengths.prompts) or [1]
    visited = questions if method is not None else max(questions, c.rollout_batch_size)  # sampled at once
    questions, visited = (min(n, len(prompts)) if known else n for n in (questions, visited))
    trained = n if c.selection == "soft" else 1
    shortest = prompts[0]
    group = alone = shortest + trained * (longest - shortest)
    if method is not None:  # answers that share no prompt
        trained, alone = len(method.answers), longest
        group = trained * longest
    retain, pairs = max(lengths.retain, default=longest), c.retain_per_question
    answer = _mean(lengths.answers or lengths.retain_answers)
    prompt = _mean(prompts)
    expected = questions * (prompt + trained * answer + pairs * _mean(lengths.retain)) if known else None
    targets = questions * (trained * answer + pairs * _mean(lengths.retain_answers)) if known else None
    most_kept = pairs * max(lengths.retain_answers, default=longest - 1)
    most_targets = questions * (trained * (longest - shortest) + most_kept)
    rollouts = [(visited, n), *((count, 1) for count in lengths.asked)]
    if known:
        rollouts += (len(prompts), 1), (len(prompts), c.attack_samples)
    rows = MAX_ROWS[device]

    def slots(count: int, samples: int, prompt: float, answer: float) -> float:
        # prompts are taken up until a pass is full, and their answers branch further
        count = min(count, rows)
        return count * prompt + min(count * samples, max(2 * rows, visited * n)) * answer

    return Work(
        tokens=Amount(questions * (group + pairs * retain), expected),
        targets=Amount(most_targets, targets),
        longest=max(alone, retain),
        slots=Amount(
            max(slots(count, samples, shortest, longest - shortest) for count, samples in rollouts),
            max(slots(count, samples, prompt, answer) for count, samples in rollouts) if known else None,
        ),
        least_slots=2 * longest,
        enough_slots=max(2 * longest, int(slots(questions, n, prompt, answer))) if known else questions * longest,
        rows=min(rows, max(count * samples for count, samples in rollouts)),
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def memory_of(
    config: UnlearnConfig,
    lengths: Lengths,
    device: torch.device,
    prepare: Callable[[Any], Any] = lambda model: model,
) -> Memory:
    """Return what makes plans of a run on a kind of device; `prepare` makes of a model the one that is trained."""
    kept_in = loading.resolve_param_dtype(config.param_dtype, config.dtype, device, config.model)
    low = loading.autocast_dtype(kept_in, config.dtype, device)
    if kept_in == "bfloat16" and getattr(config, "lora", False):
        low = torch.bfloat16  # adapters are float32 and compute with the frozen weights
    shape = Shape(loading.load_config(config.model), getattr(torch, kept_in), prepare)
    return Memory(config, shape, work_of(config, lengths, device.type), device.type, low)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the free and all bytes of a device's memory, if that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    values = {
        line.split(":")[0]: int(line.split()[1]) << 10 for line in info.read_text().splitlines() if "kB" in line
    }
    return values["MemAvailable"], values["MemTotal"]


# --- choices


def choose(memory: Memory, free: int) -> tuple[Choice, list[str]]:
    """Return the first choice that fits, and a warning for each thing in which it differs from the settings.

    Raises
    ------
    PMCError
        None fits.
    """
    asked = Choice.of(memory.config, memory.device)
    work = memory.work
    enough = int(min(work.slots.most, work.enough_slots))
    *candidates, last = _candidates(asked, memory)
    for choice in (*candidates, last):
        least = work.least_slots if choice is last else enough
        # a plan with all tokens, and one with the fewest: between them the pool may have any size
        full, _ = memory.plan(choice).peak()
        if full <= free:
            return replace(choice, pool_tokens=int(work.slots.most)), _said(memory, asked, choice, free)
        small, _ = memory.plan(replace(choice, pool_tokens=least)).peak()
        if small <= free and work.slots.most > least:
            pool = least + int((work.slots.most - least) * (free - small) / (full - small))
            choice = replace(choice, pool_tokens=pool)
            return choice, _said(memory, asked, choice, free)
    raise PMCError(_too_large(memory, replace(last, pool_tokens=work.least_slots), free))


def _candidates(asked: Choice, memory: Memory) -> Iterator[Choice]:
    """Yield choices from what the settings say to the least memory: each differs from the one before in one thing."""
    yield asked
    choice, work = asked, memory.work
    pack = max(min(asked.max_tokens, int(work.tokens.most)), work.longest)
    if asked.cuda_graphs:
        for tokens in _halves(pack, LEAST_TOKENS) if memory.replays(asked) else ():
            yield replace(choice, graph_tokens=tokens)
        choice = replace(choice, cuda_graphs=False)
        yield choice
    for tokens in _halves(pack, max(LEAST_TOKENS, work.longest)):
        choice = replace(choice, max_tokens=tokens)
        yield choice
    if memory.shape.supports_checkpointing:
        yield replace(choice, checkpointing=True)


def _halves(tokens: int, least: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= least:
        yield tokens


def _said(memory: Memory, asked: Choice, choice: Choice, free: int) -> list[str]:
    if choice == asked:
        return []
    wanted, _ = memory.plan(asked).peak()
    why = f"the run may take {wanted / GIB:.1f} GiB and {free / GIB:.1f} are free"
    texts = []
    if choice.pool_tokens is not None:
        held = choice.pool_tokens * memory.passes(choice).cached / GIB
        texts.append(
            f"rollouts hold at most {choice.pool_tokens} tokens' keys and values ({held:.1f} GiB), prompts beyond that wait"
        )
    if choice.graph_tokens is not None:
        texts.append(
            f"CUDA graphs are captured of training passes up to {choice.graph_tokens} tokens, larger ones run eagerly"
        )
    if asked.cuda_graphs and not choice.cuda_graphs:
        texts.append("CUDA graphs are off, which is slower")
    if choice.max_tokens != asked.max_tokens:
        texts.append(f"a training pass has at most {choice.max_tokens} tokens, instead of {asked.max_tokens}")
    if choice.checkpointing:
        texts.append("layers are computed again in backward (gradient checkpointing), which takes a third longer")
    return [f"memory: {why}: {text}" for text in texts]


def _too_large(memory: Memory, least: Choice, free: int) -> str:
    plan = memory.plan(least)
    total, phase = plan.peak()
    largest = sorted((i for i in plan.items if phase in i.phases), key=lambda i: -i.most)[:3]
    named = ", ".join(f"{i.name} {i.most / GIB:.1f}" for i in largest)
    return (
        f"the run takes at least {total / GIB:.1f} GiB of {memory.device} memory ({named}), and {free / GIB:.1f} GiB are "
        f"free: use {', '.join(_remedies(memory))}, or a larger device"
    )


def _remedies(memory: Memory) -> list[str]:
    """Return the settings that can still be changed for less memory: max_length, at least."""
    c = memory.config
    remedies = [] if getattr(c, "lora", False) or c.method != "pmc" else ["--lora"]
    if memory.param_dtype == torch.float32:
        remedies.append(
            "--dtype bfloat16 --param-dtype bfloat16" if c.dtype == "float32" else "--param-dtype bfloat16"
        )
    method = method_of(c)
    own = method is not None and any(method.divergences)  # then a copy is needed in any case
    if c.retain_loss == "kl" and not own and not getattr(c, "lora", False):
        remedies.append("--retain-loss nll")
    fewer = ("batch_size", "retain_per_question", *(["num_samples"] if c.method == "pmc" else []))
    smaller = [f"--{n.replace('_', '-')}" for n in fewer if getattr(c, n) > 1]
    either = f"{', '.join(smaller)} or " if smaller else ""
    return [*remedies, f"a smaller {either}--max-length"]


def planned(plan: Plan, prepare: Callable[[Any], Any]) -> Memory:
    """Return what makes plans of the memory of a checked run; `prepare` as of `memory_of`."""
    encoder = plan.encoder
    prompts = [len(encoder.prompt(row.question)) for row in plan.forget]
    pairs = [encoder.pair(row.question, row.answer) for row in plan.forget if row.answer]
    retain = [encoder.pair(row.question, row.answer or "") for row in plan.retain]
    lengths = Lengths(
        prompts,
        [num_targets(s) for s in pairs],
        [len(s.input_ids) for s in retain],
        [num_targets(s) for s in retain],
        [len(s.rows) for s in plan.sets],
    )
    device = loading.resolve_device(plan.config.device)
    return memory_of(plan.config, lengths, device, prepare)


class Limits:
    """Bounds the memory of a checked run.

    Parameters
    ----------
    plan : Plan
    target : TrainingTarget
    held : bool
        The model is loaded already: what this process has of the device's memory is the run's own.
    """

    def __init__(self, plan: Plan, target: TrainingTarget, *, held: bool = False) -> None:
        self.plan, self.memory, self.free = plan, None, 0
        device = loading.resolve_device(plan.config.device)
        if device.type not in LIMITED or fsdp_launched():
            return  # a process of FSDP holds a part of what is counted
        if (found := device_memory(device)) is not None:
            self.memory, self.free = planned(plan, target.trained), found[0]
            if held:
                self.free += torch.cuda.memory_reserved(device)
            choose(self.memory, self.free)  # refused before any work

    def agree(self, ranks: Ranks, monitor: Monitor) -> None:
        """Choose what fits the device of each process, and say so."""
        if self.memory is not None:
            free = min(ranks.gather(self.free))
            self.plan.choice, said = choose(self.memory, free)
            self.plan.warn([*self.memory.plan(self.plan.choice).warnings(), *said], monitor)
