"""A model with a stack's requests in its weights: trained for the next request, asked in verifications, kept between."""

from collections.abc import Callable
from typing import Any

from ..config import RequestConfig
from ..jobs.held import Held
from ..models.packed_forward import causal_lm
from ..utils.files import FileHashes
from . import adapters
from .exact import exact_model, round_into
from .stack import ErasureRequest, Stack


def attached(c: RequestConfig, model: Any, number: int) -> Any:
    """Return PEFT's model around `model` with the adapter of request `number` of a stack."""
    return adapters.attach(model, r=c.lora_r, alpha=c.lora_alpha, targets=c.lora_target, seed=c.seed + number)


class StackedModel:
    """A loaded model whose weights follow a stack.

    A run of its own has one and leaves it behind. A worker keeps one: after a request its weights are those that the next
    one begins with, bit for bit, and its adapter's memory is used again.

    Parameters
    ----------
    held : Held, optional
        The model, and what was made for it.
    """

    def __init__(self, held: Held | None = None) -> None:
        self.held = held or Held()
        self.hashes = FileHashes()  # of the stack's files
        self._forget()

    def _forget(self) -> None:
        self.exact: Any = None  # the model with float32 weights, which may be the loaded one
        self.base = ""  # hash of the weights without any request
        self._adapter: Any = None  # settings of the adapter that is attached
        self.training = False  # since its adapter is a new request's

    def drop(self) -> None:
        """Forget the model, whatever its weights are now; the next run loads it again."""
        self._forget()
        self.held.drop()

    def require(self, stack: Stack, dtype: str, param_dtype: str) -> None:
        """Drop the model unless it is at the state of `stack`: its weights, which are read for it, have the last hash.

        It is also dropped after a run that failed, and if it was loaded with other dtypes.
        """
        same = self.held.reusable and not self.training and self.held.precision == (dtype, param_dtype)
        if self.exact is None or not same or self._hash() != (stack.weights if stack.requests else self.base):
            self.drop()

    def _hash(self) -> str:
        return adapters.bare_hash(self.exact)

    def follow(self, stack: Stack, source: str, before: Callable[[ErasureRequest], None] | None = None) -> str:
        """Bring a model that was just loaded to the state of `stack`; return the hash of its weights.

        Parameters
        ----------
        stack : Stack
            If the model was not just loaded, that of `require`.
        source : str
            Of the model.
        before : callable, optional
            Called with each request whose adapter is merged, before that.
        """
        loaded = self.held.loaded
        assert loaded is not None
        if self.exact is not None:
            return stack.weights if stack.requests else self.base
        self.exact = exact_model(loaded, source)

        def ask(request: ErasureRequest) -> None:
            if before is not None:
                round_into(loaded.model, self.exact)
                before(request)

        weights = stack.apply(self.exact, ask, loaded.model.device)
        self.base = stack.requests[0].record["model"]["before"] if stack.requests else weights
        round_into(loaded.model, self.exact)
        return weights

    def attach(self, c: RequestConfig, number: int) -> None:
        """Let the loaded model have a new adapter for request `number`, where it can in the memory of the last one."""
        loaded = self.held.loaded
        assert loaded is not None
        self.training = True
        settings = (c.lora_r, c.lora_alpha, c.lora_target)
        if settings == self._adapter:
            adapters.renew(loaded.model, seed=c.seed + number)
            return
        if self._adapter is not None:
            loaded.model = loaded.model.unload()
        loaded.model = attached(c, loaded.model, number)
        self._adapter = settings

    def absorb(self) -> tuple[adapters.Adapter, str]:
        """Merge the trained adapter into the weights; return it and their hash.

        The adapter stays attached and changes nothing: the model computes with the merged weights.
        """
        loaded = self.held.loaded
        assert loaded is not None
        adapter = adapters.extract(loaded.model)
        adapters.merge(self.exact, adapter, loaded.model.device)
        round_into(causal_lm(loaded.model), self.exact)
        adapters.clear(loaded.model)
        return adapter, self._hash()
