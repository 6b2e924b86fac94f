"""Computes the rows of a rollout's step with a transformers model over a shared key/value pool.

The model's own code runs on one packed sequence of tokens, which need not be neighbours. An attention function that is
registered with transformers' attention interface writes their keys and values to the pool and reads those that each row
sees. No transformers cache is used, because its calls differ between versions.
"""

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
from ..ops.sample_nucleus import DTYPES, check_settings, launch_settings, sample_nucleus_static
from .drawn import Landing, Outputs, Pending
from .inputs import Bucket, StepTensors
from .weights import RolloutWeights

ATTENTION = "pmc_fast_rollout"
StepGraphs = GraphCache[Callable[[], None]]
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
        self._settings: torch.Tensor | None = None  # by which they draw
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
            stack.enter_context(patching.outputs_as_computed(self.model))
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

    def sample_by(self, temperature: float, top_k: int, top_p: float) -> None:
        """Set what `draw` draws by, in memory that graphs read."""
        check_settings(temperature, top_k, top_p)
        numbers = torch.tensor(launch_settings(temperature, top_k, top_p), dtype=torch.float64)
        self._settings = numbers.to(self.device) if self._settings is None else self._settings.copy_(numbers)

    def draw(self, step: StepTensors, follows: Pending | None = None) -> Pending:
        """Compute a padded step and draw from its logits as `sample_by` said, without waiting for the device.

        Parameters
        ----------
        step : StepTensors
            Its streams are `seeded`.
        follows : Pending, optional
            The draws of the step before, which are this step's tokens, by `step.sources`.

        Returns
        -------
        Pending
        """
        assert step.bucket is not None
        assert step.sources is not None
        assert self._settings is not None
        self._reserve(step.span)
        if follows is not None:
            torch.index_select(follows.tokens, 0, step.sources, out=step.tokens)
            step.tokens.clamp_(min=0)  # broken logits gave -1, which is said when they are read, and is no token
        if step.bucket not in self._outputs:
            self._outputs[step.bucket] = Outputs(step.bucket, self.device)
        outputs, settings = self._outputs[step.bucket], self._settings

        def compute() -> torch.Tensor:
            sample_nucleus_static(self._compute(step), step.draws, settings, outputs.draws)
            return outputs.memory

        self._run("draws", step, compute)
        return self._landing(outputs, step.real)

    def logits(self, step: StepTensors) -> torch.Tensor:
        """Compute a step and return the logits of `step.logit_rows`.

        Parameters
        ----------
        step : StepTensors

        Returns
        -------
        Tensor [L, V]
            As `sample_nucleus` takes them: on CUDA in the model's own dtype, on the CPU float32 or float64. With CUDA
            graphs, overwritten by the next step.
        """
        self._reserve(step.span)
        if self.graphs is None or step.bucket is None:
            return self._compute(step)
        place = step.bucket, step.tokens.data_ptr()

        def compute() -> torch.Tensor:
            # all graphs write the same memory: logits are large, and read before the next step
            logits = self._compute(step)
            if self._logits is None or len(self._logits) < len(logits):
                self._logits = torch.empty_like(logits)
            # graphs of smaller buckets keep the tensor that they write
            self._written[place] = self._logits[: len(logits)]
            return self._written[place].copy_(logits)

        self._run("logits", step, compute)
        return self._written[place]

    def _run(self, what: str, step: StepTensors, compute: Callable[[], torch.Tensor]) -> None:
        """Compute, or replay a graph of it."""
        if self.graphs is None:
            compute()
            return

        def alone() -> torch.Tensor:
            with fresh_autocast_cache():
                return compute()

        pool = [t.data_ptr() for pair in self.pool.values() for t in pair]
        if self.graphs.require((self._relies_on, pool)):
            self._logits = None
            self._written.clear()
        size = what, step.bucket, step.tokens.data_ptr()
        replay = self.graphs.get(size, lambda recorder: recorder.record(alone)[0])
        (alone if replay is None else replay)()

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
        return logits if logits.dtype in DTYPES.get(self.device.type, ()) else logits.float()

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
        assert self._index is not None  # `_compute` alone calls the model
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
        self._logits = self._settings = None
        self._written: dict[tuple[Bucket, int], torch.Tensor] = {}  # part of `_logits`, or of an earlier, smaller one
        self._outputs: dict[Bucket, Outputs] = {}
        self._landing = Landing(self.device)
        if self.graphs is not None:
            self.graphs.drop()

    def _reserve(self, span: int) -> None:
        if span <= self._span:
            return
        spare = self._span * 3 // 2 if self.graphs is None else max(2 * self._span, LEAST_SLOTS)
        self._span = max(span, spare if self.most_slots is None else min(spare, self.most_slots))
        if self.graphs is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # graphs that are dropped now may still run
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
