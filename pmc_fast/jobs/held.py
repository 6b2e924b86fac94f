"""What a run loads and allocates: made once, and kept for the next run where somebody keeps it."""

import copy
from dataclasses import dataclass
from typing import Any

import torch

from ..models import loading
from ..models.context import release_memory
from ..models.packed_forward import PackedPass, causal_lm
from ..rollout import RolloutEngine
from .memory import Choice
from .progress import Stages

SIMPLE = (type(None), bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of a model before its weights are loaded."""

    tokenizer: Any
    parameters: int
    dtype: torch.dtype  # of its checkpoint

    @classmethod
    def read(cls, model: str, device: str) -> "Source":
        """Load the tokenizer and refuse a model that can't be loaded or trained."""
        return cls(loading.load_tokenizer(model), *loading.check_source(model, device))


class Held:
    """A model, its tokenizer, rollout engine and packed pass, each made when it is first asked for.

    A run of its own has one and leaves it behind. A worker gives the same one to all runs of its model, so that nothing is
    loaded, checked or captured twice.

    Parameters
    ----------
    hashed : bool
        Compute the hash of the model as it was loaded, which a run's report names.
    """

    def __init__(self, *, hashed: bool = True) -> None:
        self.source: Source | None = None
        self.loaded: loading.LoadedModel | None = None
        self._hashed = hashed
        self.drop()

    def drop(self) -> None:
        """Forget the model and all that was made for it; the next run loads it again."""
        device = None if self.loaded is None else self.loaded.model.device
        self.loaded = None
        self.weights = ""  # hash of the model as it was loaded
        self.precision = ("", "")  # the dtype and param_dtype that it was loaded with
        self.reusable = True  # False: a later run would not compute as one that loads its own
        self.engine: RolloutEngine | None = None
        self.packed: PackedPass | None = None
        self._pool_tokens: int | None = None
        self._key: tuple[Any, ...] = ()
        self._settings: tuple[dict[str, Any], ...] = ()
        if device is not None:
            release_memory(device)

    def read(self, model: str, device: str) -> Source:
        """Return what is known of a model before its weights are loaded."""
        if self.source is None:
            self.source = Source.read(model, device)
        return self.source

    def load(
        self, model: str, device: str, dtype: str, param_dtype: loading.ParamDtype, stages: Stages
    ) -> loading.LoadedModel:
        """Return the model. Of what an earlier run did to it, all but the weights and adapters is undone."""
        if self.loaded is not None:
            self._restore(self.loaded.model)
            return self.loaded
        with stages("loading the model"):
            loaded = loading.load_model(
                model, device=loading.resolve_device(device), dtype=dtype, param_dtype=param_dtype
            )
            loading.check_fit(loaded.model, self.read(model, device).tokenizer, model)
            if self._hashed:
                self.weights = loading.weights_hash(loaded.model, torch.float32)
        self.loaded, self.precision = loaded, (dtype, param_dtype)
        self._settings = tuple(_settings(config) for config in _configs(loaded.model))
        return loaded

    def _restore(self, model: Any) -> None:
        """Undo what transformers' and accelerate's trainers set: special tokens of a config, a forward under autocast."""
        for config, settings in zip(_configs(causal_lm(model)), self._settings, strict=True):
            vars(config).update(copy.deepcopy(settings))
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        model.eval()

    def passes(self, choice: Choice) -> tuple[RolloutEngine, PackedPass]:
        """Return an engine and a packed pass of the loaded model, bounded as chosen; the last ones where they serve."""
        assert self.loaded is not None
        loaded = self.loaded
        how: dict[str, Any] = {"autocast_dtype": loaded.autocast_dtype, "cuda_graphs": choice.cuda_graphs}
        key = loaded.model, *how.values()
        engine, packed = self.engine, self.packed
        same = bool(self._key) and all(a is b for a, b in zip(key, self._key, strict=True))
        # a rollout that does not fit the memory lowers an engine's limit
        if engine is None or packed is None or not same or engine.pool_tokens != self._pool_tokens:
            engine = RolloutEngine(loaded.model, **how)
            packed = PackedPass(causal_lm(loaded.model), **how)
        engine.pool_tokens = self._pool_tokens = choice.pool_tokens
        packed.graph_tokens = choice.graph_tokens
        self._key, self.engine, self.packed = key, engine, packed
        return engine, packed

    def drop_passes(self) -> None:
        """Release the memory of the engine and the packed pass; the next ones are new."""
        if self.engine is not None and self.packed is not None:
            self.engine.release()
            self.packed.drop_graphs()
        self.engine = self.packed = None
        if self.loaded is not None:
            release_memory(self.loaded.model.device)


def _settings(config: Any) -> dict[str, Any]:
    """Return copies of a config's settings, without configs within it."""
    return {name: copy.deepcopy(v) for name, v in vars(config).items() if isinstance(v, (*SIMPLE, list))}


def _configs(base: Any) -> list[Any]:
    """Return the configs of a model that training may write to."""
    text = base.config.get_text_config()
    configs = [base.config, *([] if text is base.config else [text])]
    return [*configs, *([base.generation_config] if base.generation_config is not None else [])]
