"""sloth.kernels.common.launch: what an opaque operator launches again is what was compiled for such arguments."""

import ast
import gc
import inspect
import logging
import threading
from concurrent.futures import wait
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from common import DEVICE
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from sloth.compat.triton import launch_of
from sloth.kernels import rms_norm
from sloth.kernels.common import ahead, faults
from sloth.kernels.common import launch as module
from sloth.kernels.common.ahead import compile_ahead
from sloth.kernels.common.device import H100, pretending
from sloth.kernels.common.launch import launch_cached
from sloth.kernels.linear.lora_grad_b import _strip_kernel, _sum_kernel, compute_lora_grad_b
from sloth.kernels.linear.lowrank_gemm import _lowrank_gemm_kernel
from sloth.rewriter.match.registry import deferrals, patterns


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
    monkeypatch.setattr(module, "_compiled", {})
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


def test_a_launch_keeps_its_kernel_loaded():
    """torch's launcher unloads what it loaded when it goes."""
    calls, unloaded = [], []

    class Static:
        function, num_warps, shared, arg_tys = 17, 4, 128, "OOi"
        has_global_scratch, has_profile_scratch = None, 1

        class C_impl:
            _launch_kernel = staticmethod(lambda *args: calls.append(args))

        def __del__(self):
            unloaded.append(self)

    run = launch_of(Static())
    gc.collect()
    run(1, 2, 3, 0, "x", "y", 5)
    assert not unloaded and calls == [(17, 1, 2, 3, 4, 128, "OOiO", ("x", "y", 5, None), 0)]
    del run
    gc.collect()
    assert len(unloaded) == 1


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


def wait_for_kernels():
    """Until all that was asked for is compiled."""
    wait(list(ahead._jobs))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


