"""The inputs of layers wait in host memory until their backward pass (`options={"sloth.checkpoint_offload": True}`).

Of a checkpointed layer autograd keeps the input, and of all layers together these are most of what a step needs beyond the model.
When a layer has run, its input is copied to pinned memory on a stream beside, and the device's memory is given back once the next
layer has run too. In the backward pass it is brought back before the layer needs it, while the layer behind it computes. So there
are two or three of them on the device, however many layers there are.

    forward    layer i computes | copy x_i to the host          backward   layer i computes | copy x_{i-1} to the device
               layer i+1 computes; x_i's memory is given back              layer i-1 computes

The tensor itself stays where it is: only its memory goes and comes back, with the same bytes, so that autograd's graph, versions
and saved tensors know nothing of it. Only what a single layer reads, and nobody outside of the graph, may go.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import saved_tensors_hooks
from sloth.rewriter.notices import log

# Pinned memory is made at about a GiB a second, and then kept by torch. In blocks of one size what was made for one length of
# the texts serves every other.
BLOCK = 16 * 2**20


def inputs_that_leave(regions: Sequence[Any], sharing: Callable[[fx.Node], set[fx.Node]]) -> dict[int, fx.Node]:
    """By the number of a region of the graph, what may leave the device when it has run: made by an earlier region, read by this
    one alone, and nothing that other regions or the caller see lies in its memory. What made it gives nothing else that has a
    gradient: its backward pass might be gone through alone, and it may have saved what it gave. The last two, of the last layer
    and of what follows it, stay: their backward passes are next.

    sharing: all nodes of the graph that lie in the memory of one.
    """
    made_in = {n: i for i, region in enumerate(regions) for n in region.calls}
    seen = {n for region in regions for n in (*region.outputs, *(a for a in region.inputs if a not in made_in))}
    alone = {n for region in regions for n in region.outputs if [m for m in region.outputs if _has_gradient(m)] == [n]}
    found: dict[int, fx.Node] = {}
    for i, region in enumerate(regions):
        for n in region.inputs:
            if n in alone and all(made_in.get(u) == i for u in n.users) and seen & sharing(n) == {n}:
                found[i] = n
    return dict(list(found.items())[:-2])


def make_host_memory(inputs: Sequence[torch.Tensor]) -> None:
    """A thread makes what these (fakes) will need, and as much again for longer texts, while the graph is compiled."""
    sizes = [x.itemsize * math.prod(map(_hint, x.shape)) for x in inputs if is_on_gpu(x)]
    count = 2 * sum(math.ceil(n / BLOCK) for n in sizes if n > BLOCK // 2)

    def make() -> None:
        try:
            blocks = _host_memory(count * BLOCK, True)
            log.debug("sloth: %d blocks of host memory are made", len(blocks))  # and kept by torch, when nobody holds them
        except RuntimeError as e:  # a limit of the machine: whoever needs the memory is told
            log.debug("sloth: host memory is not made ahead: %s", e)

    if count:
        threading.Thread(target=make, name="sloth-host-memory", daemon=True).start()


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else 0


def _host_memory(nbytes: int, pinned: bool) -> list[torch.Tensor]:
    """Of at least so many bytes, together."""
    sizes = [BLOCK] * math.ceil(nbytes / BLOCK) if nbytes > BLOCK // 2 else [nbytes]
    return [torch.empty(n, dtype=torch.uint8, pin_memory=pinned) for n in sizes]


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _has_gradient(n: fx.Node) -> bool:
    value = n.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def is_on_gpu(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_cuda


def _is_whole(x: torch.Tensor) -> bool:
    """Does it fill its memory, which can be given back?"""
    memory = x.untyped_storage()
    return memory.resizable() and x.storage_offset() == 0 and memory.nbytes() == x.numel() * x.itemsize > 0


def _is_watched() -> bool:
    """Do others keep what autograd saves (a checkpoint around the graph, which hands it to another backward pass), or record what
    the device does?
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return capturing or saved_tensors_hooks(False) is not None


class HostCopy:
    """The input of one layer: on the device, in the host's memory, or on its way. before: that of the layer before."""

    def __init__(self, x: torch.Tensor, before: HostCopy | None):
        self.memory: torch.Tensor | None  # flat, with a version of its own; none once all is done
        self.memory = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
        self.nbytes, self.before = x.untyped_storage().nbytes(), before
        self.beside = _stream_beside(x.device) if x.is_cuda else None
        self.host = _host_memory(self.nbytes, x.is_cuda)
        self.done = self._copy(out=True)
        self.is_away = False

    def _copy(self, out: bool) -> torch.cuda.Event | None:
        """To the host's memory, or back. When it is done: to be waited for by whoever reads it, or gives the source away."""
        pairs = [(b[: len(m)], m) for b, m in zip(self.host, self.memory.split(BLOCK), strict=True)]
        if self.beside is None:
            for block, memory in pairs:
                block.copy_(memory) if out else memory.copy_(block)
            return None
        self.beside.wait_stream(torch.cuda.current_stream(self.beside.device))
        with torch.cuda.stream(self.beside):
            for block, memory in pairs:
                block.copy_(memory, non_blocking=True) if out else memory.copy_(block, non_blocking=True)
        return self.beside.record_event()

    def _wait(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream(self.beside.device).wait_event(self.done)
            self.done = None

    def leave(self) -> None:
        """Give the device's memory back."""
        self._wait()
        self.memory.untyped_storage().resize_(0)
        self.is_away = True

    def fetch(self) -> None:
        """Start to bring it back, if it is away."""
        if not self.is_away:
            return
        self.memory.untyped_storage().resize_(self.nbytes)
        self.done = self._copy(out=False)
        if self.beside is not None:
            self.memory.record_stream(self.beside)  # if all of it is dropped before the copy is done
        self.host, self.is_away = [], False

    def arrive(self, *_: Any) -> None:
        """Now it is needed, and the one before it next. A hook of gradients: it returns none."""
        self.fetch()
        self._wait()
        if self.before is not None:
            self.before.fetch()
        self.memory = self.before = None  # autograd may let it go as soon as the layer is done


class HostCopies:
    """Those of one forward pass."""

    def __init__(self) -> None:
        self.last: HostCopy | None = None

    def take(self, x: torch.Tensor, results: Sequence[Any]) -> None:
        """The input of a layer that has given these results, and will be needed when their gradients are there."""
        wanted = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        if not wanted or not is_on_gpu(x) or not _is_whole(x) or _is_watched():
            return
        copy = HostCopy(x, self.last)
        for r in wanted:
            r.register_hook(copy.arrive)
        self.close()
        self.last = copy

    def close(self) -> None:
        """The one that was taken last, by now copied, leaves."""
        if self.last is not None:
            self.last.leave()
