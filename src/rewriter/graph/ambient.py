"""Which autocast is on: as a value that can be compared, kept with what was traced under it, and entered again.

Autocast leaves no node where it is ambient, and `_enter_autocast … _exit_autocast` where the model, or accelerate around its
`forward`, enters it inside of the traced graph. The body of a checkpoint below such a block has no node that says so. What counts
is the state: an `Autocast` says for each device type that is cast for, to which dtype. A block that changes nothing is no change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

Autocast = tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) of those that autocast is on for, sorted
OFF: Autocast = ()
KINDS = ("cpu", "cuda", "mps", "xpu")


def current() -> Autocast:
    """The state of this thread."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in KINDS if torch.is_autocast_enabled(kind))


def dtypes() -> str:
    """For a key: what this thread casts to on each kind of device, where autocast is on or is turned on without a dtype."""
    kinds = ((kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in KINDS)
    return ",".join(f"{kind}:{str(dtype).removeprefix('torch.')}{'+' * on}" for kind, dtype, on in kinds)


def dtype_of(autocast: Autocast, kind: str) -> torch.dtype | None:
    """What it casts to on devices of this kind; None where it is off."""
    return dict(autocast).get(kind)


def under(autocast: Autocast) -> AbstractContextManager[None]:
    """A context in which this state is the current one."""
    return nullcontext() if autocast == current() else _entered(autocast)


@contextmanager
def _entered(autocast: Autocast) -> Iterator[None]:
    wanted = dict(autocast)
    with ExitStack() as stack:
        for kind in wanted.keys() | dict(current()).keys():
            stack.enter_context(torch.autocast(kind, wanted.get(kind), enabled=kind in wanted))
        yield
