"""sloth.kernels.common.launch: what an opaque operator launches again is what was compiled for such arguments."""

import ast
import inspect
import threading
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from common import DEVICE
from triton.tools.tensor_descriptor import TensorDescriptor

from sloth.kernels.common import launch as module
from sloth.kernels.common.ahead import compile_ahead, wait_for_kernels
from sloth.kernels.common.device import H100, pretending
from sloth.kernels.common.launch import launch_cached
from sloth.kernels.linear.lora_grad_b import _strip_kernel, _sum_kernel, compute_lora_grad_b
from sloth.kernels.linear.lowrank_gemm import _lowrank_gemm_kernel


class Parameter(NamedTuple):
    do_not_specialize: bool = False


class Kernel:
    """Compiled for the first launch of each kind; says what was compiled, and launched how. Its last number is any size."""

    params = (Parameter(), Parameter(), Parameter(True), Parameter())

    def __init__(self):
        self.compiled, self.launched = 0, []

    def warmup(self, *args, grid, **how):
        self.compiled += 1
        return Compiled(self)


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
        launch_cached(kernel, **given(operands=[operand]))
    assert kernel.compiled == 1
    assert [(grid, args[1:]) for grid, args in kernel.launched] == [((3, 1, 1), (5, 7, 16))] * 3
    assert kernel.launched[1][1][0] is y


@pytest.mark.parametrize(
    "other",
    [
        {"operands": [torch.zeros(64, dtype=torch.bfloat16)]},
        {"operands": [torch.zeros(64)[1:]]},
        {"operands": [TensorDescriptor(torch.zeros(8, 8), [8, 8], [8, 1], [4, 4])]},
        {"numbers": [1, 7]},
        {"numbers": [32, 7]},
        {"numbers": [5, 2**31]},
        {"constants": {"BLOCK": 32}},
        {"num_warps": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_is_compiled_for_itself(other):
    kernel = Kernel()
    for _ in range(2):
        for how in ({}, other):
            launch_cached(kernel, **given(**how))
    assert kernel.compiled == 2 and len(kernel.launched) == 4


def test_kernels_and_devices_are_told_apart(monkeypatch):
    first, second = Kernel(), Kernel()
    launch_cached(first, **given())
    launch_cached(second, **given())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch_cached(first, **given())
    assert (first.compiled, second.compiled) == (2, 1)


def test_sizes_that_are_others_in_every_step_are_one_kernel():
    kernel = Kernel()
    for n in range(1, 100):
        launch_cached(kernel, **given(grid=(n,), numbers=[5, n]))
    assert kernel.compiled == len(module._launchers) == 1
    assert [(grid[0], args[2]) for grid, args in kernel.launched] == [(n, n) for n in range(1, 100)]


@pytest.mark.parametrize(
    ("kernel", "names"),
    [(_strip_kernel, ["M"]), (_sum_kernel, ["u_size", "db_size"]), (_lowrank_gemm_kernel, ["M"])],
    ids=lambda k: getattr(k, "__name__", ""),
)
def test_rows_are_any_number(kernel, names):
    """Packed batches have another number of rows in every step: compiled for multiples of 16 they would be two kernels."""
    decorator, *_ = ast.parse(inspect.getsource(kernel.fn)).body[0].decorator_list  # the interpreter does not keep it
    (told,) = (ast.literal_eval(k.value) for k in decorator.keywords if k.arg == "do_not_specialize")
    assert set(names) <= set(told) <= set(inspect.signature(kernel.fn).parameters)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that compiles what it is told, and says what. Tensors of a CPU, and of "meta", are taken to be on it."""
    compiled = []
    monkeypatch.setattr(module, "_launcher_of", lambda kernel, *_: lambda *launched: compiled.append("launched"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    for kernel in (_strip_kernel, _sum_kernel, _lowrank_gemm_kernel):
        warmup = lambda *args, name=kernel.fn.__name__, **how: compiled.append(name)  # noqa: E731
        monkeypatch.setattr(kernel, "warmup", warmup, raising=False)
    monkeypatch.setattr(module, "InterpretedFunction", ())
    monkeypatch.setattr(module, "_any_sizes", {})
    monkeypatch.setattr(module, "_note_any_sizes", lambda kernel, operands: [False] * 9)
    with pretending(H100):
        yield compiled


def test_what_was_compiled_ahead_is_only_launched(gpu):
    """By a function that is called with tensors without memory, in a thread of its own."""
    compile_ahead(compute_lora_grad_b, torch.device("cpu"), meta(256, 512), meta(512, 16), meta(256, 16), 0.5)
    wait_for_kernels()
    assert gpu == ["_strip_kernel", "_sum_kernel"]
    g, b, t = (torch.randn(*s).bfloat16() for s in ((256, 512), (512, 16), (256, 16)))
    compute_lora_grad_b(g, b, t, 0.5)
    assert gpu[2:] == ["launched", "launched"]


def test_whoever_launches_first_waits(gpu):
    go, function = threading.Event(), compute_lora_grad_b
    slow = lambda *args: (go.wait(60), function(*args))  # noqa: E731
    compile_ahead(slow, torch.device("cpu"), meta(256, 512), meta(512, 16), meta(256, 16), 0.5)
    threading.Timer(0.2, go.set).start()
    function(*(torch.randn(*s).bfloat16() for s in ((256, 512), (512, 16), (256, 16))), 0.5)
    assert gpu == ["_strip_kernel", "_sum_kernel", "launched", "launched"]


def test_what_cannot_be_compiled_ahead_is_compiled_when_it_is_called(gpu):
    compile_ahead(compute_lora_grad_b, torch.device("cpu"), "no tensor")
    wait_for_kernels()
    compute_lora_grad_b(*(torch.randn(*s).bfloat16() for s in ((256, 512), (512, 16), (256, 16))), 0.5)
    assert gpu == ["_strip_kernel", "launched", "_sum_kernel", "launched"]


@pytest.mark.skipif(DEVICE != "cuda", reason="launches on a GPU")
def test_on_the_gpu():
    """Operators that launch this way, twice each, on operands of other addresses."""
    from sloth.kernels.linear.lora_grad_b import lora_grad_b

    for seed in (0, 1):
        g, b, t = (
            torch.randn(*size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            for size in ((40, 96), (96, 8), (40, 8))
        )
        u, db = lora_grad_b(g, b, t, 0.5)
        torch.testing.assert_close(u, 0.5 * g @ b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, 0.5 * g.t() @ t, rtol=1e-4, atol=1e-4)
    assert len(module._launchers) == 2  # the strips and their sums
