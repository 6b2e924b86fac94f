"""float32 masters of low-precision parameters, kept by the optimizer."""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import PMCError
from ..ops.adamw import ALIGNED, LOW, Settings, adamw, replaces_torchs

ODD = ("amsgrad", "maximize", "capturable", "differentiable")  # settings of Adam that our step does not have


class MasterWeights(torch.optim.Optimizer):
    """An optimizer that steps float32 copies of its bfloat16 parameters and writes them back rounded.

    A bfloat16 weight has 8 significant bits: an update of less than 1/512 of the weight is lost, which at a learning
    rate of 1e-5 is nearly every one. The masters accumulate these updates (as in DeepSpeed's bf16 mode and apex O2).

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Without state: its parameters are replaced by the masters.

    Notes
    -----
    torch's Adam and AdamW step in one pass that reads the bfloat16 gradient and writes the bfloat16 weight
    (`ops.adamw`): on CUDA, and on the CPU with fused=True, where the numbers are torch's. Any other optimizer steps
    float32 copies of the gradients, and so do Adam with one of the settings `ODD` and parameters that are sharded or
    not contiguous.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # torch's __init__ is not called: it would create groups, but the wrapped optimizer has all state
        self.optimizer = optimizer
        self.parameters: dict[torch.Tensor, torch.nn.Parameter] = {}  # by their masters
        for group in optimizer.param_groups:
            group["params"] = [self._master(p) for p in group["params"]]
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults

    def _master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.dtype not in LOW:
            return parameter
        master = parameter.detach().float().requires_grad_()
        self.parameters[master] = parameter
        return master

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step the masters with the parameters' gradients and write them back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = []
        for group in self.param_groups:
            others += self._step_at_once(group)
        for master in others:
            grad = self.parameters[master].grad
            assert grad is not None
            master.grad = grad.float()
            # torch's fused kernels go by memory
            if grad.layout == torch.strided and grad.stride() != master.stride():
                master.grad = torch.empty_like(master).copy_(grad)
        self.optimizer.step()  # also of parameters without masters
        for master in others:
            self.parameters[master].copy_(master)
            master.grad = None
        return loss

    def _step_at_once(self, group: dict[str, Any]) -> list[torch.Tensor]:
        """Step what `adamw` serves in a group; return the other masters."""
        known = type(self.optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        serves = known and not any(group[name] for name in ODD) and not isinstance(group["lr"], torch.Tensor)
        found: list[tuple[torch.Tensor, ...]] = []
        others = []
        for master in group["params"]:
            if (parameter := self.parameters.get(master)) is None or (grad := parameter.grad) is None:
                continue
            if not (serves and _plain(parameter, grad) and replaces_torchs(master.device.type, group["fused"])):
                others.append(master)
                continue
            state = self.state[master]
            if not state:
                state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(master)}
                state["exp_avg_sq"] = torch.zeros_like(master)
            if state["step"].device.type != "cpu":  # where load_state_dict of a fused optimizer puts it
                state["step"] = state["step"].cpu()
            found.append((state["step"], grad.contiguous(), master, state["exp_avg"], state["exp_avg_sq"], parameter))
        if found:
            steps = [step for step, *_ in found]
            torch._foreach_add_(steps, 1)
            how = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            how["decoupled"] = group["decoupled_weight_decay"]
            numbers = torch.stack(steps).tolist()
            for number in sorted(set(numbers)):  # a parameter may have had no gradient in some steps
                stepped = [tensors for n, (_, *tensors) in zip(numbers, found, strict=True) if n == number]
                adamw(*zip(*stepped, strict=True), settings=Settings(int(number), **how))
        return others

    @torch.no_grad()
    def unround(self) -> None:
        """Make the masters the parameters' values, in float32. The optimizer can't step afterwards.

        Raises
        ------
        PMCError
            The parameters are not the masters rounded: a checkpoint was loaded into them, or they were set, since.
        """
        if not all(torch.equal(p, master.to(p.dtype)) for master, p in self.parameters.items()):
            raise PMCError(
                "the model's weights are not those that the optimizer has masters of (load_best_model_at_end loads other "
                "ones): they can't be had in float32"
            )
        for master, parameter in self.parameters.items():
            parameter.grad = None
            parameter.data = master.detach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)
        for parameter in self.parameters.values():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "masters": [m.detach() for m in self.parameters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state  # new objects
        for (master, parameter), saved in zip(self.parameters.items(), state_dict["masters"], strict=True):
            master.copy_(saved)
            parameter.copy_(master)


def _plain(parameter: torch.nn.Parameter, grad: torch.Tensor) -> bool:
    """Return whether a parameter is whole, dense, contiguous and aligned, with a gradient of its dtype."""
    whole = type(parameter) in (torch.nn.Parameter, torch.Tensor) and parameter.is_contiguous()
    dense = grad.layout == torch.strided and grad.dtype == parameter.dtype
    return whole and dense and parameter.data_ptr() % ALIGNED == 0
