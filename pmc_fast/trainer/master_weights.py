"""float32 masters of low-precision parameters, kept by the optimizer."""

from collections.abc import Callable
from typing import Any

import torch

LOW = (torch.bfloat16, torch.float16)


class MasterWeights(torch.optim.Optimizer):
    """An optimizer that steps float32 copies of its bfloat16 parameters and writes them back rounded.

    A bfloat16 weight has 8 significant bits: an update of less than 1/512 of the weight is lost, which at a learning
    rate of 1e-5 is nearly every one. The masters accumulate these updates (as in DeepSpeed's bf16 mode and apex O2).

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Without state: its parameters are replaced by the masters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # torch's __init__ is not called: it would create groups, but the wrapped optimizer has all state
        self.optimizer = optimizer
        self.pairs: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        for group in optimizer.param_groups:
            group["params"] = [self._master(p) for p in group["params"]]
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.dtype not in LOW:
            return parameter
        master = parameter.detach().float().requires_grad_()
        self.pairs.append((parameter, master))
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the masters with the parameters' gradients and write them back."""
        for parameter, master in self.pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        result = self.optimizer.step(closure)
        for parameter, master in self.pairs:
            parameter.copy_(master)
            master.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        for parameter, _ in self.pairs:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "masters": [m.detach() for _, m in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state  # new objects
        for (parameter, master), saved in zip(self.pairs, state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)
