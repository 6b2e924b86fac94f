"""Computes the rows of a rollout's step with a transformers model over a shared key/value pool.

The model's own code runs on one packed sequence of tokens, which need not be neighbours. An attention function that is
registered with transformers' attention interface writes their keys and values to the pool and reads those that each row
sees. No transformers cache is used, because its calls differ between versions.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from ..cuda_graphs.cache import GraphCache
from ..cuda_graphs.recorder import CudaRecorder, Recorder, fingerprint, fresh_autocast_cache
from ..models import patching
from ..models.context import autocast, eval_mode
from ..models.fsdp import is_sharded
from ..models.fused_layers import FusedLayers
from ..ops.decode_attention import StepIndex, decode_attention
from .inputs import StepTensors
from .weights import RolloutWeights

ATTENTION = "pmc_fast_rollout"
StepGraphs = GraphCache[tuple[Callable[[], None], torch.Tensor]]  # each replays a step and writes its logits
LEAST_SLOTS = 1024  # of a pool with CUDA graphs, which are captured again whenever it grows


class ModelStep:
    """A model's forward pass over rows of a rollout.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    autocast_dtype : torch.dtype, optional
        What the model computes in under torch.autocast.
    """

    def __init__(self, model: Any, autocast_dtype: torch.dtype | None = None) -> None:
        self.model, self.autocast_dtype = model, autocast_dtype
        self.fp8 = False  # read weights in 8 bits
        self.graphs: StepGraphs | None = None
        self.most_slots: int | None = None  # of the pool, which else grows ahead of what is needed
        self._logits: torch.Tensor | None = None  # the memory that graphs write logits to
        self._relies_on: Any = None
        self._forget_buffers()
        self._index: StepIndex | None = None
        self._backend: str | None = None

    def use_graphs(self, use: bool) -> None:
        """Replay CUDA graphs of padded steps, or no longer."""
        if not use:
            self.graphs = None
        elif self.graphs is None:
            self.graphs = self.new_graphs(lambda: CudaRecorder(self.device))

    def new_graphs(self, recorder: Callable[[], Recorder]) -> StepGraphs:
        """Return a cache for CUDA graphs of steps."""
        return GraphCache(recorder, f"{type(self.model).__name__}: a decode step")

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Prepare the model for a rollout, and restore it at the end."""
        weight = self.model.get_input_embeddings().weight
        if (weight.device, weight.dtype) != (self.device, self._dtype):  # the model was moved
            self._forget_buffers()
        with ExitStack() as stack:
            stack.enter_context(patching.ONE_AT_A_TIME)
            stack.enter_context(torch.no_grad())
            stack.enter_context(fresh_autocast_cache())  # older torch would keep cast weights without gradients
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(patching.attention(self.model, ATTENTION))
            sharded = is_sharded(self.model)  # then weights are whole during a layer's own forward alone
            if not sharded:
                stack.enter_context(patching.forwards(self.weights.forwards()))
            stack.enter_context(self.autocast())
            if not sharded:
                stack.enter_context(self._layers.replaced())  # under autocast, in which kernels are compared
            if self.graphs is not None:  # once a rollout: weights do not move during one
                self._relies_on = fingerprint(self.model, self.weights.copies)
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context that the model computes in."""
        # without a cache under graphs: they would read cast weights after the cache is cleared
        return autocast(self.device, self.autocast_dtype, cache_enabled=self.graphs is None)

    def logits(self, step: StepTensors) -> torch.Tensor:
        """Compute a step and return the logits of `step.logit_rows`.

        Parameters
        ----------
        step : StepTensors

        Returns
        -------
        float32 Tensor [L, V], or float64 for a float64 model on the CPU
            With CUDA graphs, overwritten by the next step.
        """
        self._reserve(step.span)
        if self.graphs is None or step.bucket is None:
            return self._compute(step)
        pool = [t.data_ptr() for pair in self.pool.values() for t in pair]
        if self.graphs.require((self._relies_on, pool)):
            self._logits = None
        graph = self.graphs.get((step.bucket, step.tokens.data_ptr()), functools.partial(self._capture, step))
        if graph is not None:
            replay, logits = graph
            replay()
            return logits
        with fresh_autocast_cache():
            logits = self._compute(step)
        if self._logits is None or len(self._logits) < len(logits):
            self._logits = torch.empty_like(logits)  # graphs of smaller buckets keep the tensor that they write
        return logits

    def _capture(self, step: StepTensors, recorder: Recorder) -> tuple[Callable[[], None], torch.Tensor]:
        # all graphs write the same memory: logits are large, and read before the next step
        assert self._logits is not None
        logits = self._logits[: len(step.logit_rows)]

        def compute() -> torch.Tensor:
            with fresh_autocast_cache():
                return logits.copy_(self._compute(step))

        [replay] = recorder.record(compute)
        return replay, logits

    def _compute(self, step: StepTensors) -> torch.Tensor:
        self._index = step.index
        out = self.model(
            input_ids=step.tokens[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.logit_rows,
            rollout_step=self,
        )
        self._index = None
        patching.check_rows(self.model, out.logits.shape[1], len(step.logit_rows))
        logits = out.logits[0]
        wide = logits.dtype == torch.float64 and self.device.type == "cpu"  # CUDA's sampler takes no float64
        return logits if wide else logits.float()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Attend in one layer: q [1, heads, R, dim], k and v [1, kv_heads, R, dim] -> [1, R, heads, dim of v]."""
        assert self._index is not None  # only `logits` calls the model
        if self.autocast_dtype is not None:  # as autocast does with torch's attention; rotary embeddings are float32
            q, k, v = (t.to(self.autocast_dtype) for t in (q, k, v))
        if layer not in self.pool:
            shape = (self._span, k.shape[1], k.shape[3])
            self.pool[layer] = (k.new_empty(shape), v.new_empty(shape))
        size = v.shape[-1]
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, patching.widened(v, k)))
        k_pool, v_pool = self.pool[layer]
        made = decode_attention(
            q, k, v, k_pool, v_pool, self._index, scale=scale, softcap=softcap, window=window, backend=self._backend
        )
        return made[None, ..., :size]

    def release(self) -> int:
        """Release the pool, copied weights and graphs; return the tokens that the pool had room for."""
        span = self._span
        self._forget_buffers()
        return span

    def pool_bytes(self) -> int:
        """Return the memory of the pool."""
        return sum(t.nbytes for pair in self.pool.values() for t in pair)

    def copy_bytes(self) -> int:
        """Return the memory of copied weights: those for autocast, with merged LoRA adapters and in 8 bits."""
        kinds = self._kinds.values()
        return sum(t.nbytes for kind in kinds for copy in kind.copies.values() for t in copy if t is not None)

    @property
    def weights(self) -> RolloutWeights:
        """What the linear layers read, as `fp8` says."""
        return self._kinds[self.fp8]

    def graph_counters(self) -> dict[str, int]:
        """Return the numbers of captured and of replayed steps so far."""
        captures, replays = (0, 0) if self.graphs is None else (self.graphs.captures, self.graphs.replays)
        return {"graph_captures": captures, "graph_replays": replays}

    def _forget_buffers(self) -> None:
        weight = self.model.get_input_embeddings().weight
        self.device, self._dtype = weight.device, weight.dtype
        self.pool: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kinds = {fp8: RolloutWeights(self.model, self.autocast_dtype, fp8=fp8) for fp8 in (False, True)}
        self._layers = FusedLayers(self.model)
        self._span = 0
        self._logits = None
        if self.graphs is not None:
            self.graphs.drop()

    def _reserve(self, span: int) -> None:
        if span <= self._span:
            return
        spare = self._span * 3 // 2 if self.graphs is None else max(2 * self._span, LEAST_SLOTS)
        self._span = max(span, spare if self.most_slots is None else min(spare, self.most_slots))
        for layer, pair in self.pool.items():
            self.pool[layer] = tuple(_longer(t, self._span) for t in pair)  # type: ignore[assignment]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    rollout_step: ModelStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the pool, with the signature of transformers' attention interface."""
    patching.check_call(module, rollout_step, kwargs)
    assert rollout_step is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rollout_step.attend(module.layer_idx, query, key, value, scale, softcap, sliding_window), None


patching.register_attention(ATTENTION, attention)


def _longer(tensor: torch.Tensor, size: int) -> torch.Tensor:
    longer = tensor.new_empty((size, *tensor.shape[1:]))
    longer[: tensor.shape[0]] = tensor
    return longer
