"""Forward passes of packs through the model's own forward; `weighted_nll` computes the head."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..cuda_graphs.aliases import Caller
from ..cuda_graphs.recorder import CudaRecorder
from ..cuda_graphs.training import PassGraphs
from ..data import Encoded
from ..data.packing import Pack, num_targets, pack
from ..ops.weighted_nll import weighted_nll
from . import patching
from .context import autocast, check_placement, eval_mode, known_tokens, plain_logps, require_same_logps, tolerance
from .fsdp import is_sharded
from .fused_layers import FusedLayers, uses_checkpointing
from .lm_head import Head, check_logits, read_head
from .packed_attention import ATTENTION
from .recognition import CHECKED, Recognised, own_errors, recognise, rope_limit
from .supported import check_adapters, check_pass

GRAPHED = ("cuda",)  # devices on which passes are replayed
Also = Callable[[torch.Tensor, Head], torch.Tensor]


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PackedPass:
    """Runs packs through a causal language model.

    The model's own forward runs on one sequence [1, T]: hooks, wrappers, adapters, checkpointing and autocast apply
    as in any other pass. During the pass are replaced: the attention function (each sequence sees itself alone), the
    head's forward (`weighted_nll` of the rows that predict a target, instead of logits) and layers for which there are
    fused kernels (`FusedLayers`).

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The causal language model itself, without wrappers.
    autocast_dtype : torch.dtype, optional
        What to compute in under torch.autocast; by default the caller's own context counts.
    cuda_graphs : bool
        Replay CUDA graphs of passes with gradients, where they can be captured: on CUDA in bfloat16, of the bare
        model or PEFT's, without hooks, dropout, checkpointing or sharding. Gradients of such a loss come in `.grad` of
        all trained parameters, by one call of `backward` without `inputs`; `torch.autograd.grad` is refused. While a
        loss waits for its backward, further passes run eagerly.
    graph_tokens : int, optional
        Larger packs run eagerly: a graph holds the memory of its pass. 0: all of them. May be changed.
    """

    def __init__(
        self,
        base: Any,
        *,
        autocast_dtype: torch.dtype | None = None,
        cuda_graphs: bool = False,
        graph_tokens: int | None = None,
    ) -> None:
        check_placement(base)
        self.base, self.autocast_dtype = base, autocast_dtype
        # one limit is in the configuration, `check` finds the others
        name = type(base).__name__
        self._recognised = Recognised(name, (), *rope_limit(base.config.get_text_config(), name))
        self._layers = FusedLayers(base, training=True)
        self._cuda_graphs, self.graph_tokens = cuda_graphs, graph_tokens
        self.graphs: PassGraphs | None = None
        self._compared: set[bool] = set()  # modes (train, eval) in which the logits were compared with the head's
        self._checked: list[Any] = []  # calls whose log-probs were compared

    def __call__(
        self, pack: Pack, row_scale: torch.Tensor, *, model: Any = None, also: Also | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sum of row_scale * -logp over a pack's targets, and the log-probs.

        Parameters
        ----------
        pack : Pack
            On the model's device, or on the host: only such packs are replayed.
        row_scale : Tensor [M]
            Weight of each target.
        model : callable, optional
            What to call: the model wrapped by DDP, FSDP, PEFT or torch.compile. By default the bare model.
        also : callable, optional
            Is given the hidden rows, [R, D], and the head; the number that it returns is added to the loss. Such a pass is not
            replayed.

        Returns
        -------
        loss : Tensor []
            Differentiable.
        logps : Tensor [M]
            Not differentiable.
        """
        if self._recognised.limited:
            self._recognised.require(int(pack.positions.max()) + 1, "a sequence")
        call = self.base if model is None else model
        check_pass(self.base, call)
        check_adapters(call)
        device = self.base.get_input_embeddings().weight.device
        with autocast(device, self.autocast_dtype):
            # never the first pass of a size or mode
            replayed = None if also else self._replayed(pack, row_scale, call, device)
            if replayed is not None:
                return replayed
            new_mode = self.base.training not in self._compared
            row_scale = row_scale.to(device, non_blocking=True)
            return self._compute(pack.to(device), row_scale, model=model, compare=new_mode, also=also)

    def _replayed(
        self, pack: Pack, row_scale: torch.Tensor, call: Any, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.graph_tokens is not None and len(pack) > self.graph_tokens:
            return None
        if self._cuda_graphs and self.graphs is None:
            base = self.base
            # a new recorder asks for the device: the model may have been moved
            self.graphs = PassGraphs(base, lambda: CudaRecorder(base.get_input_embeddings().weight.device), tolerance)
        if self.graphs is None or not isinstance(call, torch.nn.Module) or device.type not in GRAPHED:
            return None
        if _compiled(call) or uses_checkpointing(self.base) or is_sharded(self.base):
            return None
        return self.graphs(self._compute, pack, row_scale, call)

    def drop_graphs(self) -> None:
        """Release the memory of graphs, and capture no more."""
        self.graphs, self.graph_tokens = None, 0

    def _compute(
        self,
        pack: Pack,
        row_scale: torch.Tensor,
        *,
        model: Any = None,
        compare: bool = False,
        also: Also | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        base = self.base
        made: dict[str, torch.Tensor] = {}
        around: list[torch.Tensor] = []  # what the head's forward returned, and the model's logits

        # torch.compile traces what follows, which must not mention what is compiled
        total_of = model.total if isinstance(model, Caller) else None

        def head_forward(hidden: torch.Tensor) -> torch.Tensor:
            patching.check_rows(base, hidden.shape[1], len(pack.hidden_rows))
            # a sharded head is whole during its own call
            head = read_head(base)
            total = None if total_of is None else total_of(head.weight)
            made["loss"], made["logps"] = weighted_nll(
                hidden[0], head.weight, pack.targets, row_scale, pack.rows, **head.options(), head_total=total
            )
            if also is not None:
                made["loss"] = made["loss"] + also(hidden[0], head)
            if compare:
                around.append(hidden.detach().clone())  # a model may scale in place
            return hidden  # instead of logits, which nobody reads

        inner = base.forward

        def base_forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            out = inner(*args, **kwargs)
            if compare:
                around.append(getattr(out, "logits", out[0]).detach())
            return made  # wrappers must find the loss in the module's output

        call = base if model is None else model
        with ExitStack() as stack:
            stack.enter_context(patching.ONE_AT_A_TIME)
            stack.enter_context(patching.attention(base, ATTENTION))
            stack.enter_context(_checkpointing(base))
            stack.enter_context(patching.forward(base.get_output_embeddings(), head_forward))
            stack.enter_context(patching.forward(base, base_forward))
            if not _compiled(call) and not is_sharded(base):
                stack.enter_context(self._layers.replaced())
            out = call(
                input_ids=pack.input_ids[None],
                position_ids=pack.positions[None],
                use_cache=False,
                logits_to_keep=pack.hidden_rows,
                packed_segments=pack.segments,
            )
        if compare:
            check_logits(base, *around)
            self._compared.add(base.training)
        return out["loss"], out["logps"]

    def mean_nll(self, sequences: Sequence[Encoded], *, max_tokens: int = 8192, model: Any = None) -> torch.Tensor:
        """Return the mean cross-entropy of the sequences' trained tokens, as plain fine-tuning needs it."""
        count = sum(map(num_targets, sequences))
        losses = []
        for p in pack([[s] for s in sequences], max_tokens):
            scale = torch.full((len(p.targets),), 1 / count, dtype=torch.float32)
            losses.append(self(p, scale, model=model)[0])
        return torch.stack(losses).sum()

    def check(self, autocast_dtype: torch.dtype | None = None, *, model: Any = None) -> None:
        """Compare a pack's log-probs with those of the model's own forward pass, on random tokens.

        Later calls for the same `model` return at once, so that everyone who uses a pass may ask.

        Parameters
        ----------
        autocast_dtype : torch.dtype, optional
            By default the pass's own.
        model : callable, optional
            What will be called: the model as it is wrapped for training.

        Raises
        ------
        PMCError
            They differ by more than rounding; attention that is not recognised.
        """
        base, call = self.base, self.base if model is None else model
        autocast_dtype = autocast_dtype or self.autocast_dtype
        embeddings = base.get_input_embeddings().weight
        key = (call, vars(base).get("forward"), embeddings.device, embeddings.dtype, autocast_dtype)
        if key in self._checked:
            return
        generator = torch.Generator().manual_seed(0)
        with (
            patching.ONE_AT_A_TIME,  # for the plain forward, too
            torch.no_grad(),
            eval_mode(base),
            autocast(embeddings.device, autocast_dtype),
            own_errors(base),
        ):
            self._recognised = recognise(base)
            lengths = [5, 9, *self._recognised.wide]
            vocab = known_tokens(base)
            sequences = [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]
            packed = pack([[Encoded(ids, list(ids))] for ids in sequences], 2 * CHECKED)[0].to(embeddings.device)
            zeros = torch.zeros(len(packed.targets), device=embeddings.device)
            _, ours = self(packed, zeros, model=model)
            theirs = [plain_logps(call, torch.tensor([ids], device=ours.device))[0] for ids in sequences]
        torch.clear_autocast_cache()  # older torch keeps weights that it casts here, without their gradients
        apart = (torch.cat(theirs) - ours).abs()
        short = lengths[0] + lengths[1] - 2
        # separately, so that errors beyond a window do not vanish in the mean of all
        error = max(float(part.mean()) for part in (apart[:short], apart[short:][-8:]) if len(part))
        require_same_logps(base, "a packed pass does", error, autocast_dtype or embeddings.dtype)
        self._checked.append(key)


def _compiled(model: Any) -> bool:
    """Return whether torch.compile traces the model: it must see torch's own layers."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


@contextmanager
def _checkpointing(base: Any) -> Iterator[None]:
    """Let checkpointed layers use packed attention also when backward recomputes them."""
    with ExitStack() as stack:
        for layer in base.modules():
            if original := vars(layer).get("_gradient_checkpointing_func"):
                checkpoint = functools.partial(_checkpoint, base, original)
                stack.enter_context(patching.attribute(layer, "_gradient_checkpointing_func", checkpoint))
        yield


def _checkpoint(base: Any, original: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    def again(*inputs: Any) -> Any:
        with patching.attention(base, ATTENTION):
            return function(*inputs)

    return original(again, *args)
