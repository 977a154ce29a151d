"""What an operator does behind its back: the kernels it launches, the operators it calls, the tensors it saves."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from common import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from sloth.kernels.common.device import device_of, pretending


@contextmanager
def interpret(on: bool = True):
    """Operators take their Triton kernels, on the CPU through Triton's interpreter."""
    with pretending(replace(device_of(torch.device(DEVICE)), triton=True), DEVICE) if on else nullcontext():
        yield


class Recorder(TorchDispatchMode):
    """Records the calls of sloth's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sloth":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    def named(self, name: str) -> list[tuple]:
        """Arguments of each call of sloth::name."""
        return [args for called, args in self.calls if called == name]


@contextmanager
def saved():
    """The list of tensors that autograd saves within."""
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
