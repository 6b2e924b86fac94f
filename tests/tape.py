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

    def record(self, *parts):
        for compute in parts:
            compute()  # as the real one does, to find out whether it can be captured
        return [self._capture(compute) for compute in parts]

    def _capture(self, compute):
        tape = type(self)()
        patch = self.watch(tape)
        try:
            with tape:
                out = compute()
        finally:
            patch.undo()
        if out is not None:
            out.fill_(torch.nan if out.is_floating_point() else -1)  # a capture computes nothing yet

        def replay():
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for func, args, kwargs, before in tape.calls:
                    now = func(*args, **kwargs)
                    for new, old in zip(*(tensors(x) for x in (now, before)), strict=True):
                        if new.data_ptr() != old.data_ptr():  # a view, of a weight say, has not changed
                            old.copy_(new)
                if out is not None and out.is_floating_point():
                    out.add_(self.fault)

        return replay


def tensors(results):
    """Return the tensors that an operation returned."""
    several = results if isinstance(results, (tuple, list)) else [results]
    return [x for x in several if isinstance(x, torch.Tensor)]
