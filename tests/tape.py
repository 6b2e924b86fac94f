"""A recorder for the CPU: what it captures it replays on the same memory, as a CUDA graph does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pmc_fast.cuda_graphs.recorder import syncs_with_host


class Tape(TorchDispatchMode):
    """Captures as a CUDA graph does: operations with the memory that they read and write, and nothing else.

    A replay runs them on that memory. It does not see that a weight has moved since, that a module was
    switched off, or what Python would do today.
    """

    watch = staticmethod(lambda tape: pytest.MonkeyPatch())

    def __init__(self):
        super().__init__()
        self.calls, self.fault = [], 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if syncs_with_host(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def record(self, compute):
        compute()  # as the real one does, to find out whether it can be captured
        tape = type(self)()
        patch = self.watch(tape)
        try:
            with tape:
                out = compute()
        finally:
            patch.undo()
        out.fill_(torch.nan)  # a capture computes nothing yet

        def replay():
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for func, args, kwargs, before in tape.calls:
                    now = func(*args, **kwargs)
                    for new, old in zip(
                        *([x] if isinstance(x, torch.Tensor) else x for x in (now, before)), strict=True
                    ):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)
                out.add_(self.fault)

        return replay
