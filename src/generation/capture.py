"""A function of tensors at fixed places as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaCapture:
    """Graphs that share memory for what they compute on the way: they run one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What runs it, and its results, which each run writes anew. Nothing is computed yet. Raises what cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function()
        return graph.replay, results


def capture_for(device: torch.device) -> CudaCapture | None:
    """None where there are no CUDA graphs."""
    return CudaCapture(device) if device.type == "cuda" else None
