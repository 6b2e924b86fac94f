"""The rollout loop: plan a step, compute its logits, draw tokens, until every sample has ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils import logging

from ..distributed import Ranks
from ..errors import NotFiniteError, PMCError
from ..models import patching
from ..models.context import check_placement, out_of_memory, release_memory
from ..models.fsdp import Lockstep, is_sharded
from ..models.supported import check_adapters
from ..ops import native
from ..ops.sample_nucleus import Draws, seeded
from .inputs import StepInputs, StepTensors
from .logits_processors import Histories, settings_of
from .model_runner import ModelStep
from .request import Request, whole
from .self_check import SelfCheck

# Rows up to which n-gram drafts are added to a step: few rows cost hardly more than one, since all weights are read.
NGRAM_ROWS = {"cpu": 12, "cuda": 64}
logger = logging.get_logger(__name__)

NGRAM = 4  # longest n-gram by which a draft is looked up


@dataclass(slots=True)
class Rollouts:
    """Samples, indexed as `tokens[question][sample]`."""

    tokens: list[list[list[int]]]  # generated ids, the stop token included
    logps: list[list[np.ndarray]]  # float32, of the full softmax at temperature 1
    nucleus_mass: list[list[np.ndarray]]  # float32, the share of the tempered softmax that top_k and top_p kept
    finish_reason: list[list[Literal["stop", "length"]]]
    counters: dict[
        str, int
    ]  # rows, sampled_tokens, prefill_tokens, steps, peak_slots, draft_rows, graph_replays, ahead_steps, ...


class RolloutEngine:
    """Samples answers from one model. Its buffers are kept between calls.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A causal language model whose attention goes through transformers' attention interface. Its current weights
        are used. After a call it is as before.
    autocast_dtype : torch.dtype, optional
        What the model computes in under torch.autocast, if it does.
    cuda_graphs : bool
        On CUDA, pad steps to a few sizes and replay CUDA graphs of them, unless the model is sharded.
    pad_steps : bool
        Pad steps without CUDA graphs: for tests and measurements.
    graph_draws : bool
        Draw the tokens of padded steps within their CUDA graph. False: launch by launch, for measurements.
    run_ahead : bool
        Start a padded step before the draws of the one before it are read, where they do not decide which rows it
        has: while each row is one sample's and nothing waits. Needs `graph_draws`. Samples are the same without.
    process_group : torch.distributed.ProcessGroup, optional
        The processes that hold a sharded model (FSDP2). All of them must call the engine together, each with its own
        prompts, or with none.
    pool_tokens : int, optional
        Of calls that give none, unless one answer needs more.

    Raises
    ------
    PMCError
        A model that is quantised, offloaded or spread over devices. On first use: a model whose attention is not
        recognised, or whose log-probs on short samples differ from those of its own forward pass.
    """

    def __init__(
        self,
        model: Any,
        *,
        autocast_dtype: torch.dtype | None = None,
        cuda_graphs: bool = True,
        pad_steps: bool = False,
        graph_draws: bool = True,
        run_ahead: bool = True,
        process_group: Any = None,
        pool_tokens: int | None = None,
    ) -> None:
        check_placement(model)
        self.model, self._ranks = model, Ranks(process_group)
        self._step = ModelStep(model, autocast_dtype)
        self._cuda_graphs, self._pads = cuda_graphs, pad_steps
        self._graph_draws, self._run_ahead = graph_draws, run_ahead and graph_draws
        # smaller after a rollout that did not fit the memory
        self.pool_tokens = pool_tokens
        self._max_rows: int | None = None
        self._largest_pool = 0  # tokens that it has had room for
        self._inputs = StepInputs(self._step.device, pads=pad_steps)
        self._warned: set[str] = set()  # settings
        self._self_check = SelfCheck(model, self._step)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        temperature: float,
        top_k: int = 50,
        top_p: float = 1.0,
        max_new_tokens: int | Sequence[int] | None = None,
        max_length: int | None = None,
        seed: int = 0,
        stream_ids: Sequence[int] | torch.Tensor | None = None,
        stop_ids: Sequence[int] = (),
        max_rows: int | None = None,
        pool_tokens: int | None = None,
        drafts: Sequence[Sequence[Sequence[int]]] | None = None,
        positions: Sequence[Sequence[int] | None] | None = None,
        logit_bias: Sequence[Mapping[int, float]] | None = None,
        ngram_drafts: bool = True,
        trie: bool = True,
        as_generate: bool = False,
        rollout_dtype: Literal["auto", "fp8"] = "auto",
    ) -> Rollouts:
        """Sample answers to prompts.

        Parameters
        ----------
        prompts : sequence of Q lists of int
            Token ids.
        num_samples : int
            N, of each prompt.
        temperature : float
            0 is greedy.
        top_k : int
            0: all tokens. `top_p` is applied to what is left, as in Hugging Face generate.
        top_p : float
        max_new_tokens : int or sequence of Q int
        max_length : int
            One of the two; max_length includes the prompt.
        seed : int
        stream_ids : int64 [Q], optional
            Each prompt's random stream; by default a hash of the prompt. What a sample draws depends on (seed,
            stream, number of the sample, history) alone: not on the order or number of prompts, max_rows, pool_tokens,
            drafts, ngram_drafts or trie. This is exact in float64, and holds for at least 99 % of samples in float32,
            where rounding depends on the rows of a matrix product.
        stop_ids : sequence of int
            Tokens that end an answer.
        max_rows : int, optional
            Rows of one forward pass (default 512 on the CPU, 2048 on CUDA); further rows wait.
        pool_tokens : int, optional
            Slots of the key/value pool; by default it grows as needed. When it is full, prompts wait, and the
            one that came last starts again later.
        drafts : list of int lists for each prompt, optional
            Likely answers, such as an earlier greedy one. They are computed with the prompt: a token that is drawn as
            drafted needs no step of its own.
        positions : int list or None for each prompt, optional
            Of its tokens, ascending, if they are not 0, 1, ...: for a prompt whose masked tokens were left out.
            Answers continue from the last.
        logit_bias : mapping of int to float for each prompt, optional
            Added to the logits of these tokens, before temperature, top_k and top_p. Log-probs stay the model's own.
        ngram_drafts : bool
            In small steps, also draft the tokens that followed the same tokens in another sample, the prompt or the
            sample itself.
        trie : bool
            False computes every sample's history and every prompt separately: for tests and measurements.
        as_generate : bool
            Apply the logits processors of the model's generation_config (`generation.FOLLOWED`: repetition_penalty,
            suppress_tokens, ...), as `generate` does, and warn of its other settings. Log-probs stay the model's own.
        rollout_dtype : {"auto", "fp8"}
            fp8: copies of the linear layers' weights in 8 bits, but for the head's, and inputs rounded so as well
            (`ops.fp8_linear`). Samples and their log-probs are then those of a slightly different model. On CUDA this
            needs sm_89 and a model that computes in bfloat16; on the CPU it is slower, and there for tests.

        Returns
        -------
        Rollouts

        Raises
        ------
        PMCError
            Bad arguments; a model that is not supported, or not at the requested length; logits that are NaN.
        """
        if top_k is None:
            raise PMCError("top_k is None: it must be 0 (all tokens) or more")
        seed = whole("seed", seed)
        work = Request.checked(
            self.model, prompts, num_samples, max_new_tokens=max_new_tokens, max_length=max_length,
            stream_ids=stream_ids, stop_ids=stop_ids, max_rows=self._max_rows if max_rows is None else max_rows,
            pool_tokens=pool_tokens, drafts=drafts, positions=positions, logit_bias=logit_bias,
        )  # fmt: skip
        if pool_tokens is None and self.pool_tokens is not None:
            work.limit(self.pool_tokens)
        check_adapters(self.model)  # each time: another may have been added
        self.check(rollout_dtype)
        self._self_check.recognised.require(*work.longest())
        draw = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        asked = settings_of(self.model, sampling=temperature > 0, warned=self._warned) if as_generate else {}

        def run() -> Rollouts:
            with patching.attribute(self._step, "fp8", rollout_dtype == "fp8"):
                return self._run(work, draw, ngram_drafts=ngram_drafts, trie=trie, settings=asked)

        if (done := self._tried(run)) is None:  # and the error with the tensors that it held is gone
            self._shrink(work)
            done = run()
        return done

    def check(self, rollout_dtype: Literal["auto", "fp8"] = "auto") -> None:
        """Refuse, unless that was done, a model that rollouts do not serve; else the first call does it."""
        if rollout_dtype not in ("auto", "fp8"):
            raise PMCError(f"rollout_dtype is {rollout_dtype!r}: it must be auto or fp8")
        self._self_check(self._short_rollout, rollout_dtype == "fp8")

    @property
    def fp8_error(self) -> float | None:
        """How far 8 bits move log-probs, mean and absolute, once that is checked."""
        return self._self_check.fp8_error

    def release(self) -> int:
        """Release the memory that is kept between calls; return how many tokens the pool had room for."""
        self._inputs = StepInputs(self._step.device, pads=self._pads)
        span = self._step.release()
        self._largest_pool = max(self._largest_pool, span)
        return span

    def _tried(self, run: Callable[[], Rollouts]) -> Rollouts | None:
        """Run a rollout; return None if the device has no memory left for it."""
        try:
            return run()
        except Exception as error:
            if is_sharded(self.model) or not out_of_memory(error):  # the other processes of a sharded one go on
                raise
            return None

    def _shrink(self, work: Request) -> None:
        """Release the engine's memory and take less from now on; samples do not depend on it."""
        self.release()
        self._cuda_graphs = False
        self._step.use_graphs(False)
        known = [n for n in (self._largest_pool, self.pool_tokens) if n]  # none: no rollout has had a pool
        bounded = ""
        if known:
            self.pool_tokens = min(known) // 2
            work.limit(self.pool_tokens)
            bounded = f"{work.pool_tokens} tokens of keys and values and "
        self._max_rows = max(1, work.max_rows // 2)
        work.max_rows = self._max_rows
        release_memory(self._step.device)
        logger.warning(
            f"a rollout ran out of memory: it starts again without CUDA graphs, with {bounded}{work.max_rows} rows a step, and "
            "so do later ones"
        )

    def _run(
        self,
        work: Request,
        draw: dict[str, Any],
        *,
        ngram_drafts: bool,
        trie: bool,
        settings: dict[str, Any] | None = None,
    ) -> Rollouts:
        state = native.cpu().RolloutTrie(work.pool_tokens, work.stop_ids, NGRAM if ngram_drafts else 0, trie)
        keys = list(range(work.num_samples))
        groups = [keys] if trie else [[key] for key in keys]
        for prompt, stream, longest, drafts, positions in zip(
            work.prompts, work.streams, work.max_new, work.drafts, work.positions, strict=True
        ):
            for group in groups:
                state.add(prompt, seeded(stream, draw["seed"]), group, longest, drafts, positions)
        histories = Histories(settings or {}, work, len(groups))
        device = self.model.get_input_embeddings().weight.device  # the model may have been moved
        if device.type == "cuda":
            self._step.use_graphs(self._cuda_graphs and not is_sharded(self.model))
        pads = self._pads or self._step.graphs is not None
        if (self._inputs.device, self._inputs.pads) != (device, pads):
            self._inputs = StepInputs(device, pads=pads)
        self._step.most_slots = work.pool_tokens + work.max_rows  # padded rows have slots too
        with Lockstep(self.model, self._ranks) as lockstep, self._step.prepared():
            before = self._step.graph_counters()
            padded = self._loop(state, work, histories, draw, NGRAM_ROWS[device.type] * ngram_drafts, lockstep)
        graphs = {name: n - before[name] for name, n in self._step.graph_counters().items()}
        counters = state.counters() | {"pool_bytes": self._step.pool_bytes(), "copy_bytes": self._step.copy_bytes()}
        counters |= {"padded_rows": padded} | graphs
        return _collect(state, len(work.prompts), len(groups), counters)

    def _loop(
        self,
        state: Any,
        work: Request,
        histories: Histories,
        draw: dict[str, Any],
        ngram_rows: int,
        lockstep: Lockstep,
    ) -> int:
        """Plan, compute and draw until all samples have ended; return how many padded rows were computed."""
        limits, padded = (work.max_rows, ngram_rows), 0
        how = {name: draw[name] for name in ("temperature", "top_k", "top_p")}  # the seed is in the streams
        self._step.sample_by(**how)

        def inputs(plan: Any) -> StepTensors:
            nonlocal padded
            lockstep.forward()
            step = self._inputs(plan, state.span, work.max_rows)
            padded += len(step.tokens) - plan.rows
            return step

        while (plan := state.plan(*limits)) is not None:
            step = inputs(plan)
            if step.bucket is None or not (self._graph_draws and histories.idle):
                logits = self._step.logits(step)[: plan.logits]
                state.advance(*_sound(_to_host(histories.draw(logits, plan, step.real_draws(), **how))))
                continue
            pending = self._step.draw(step)
            while self._run_ahead and (plan := state.plan_ahead(*limits)) is not None:
                following = self._step.draw(inputs(plan), pending)
                state.advance(*_sound(pending.read()))
                pending = following
            state.advance(*_sound(pending.read()))
        return padded

    def _short_rollout(self, work: Request, draw: dict[str, Any]) -> Rollouts:
        # steps that run ahead are checked too: n-gram drafts would keep such small ones from it
        ahead = self._run_ahead and (self._pads or self._step.device.type == "cuda")
        return self._run(work, draw, ngram_drafts=not ahead, trie=True)


def rollout(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> Rollouts:
    """Sample answers to prompts; see `RolloutEngine`. For several calls, reuse one engine."""
    return RolloutEngine(model)(prompts, **settings)


def _sound(drawn: list[np.ndarray]) -> list[np.ndarray]:
    """Return tokens, log-probs and masses, unless logits were broken."""
    if (drawn[0] < 0).any():
        raise NotFiniteError("the model's logits are NaN or infinite: its weights are damaged, or it overflows")
    return drawn


def _to_host(drawn: Draws) -> list[np.ndarray]:
    """Copy draws to the host at once, bit by bit; this is the only time that a step waits for the device."""
    parts = [drawn.tokens, drawn.logps.view(torch.int64), drawn.nucleus_mass.view(torch.int64)]
    tokens, logps, mass = torch.cat(parts).cpu().split([len(p) for p in parts])
    return [tokens.numpy(), logps.view(torch.float64).numpy(), mass.view(torch.float64).numpy()]


def _collect(state: Any, questions: int, groups: int, counters: dict[str, int]) -> Rollouts:
    out = Rollouts([], [], [], [], counters)
    for q in range(questions):
        samples = [s for g in range(groups) for s in state.results(q * groups + g)]
        out.tokens.append([s[0] for s in samples])
        out.logps.append([s[1] for s in samples])
        out.nucleus_mass.append([s[2] for s in samples])
        out.finish_reason.append(["stop" if s[3] else "length" for s in samples])
    return out
