"""What stands in for CUDA graphs on the CPU: operations that are recorded with the tensors they had, and run again.

As a graph does, it computes nothing while it is captured, runs no Python when it is replayed, and keeps the numbers and the
places that it was captured with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """Every ATen call, and the tensors that were there before and are written."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    storage = t.untyped_storage()
                    if storage.data_ptr() not in self.made:
                        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self.made |= {t.untyped_storage().data_ptr() for t in results} - inputs
        self.calls.append((func, args, kwargs, results))
        return out


class StandIn:
    """In place of CudaCapture. captured: how many graphs there are; replayed: how often they ran."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Recorded() as recorded:
            out = function()
        for storage, was in recorded.before.values():
            storage.copy_(was)
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, results in recorded.calls:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for place, value in zip(results, again, strict=True):
                    if place.data_ptr() != value.data_ptr() and place.numel():
                        place.copy_(value)

        return replay, out


@contextmanager
def steps_replayed(monkeypatch: Any) -> Iterator[StandIn]:
    """Models on the CPU get this capture from `for_inference`."""
    from sloth.generation import session

    stand_in = StandIn()
    monkeypatch.setattr(session, "capture_for", lambda device: stand_in)
    yield stand_in
