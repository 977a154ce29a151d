"""sloth.kernels.common.launch: what an opaque operator launches again is what was compiled for such arguments."""

import pytest
import torch
from common import DEVICE
from triton.tools.tensor_descriptor import TensorDescriptor

from sloth.kernels.common import launch as module
from sloth.kernels.common.launch import launch_opaque


class Kernel:
    """Compiled for the first launch of each kind; says what was compiled, and launched how."""

    def __init__(self):
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def compile_and_launch(*args, **how):
            self.compiled += 1
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))


@pytest.fixture(autouse=True)
def no_launchers_yet(monkeypatch):
    monkeypatch.setattr(module, "_launchers", {})
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def given(**other):
    how = {"grid": (3,), "operands": [torch.zeros(64)], "numbers": [5, 7], "constants": {"BLOCK": 16}, "num_warps": 4}
    return how | other


def test_what_is_compiled_is_launched_again():
    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(32)
    for operand in (x, y, x):
        launch_opaque(kernel, **given(operands=[operand]))
    assert kernel.compiled == 1
    assert [(grid, args[1:]) for grid, args in kernel.launched] == [((3, 1, 1), (5, 7, 16))] * 2
    assert kernel.launched[0][1][0] is y


@pytest.mark.parametrize(
    "other",
    [
        {"grid": (4,)},
        {"operands": [torch.zeros(64, dtype=torch.bfloat16)]},
        {"operands": [torch.zeros(64)[1:]]},
        {"operands": [TensorDescriptor(torch.zeros(8, 8), [8, 8], [8, 1], [4, 4])]},
        {"numbers": [5, 1]},
        {"constants": {"BLOCK": 32}},
        {"num_warps": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_is_compiled_for_itself(other):
    kernel = Kernel()
    for _ in range(2):
        for how in ({}, other):
            launch_opaque(kernel, **given(**how))
    assert kernel.compiled == len(kernel.launched) == 2


def test_kernels_and_devices_are_told_apart(monkeypatch):
    first, second = Kernel(), Kernel()
    launch_opaque(first, **given())
    launch_opaque(second, **given())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch_opaque(first, **given())
    assert (first.compiled, second.compiled) == (2, 1)


def test_sizes_that_are_others_in_every_step_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(module, "LAUNCHERS", 8)
    kernel = Kernel()
    for n in range(100):
        launch_opaque(kernel, **given(numbers=[n, 7]))
    assert kernel.compiled == 100 and len(module._launchers) <= 8


@pytest.mark.skipif(DEVICE != "cuda", reason="launches on a GPU")
def test_on_the_gpu():
    """Operators that launch this way, twice each, on operands of other addresses."""
    from sloth.kernels.linear.lora_grad_b import up_gradients

    for seed in (0, 1):
        g, b, t = (
            torch.randn(*size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            for size in ((40, 96), (96, 8), (40, 8))
        )
        u, db = up_gradients(g, b, t, 0.5)
        torch.testing.assert_close(u, 0.5 * g @ b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, 0.5 * g.t() @ t, rtol=1e-4, atol=1e-4)
    assert len(module._launchers) == 2  # the strips and their sums
