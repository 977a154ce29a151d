"""A function of tensors at fixed places as one CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class CudaCapture:
    """Graphs of one device that share memory for what they compute on the way: they run one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)  # torch's own is one for the process, on the device of the first capture
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What runs it, and its results, which each run writes anew. Nothing is computed yet. Raises what cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        # A pool ends with its last graph, though blocks of it may live: it takes no other then.
        living = next(iter(self._graphs), None)
        pool = torch.cuda.graph_pool_handle() if living is None else living.pool()
        # The stream is set to what it is: a capture that fails does not set it back.
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                results = function()
        self._graphs.add(graph)
        return graph.replay, results


def capture_for(device: torch.device) -> CudaCapture | None:
    """None where there are no CUDA graphs."""
    return CudaCapture(device) if device.type == "cuda" else None
