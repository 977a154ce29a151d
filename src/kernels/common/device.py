"""What a device can do. Whatever depends on it is asked here, so that a test can say what there is: on a machine without a GPU,
the graphs that a GPU would get are traced with tensors of a CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from sloth.kernels.common.language import THERE


@dataclass(frozen=True)
class Device:
    """triton: kernels run there. ptx: they may hold some. shared_memory: bytes that one program may take, None where that is no
    limit. hopper: it has wgmma and TMA. roomy: it is worth more memory to have larger products.
    """

    triton: bool = False
    ptx: bool = False
    multiprocessors: int = 2  # of Triton's interpreter on a CPU: a small number
    shared_memory: int | None = None
    hopper: bool = False
    roomy: bool = False


H100 = Device(triton=True, ptx=True, multiprocessors=132, shared_memory=232_448, hopper=True, roomy=True)
_pretended: dict[str, Device] = {}  # by type
_ahead = threading.local()  # device: for which this thread compiles kernels with tensors of "meta"


def device_of(device: torch.device) -> Device:
    if device.type == "meta":
        device = compiled_for() or device
    return _pretended.get(device.type) or _found(device)


def compiled_for() -> torch.device | None:
    """The device for which this thread compiles kernels instead of launching them, if it does."""
    return getattr(_ahead, "device", None)


@contextmanager
def standing_in(device: torch.device) -> Iterator[None]:
    """Meanwhile, in this thread, tensors of "meta" stand for those of the device, and kernels are compiled, not launched."""
    _ahead.device = device
    try:
        yield
    finally:
        _ahead.device = None


@contextmanager
def pretending(device: Device, kind: str = "cpu") -> Iterator[None]:
    """Meanwhile, tensors on devices of this type are taken to be on this one."""
    before = dict(_pretended)
    _pretended[kind] = device
    try:
        yield
    finally:
        _pretended.clear()
        _pretended.update(before)


@cache
def _found(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device()
    if not torch.cuda.is_available():  # of a fake tensor
        return Device(triton=THERE, roomy=True)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        triton=THERE,
        ptx=THERE and torch.version.hip is None,
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0),
        hopper=THERE and torch.version.hip is None and properties.major == 9,
        roomy=True,
    )
