"""The kernel, on a CPU through Triton's interpreter, beside its formula; and without a kernel, sums along rows and columns."""

from unittest import mock

import pytest
import torch
from common import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from sloth.kernels.common import fingerprint as module
from sloth.kernels.common.device import Device, pretending

VIEWS = [lambda t: t, lambda t: t.t(), lambda t: t[:, 1:], lambda t: t[::2], lambda t: t.flatten()[1:], lambda t: t[:3, :1]]


def formula(words: torch.Tensor, parts: int) -> torch.Tensor:
    """Block by block to the parts in turn, in Python's integers, modulo 2⁶⁴."""
    found = [0] * parts
    for i, word in enumerate(words.tolist()):
        k = i * module.GOLDEN
        k = (k + 2**63) % 2**64 - 2**63
        k = (k ^ (k >> 29)) * module.MIXER
        found[i // module.BLOCK % parts] += word * (k | 1)
    return torch.tensor([(n + 2**63) % 2**64 - 2**63 for n in found])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_its_formula(view, dtype):
    x = view(torch.randn(9, 1301, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype))
    with (
        pretending(Device(triton=True, multiprocessors=1), DEVICE), mock.patch.object(module, "PROGRAMS", 3),
        mock.patch.object(module, "launch_cached", wraps=module.launch_cached) as launched,
    ):  # fmt: skip
        found = module.fingerprint(x)
    assert launched.call_count == 1 and found.shape == (3,)
    torch.testing.assert_close(found.cpu(), formula(module._words(x), 3), rtol=0, atol=0)


CHANGES = [
    lambda t: t[5, 3:4].add_(1), lambda t: t[-1, -1:].add_(1), lambda t: t[1:3].copy_(t[1:3].flip(0)),
    lambda t: t.copy_(t.flip(0)), lambda t: t.copy_(t.flip(1)), lambda t: t[2, 10:12].copy_(t[2, 10:12].flip(0)),
    lambda t: t.neg_(), lambda t: t.mul_(2),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 1024), (37, 1301), (256, 48)], ids=str)
def test_sums_see_what_changes(change, dtype, size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = module.fingerprint(x)
    assert torch.equal(before, module.fingerprint(x.clone())) and before.nbytes < 16 * module.COLUMNS + x.nbytes // 500
    change(x)
    assert not torch.equal(before, module.fingerprint(x))


def test_what_is_traced_is_not_kept():
    """DDP's optimizer runs each part of a graph on fake tensors first: its numbers must not be those of the parts that run."""
    x = torch.arange(6, dtype=torch.float32)
    module._kept_keys.cache_clear()
    with FakeTensorMode() as mode:
        module.fingerprint(mode.from_tensor(x))
    of = module.fingerprint
    assert torch.equal(of(x), of(x.clone())) and not torch.equal(of(x), of(x + 1))
