"""A function of tensors at fixed places as one CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sloth.compat.dispatch import clear_workspaces


class CudaCapture:
    """Graphs of one device that share memory for what they compute on the way: they run one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
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
            clear_workspaces()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=_stream(self.device), capture_error_mode="thread_local"):
                    results = function()
            except BaseException:
                self._graphs.clear()  # the allocator may still record for that pool: the next capture has another
                raise
            finally:
                clear_workspaces()  # those of the capture lie in the pool, and would outlive its graphs
        self._graphs.add(graph)
        return graph.replay, results


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """For captures: torch's own is one for the process, on the device of the first."""
    return torch.cuda.Stream(device)


def capture_for(device: torch.device) -> CudaCapture | None:
    """None where there are no CUDA graphs."""
    return CudaCapture(device) if device.type == "cuda" else None