GBT = tuple(torch.randn(*s, generator=torch.Generator().manual_seed(0)).bfloat16() for s in ((256, 512), (512, 16), (256, 16)))
GIVEN = [GBT[0]], [GBT[1]], GBT[2], [0.5]


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that compiles what it is told, and says what. Tensors of a CPU, and of "meta", are taken to be on it."""
    compiled = []
    monkeypatch.setattr(module, "_launcher_of", lambda kernel, *_: lambda *launched: compiled.append("launched"))
    monkeypatch.setattr(module, "_prepare_launcher", lambda kernel: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
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
    compile_ahead(compute_lora_grad_b, torch.device("cpu"), [meta(256, 512)], [meta(512, 16)], meta(256, 16), [0.5])
    wait_for_kernels()
    assert gpu == ["_strip_kernel", "_sum_kernel"]
    compute_lora_grad_b(*GIVEN)
    assert gpu[2:] == ["launched", "launched"]


def test_a_kernel_that_is_being_compiled_is_waited_for_and_no_other(gpu, monkeypatch):
    """Each is compiled once: the first by the thread that was at it, the second by whoever came to need it."""
    begun, go, function = threading.Event(), threading.Event(), compute_lora_grad_b

    def slowly(*args, **how):
        begun.set()
        assert go.wait(60)
        gpu.append("_strip_kernel")

    monkeypatch.setattr(_strip_kernel, "warmup", slowly)
    compile_ahead(function, torch.device("cpu"), [meta(256, 512)], [meta(512, 16)], meta(256, 16), [0.5])
    assert begun.wait(60)
    threading.Timer(0.2, go.set).start()
    function(*GIVEN)
    wait_for_kernels()
    assert sorted(gpu) == ["_strip_kernel", "_sum_kernel", "launched", "launched"] and gpu[0] == "_strip_kernel"


def test_what_is_compiled_ahead_is_loaded_by_whoever_launches_it(gpu, monkeypatch):
    """Another thread may be recording a CUDA graph, which loading would break."""
    loading = []
    monkeypatch.setattr(module, "_launcher_of", lambda *_: loading.append(threading.current_thread()) or (lambda *launched: None))
    compile_ahead(compute_lora_grad_b, torch.device("cpu"), [meta(256, 512)], [meta(512, 16)], meta(256, 16), [0.5])
    wait_for_kernels()
    assert len(gpu) == 2 and not loading
    compute_lora_grad_b(*GIVEN)
    assert loading == [threading.current_thread()] * 2 and len(gpu) == 2


def test_a_process_that_ends_compiles_nothing_more(gpu, monkeypatch):
    """Python waits for its threads."""
    over = SimpleNamespace(is_alive=lambda: False)

    def ends(*args, **how):
        gpu.append("_strip_kernel")
        monkeypatch.setattr(threading, "main_thread", lambda: over)

    monkeypatch.setattr(_strip_kernel, "warmup", ends)
    for _ in range(2):
        compile_ahead(compute_lora_grad_b, torch.device("cpu"), [meta(256, 512)], [meta(512, 16)], meta(256, 16), [0.5])
    wait_for_kernels()
    assert gpu == ["_strip_kernel"]


def test_what_cannot_be_compiled_ahead_is_compiled_when_it_is_called(gpu):
    compile_ahead(compute_lora_grad_b, torch.device("cpu"), "no tensor")
    wait_for_kernels()
    compute_lora_grad_b(*GIVEN)
    assert gpu == ["_strip_kernel", "launched", "_sum_kernel", "launched"]


# ---------------------------------------------------------------- kernels that fail


@pytest.fixture
def warned(monkeypatch):
    monkeypatch.setattr(faults, "_lost", set())
    said = []
    monkeypatch.setattr(logging.getLogger("sloth"), "warning", lambda text, *given: said.append(text % given))
    return said


def raising(error):
    def warmup(*_, **__):
        raise error

    return warmup


@pytest.mark.parametrize("kernel", [_strip_kernel, _sum_kernel], ids=["first", "second"])
def test_an_operator_whose_kernel_fails_takes_its_formula_from_then_on(gpu, warned, monkeypatch, kernel):
    monkeypatch.setattr(kernel, "warmup", raising(OutOfResources(300_000, 232_448, "shared memory")))
    for _ in range(2):
        u, db = compute_lora_grad_b(*GIVEN)
        torch.testing.assert_close(u, (0.5 * GBT[0] @ GBT[1]), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(db, (0.5 * GBT[0].t() @ GBT[2]), rtol=2e-2, atol=2e-2)
    (warning,) = warned
    assert "sloth::up_gradients is computed by ATen" in warning and "shared memory" in warning
    assert kernel.fn.__name__ in warning and "sloth.disable=lora" in warning
    assert len(gpu) == (0 if kernel is _strip_kernel else 2), "not tried again"


def test_an_operator_that_is_eager_takes_its_formula_too(gpu, warned, monkeypatch):
    """Its kernel is launched by Triton."""
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: {(2,): raising(RuntimeError("PassManager::run failed"))})
    x, w = torch.randn(4, 100), torch.ones(100)
    monkeypatch.setattr(rms_norm.FORWARD.__class__, "grid", lambda *_: 2)
    for _ in range(2):
        torch.testing.assert_close(rms_norm.rms_norm(x, w, 1e-6), torch.nn.functional.rms_norm(x, (100,), w, 1e-6))
    assert len(warned) == 1 and "PassManager" in warned[0] and "sloth.disable=rms_norm" in warned[0]


@pytest.mark.parametrize(
    "error, raised",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: an illegal memory access", 700), torch.AcceleratorError),
    ],
    ids=["torch", "triton", "device"],
)
def test_memory_that_is_not_there_is_no_fault_of_a_kernel(gpu, warned, monkeypatch, error, raised):
    monkeypatch.setattr(_strip_kernel, "warmup", raising(error))
    with pytest.raises(raised):
        compute_lora_grad_b(*GIVEN)
    assert not warned and not faults._lost


def test_where_the_formula_raises_too_that_is_raised(gpu, warned, monkeypatch):
    monkeypatch.setattr(_strip_kernel, "warmup", raising(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="multiplied"):
        compute_lora_grad_b([GBT[0]], [GBT[1]], GBT[2][:100], [0.5])
    assert not warned and not faults._lost


def test_entries_that_warnings_name_are_known():
    known = {name for e in (*patterns(), *deferrals()) for name in (e.name, e.construct.name)}
    assert {name for names in faults.ENTRIES.values() for name in names.split(",")} <= known and len(faults.ENTRIES) > 20


@pytest.mark.skipif(DEVICE != "cuda", reason="launches on a GPU")
def test_on_the_gpu():
    """Operators that launch this way, twice each, on operands of other addresses."""
    from sloth.kernels.linear.lora_grad_b import lora_grad_b

    for seed in (0, 1):
        g, b, t = (
            torch.randn(*size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            for size in ((40, 96), (96, 8), (40, 8))
        )
        u, db = lora_grad_b([g], [b], t, [0.5])
        torch.testing.assert_close(u, 0.5 * g @ b, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(db, 0.5 * g.t() @ t, rtol=1e-4, atol=1e-4)
    assert len(module._launchers) == 2  # the strips and their sums
