"""Rollouts beside every other way to draw the same samples that runs here, interleaved: tokens/s, seconds, and what was drawn.

    python -m benchmarks.peers                      # both models of the demo, 4 questions x 10 samples
    python -m benchmarks.peers --models knows --peers "llama.cpp" --rounds 3 --minutes 5

Peers: transformers' generate, generate with a static cache and torch.compile, generate_batch (continuous batching), vLLM,
and llama.cpp (llama-cpp-python), on the same weights with the same prompts, sampling settings and limits. One that can't run is named with the
reason, in the output and the result file. Our engine, and transformers, read the live weights; vLLM and llama.cpp hold a
copy, which a training loop renews before each rollout: that time is measured by itself.

The first call of each warms it up (compilation, buffers), and its samples are judged: under the model's own forward pass
nearly all tokens must be among those that top_k and top_p keep, and their mean log-prob must be that of our samples up to
chance. A peer that fails is refused. Those that take over SLOW times as long as ours are measured in fewer rounds.

Needs the demo's models: `make demo DEMO=--short` makes them.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.demo_model import base_model, finetuned_model
from pmc_fast.bench import measure
from pmc_fast.bench.table import OURS, duration, times
from pmc_fast.reference import answer_length

from . import harness
from .peer_engines import VLLM, Answers, Generate, GenerateBatch, Ours, StaticCompiled, Task, Unavailable
from .peer_llama import LlamaCpp
from .settings import SEED, TOP_P, Setting
from .suites import Suites, few_rounds, machines, ranged

PEERS: Mapping[str, Callable[[Task], Any]] = {
    "generate": Generate,
    "generate, static cache, compiled": StaticCompiled,
    "generate_batch": GenerateBatch,
    "vLLM": VLLM,
    "llama.cpp": LlamaCpp,
}
MODELS = {"knows": ("knows the facts", finetuned_model), "base": ("does not know the facts", base_model)}
SLOW, SLOW_ROUNDS = 3.0, 2
JUDGED = 4  # samples of each question
OUTSIDE = 0.01  # most: share of tokens that top_k or top_p cuts off
APART = 5.0  # most: standard errors between two mean log-probs
ROUNDING = 1e-3  # of logits and of probabilities, where a token is on the edge of what is kept


# --- what was drawn


def cut(task: Task, answers: Answers) -> Answers:
    """Return answers without what stands after the token that ends them.

    Raises
    ------
    Unavailable
        There are other answers than were asked for: their number, or one that ends before it should.
    """
    counts = [len(samples) for samples in answers]
    if counts != [task.num_samples] * len(task.prompts):
        raise Unavailable(f"it gave {counts} answers to {len(task.prompts)} prompts, not {task.num_samples} each")
    made = [[ids[: answer_length(ids, task.stops)] for ids in samples] for samples in answers]
    for ids in (ids for samples in made for ids in samples):
        if not ids or (ids[-1] not in task.stops and len(ids) != task.new_tokens):
            raise Unavailable(
                f"an answer of {len(ids)} tokens ends without a stop token before its {task.new_tokens}"
            )
    return made


@torch.no_grad()
def judge(task: Task, answers: Answers) -> dict[str, Any]:
    """Return what the model's own forward pass says of some answers: log-probs, and the share of tokens that is cut off."""
    means, outside, count = [], 0, 0
    for prompt, samples in zip(task.prompts, answers, strict=True):
        for ids in samples[:JUDGED]:
            whole = torch.tensor([prompt + ids], device=task.model.device)
            logits = task.model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
            drawn = torch.tensor(ids, device=logits.device)[:, None]
            means.append(logits.log_softmax(-1).gather(1, drawn).mean().item())
            z = logits / task.temperature
            least = z.topk(task.top_k).values[:, -1:] if task.top_k else z.new_full((len(ids), 1), -math.inf)
            own = z.gather(1, drawn)
            kept = z.masked_fill(z < least, -math.inf).softmax(-1)
            likelier = kept.masked_fill(z <= own + ROUNDING, 0.0).sum(-1, keepdim=True)
            outside += int(((own < least - ROUNDING) | (likelier >= task.top_p + ROUNDING)).sum())
            count += len(ids)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.inf
    return {"mean_logp": statistics.mean(means), "logp_error": error, "outside": outside / count}


def require_same_distribution(found: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a peer whose samples are not those that were asked for; ours is held to the first of the two bounds."""
    if found["outside"] > OUTSIDE:
        raise Unavailable(f"{found['outside']:.1%} of its tokens are not among those that top_k and top_p keep")
    apart = abs(found["mean_logp"] - ours["mean_logp"])
    if apart > APART * math.hypot(found["logp_error"], ours["logp_error"]):
        raise Unavailable(
            f"its samples' mean log-prob is {found['mean_logp']:.3f}, that of ours {ours['mean_logp']:.3f}"
        )


# --- the measurement


class Measured:
    """One way with what its rounds took and gave."""

    def __init__(self, peer: Any, task: Task) -> None:
        self.peer, self.task = peer, task
        self.seconds, self.tokens, self.syncs = list[float](), list[int](), list[float]()
        self.judged: dict[str, Any] = {}

    def warm_up(self, ours: Mapping[str, Any] | None) -> None:
        """Draw the first samples and judge them; Unavailable if they are not what was asked for."""
        self.judged = judge(self.task, cut(self.task, self.peer.sample(SEED - 1)))
        require_same_distribution(self.judged, ours or self.judged)

    def sync(self) -> None:
        """Take the weights over, where it holds a copy."""
        if hasattr(self.peer, "sync"):
            self.syncs.append(measure.time_round({"": self.peer.sync}, 0, self.task.model.device)[""])

    def summary(self) -> dict[str, Any]:
        rates = [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]
        summary = measure.summarize([{"": s} for s in self.seconds], {})[""]
        return summary | self.judged | {
            "tokens": statistics.median(self.tokens), "tokens_per_s": statistics.median(rates),
            "rounds_tokens_per_s": rates, "syncs_s": self.syncs,
        }  # fmt: skip


def compare(
    task: Task, peers: Sequence[str], rounds: int, seconds: float = math.inf, *, judged: bool = True
) -> dict[str, Any]:
    """Measure our engine and peers in interleaved rounds, as many as `seconds` allow, one at least.

    Parameters
    ----------
    task : Task
    peers : sequence of str
        Keys of PEERS.
    rounds : int
    seconds : float
    judged : bool
        Whether a peer whose samples are unlike ours is refused. Not where rounding decides what top_k keeps: with random
        weights in bfloat16.

    Returns
    -------
    dict
        A result with its contestants, and under facts "refused" the reason of each peer that is not among them.
    """
    ways, refused = {OURS: Measured(Ours(task), task)}, dict[str, str]()
    ways[OURS].warm_up(None) if judged else ways[OURS].peer.sample(SEED - 1)
    for name in peers:
        try:
            way = Measured(PEERS[name](task), task)
            way.warm_up(ways[OURS].judged) if judged else cut(task, way.peer.sample(SEED - 1))
            ways[name] = way
        except Exception as error:  # a peer that does not run here is named, and the others are measured
            why = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {error}"
            refused[name] = " ".join(why.split())[:300]
            print(f"  {name}: not measured: {refused[name]}", flush=True)
    spent = 0.0
    for number in range(rounds):
        going = {name: way for name, way in ways.items() if number < SLOW_ROUNDS or not _slow(way, ways[OURS])}
        if number and spent + sum(max(way.seconds) + sum(way.syncs[-1:]) for way in going.values()) > seconds:
            break
        spent += _round(going, number, task)
    for way in ways.values():
        if hasattr(way.peer, "close"):
            way.peer.close()
    return {
        "facts": {"refused": refused, "questions": len(task.prompts), "num_samples": task.num_samples,
                  "new_tokens": task.new_tokens, "temperature": task.temperature, "top_k": task.top_k, "top_p": task.top_p},
        "contestants": {name: way.summary() for name, way in ways.items()},
    }  # fmt: skip


def _slow(way: Measured, ours: Measured) -> bool:
    return statistics.median(way.seconds) > SLOW * statistics.median(ours.seconds)


def _round(going: Mapping[str, Measured], number: int, task: Task) -> float:
    """Run each way once and return the seconds of all."""
    made: dict[str, Answers] = {}

    def sample(name: str) -> None:
        made[name] = going[name].peer.sample(SEED + number)

    for way in going.values():
        way.sync()
    found = measure.time_round({name: functools.partial(sample, name) for name in going}, number, task.model.device)
    for name, way in going.items():
        way.seconds.append(found[name])
        way.tokens.append(sum(len(ids) for samples in cut(task, made[name]) for ids in samples))
    shown = ", ".join(f"{name} {duration(s)}" for name, s in found.items())
    print(f"  round {number + 1}: {shown}", flush=True)
    return sum(found.values()) + sum(way.syncs[-1] for way in going.values() if way.syncs)


def task_of(setting: Setting, samples: int, max_length: int, temperature: float) -> Task:
    """Return a setting's task; all answers may have as many tokens as fit behind the longest prompt, as generate counts."""
    return Task(
        setting.model, setting.prompts, samples, max_length - max(map(len, setting.prompts)),
        tuple(setting.encoder.stops), setting.encoder.pad, temperature, top_k=50, top_p=TOP_P,
    )  # fmt: skip


# --- the table of docs/benchmarks.md


def table(suites: Suites) -> str:
    """Return every way's tokens/s, seconds and samples, and which were refused."""
    results = suites.results("peers")
    if not results:
        return "Not measured yet: `python -m benchmarks.peers`."
    lines = [
        "| | tokens/s | seconds | to take the weights over | x | tokens an answer | mean log-prob |",
        "|---|" + "---:|" * 6,
    ]
    for result in results:
        f, found = result["facts"], result["contestants"]
        lines.append(f"| **{result['name']}** | | | | | | |")
        answers = f["questions"] * f["num_samples"]
        for name, c in found.items():
            few = few_rounds(c)
            ratio = times(found[OURS]["tokens_per_s"] / c["tokens_per_s"])
            if c["syncs_s"]:
                whole = c["median_s"] + statistics.median(c["syncs_s"])
                ratio += f" ({times(found[OURS]['tokens_per_s'] * whole / c['tokens'])} with it)"
            cells = (
                name + (f" ({few})" if few else ""), f"{c['tokens_per_s']:,.0f}", ranged(c),
                duration(statistics.median(c["syncs_s"])) if c["syncs_s"] else "none",
                ratio, f"{c['tokens'] / answers:.0f}", f"{c['mean_logp']:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {name}: not run | | | | | | |" for name in f["refused"]]
    refused = {name: why for result in results for name, why in result["facts"]["refused"].items()}
    notes = [f"{name}: {why}." for name, why in refused.items()]
    return "\n".join([*lines, "", " ".join([f"Measured on {machines([suites.documents['peers']])}.", *notes])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--samples", type=int, default=10, help="as preset small")
    parser.add_argument("--max-length", type=int, default=80, help="of the longest prompt with its answers")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="for the rounds of each model")
    parser.add_argument("--json", type=Path, default=harness.RESULTS / "peers.json")
    given = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    for model in given.models:
        name, path = MODELS[model]
        setting = Setting(path(), ["forget20"], given.questions)
        task = task_of(setting, given.samples, given.max_length, given.temperature)
        name = f"{name}, {given.questions} questions x {given.samples}, T {given.temperature:g}, max_length {given.max_length}"
        print(name, flush=True)
        with harness.alone():
            results.append({"name": name} | compare(task, given.peers, given.rounds, 60 * given.minutes))
        harness.write(given.json, "peers", results, SEED)
    print(f"wrote {given.json}")


if __name__ == "__main__":
    main()
