"""A kernel's result is put where an operand was that nobody reads any more, and only there."""

import pytest
import torch
import triton
from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from sloth.rewriter.compile import passes


def kernel(x_ptr, y_ptr):
    """Never run."""


KERNEL = JITFunction(kernel)


class Built:
    """A graph of one call of the kernel: x is made of an input, y is an empty buffer."""

    def __init__(self, *, made=True, layout=(8, 1), dtype=torch.float32, autotuned=False):
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.input = self.node("placeholder", "input", (), (4, 8), (8, 1))
        x = self.node("call_function", torch.ops.aten.neg.default, (self.input,), (4, 8), (8, 1)) if made else self.input
        self.x = self.node("call_function", torch.ops.aten.view.default, (x, [4, 8]), of=x)
        self.y = self.node("call_function", torch.ops.aten.empty.memory_format, ([4, 8],), (4, 8), layout, dtype)
        launched = (
            triton.runtime.Autotuner(KERNEL, ["x_ptr", "y_ptr"], [triton.Config({})], [], None, None) if autotuned else KERNEL
        )
        self.call = self.graph.call_function(
            triton_kernel_wrapper_functional,
            kwargs={
                "kernel_idx": kernel_side_table.add_kernel(launched), "constant_args_idx": 0, "grid": [(1, 1, 1)],
                "tma_descriptor_metadata": {}, "kwargs": {"x_ptr": self.x, "y_ptr": self.y}, "tensors_to_clone": ["y_ptr"],
            },
        )  # fmt: skip

    def node(self, op, target, args, shape=(), stride=(), dtype=torch.float32, of=None):
        made = self.graph.create_node(op, target, args)
        with self.mode:
            fresh = torch.empty_strided(shape, stride, dtype=dtype) if of is None else of.meta["val"].view(4, 8)
        made.meta["val"] = fresh
        return made

    def is_written_over(self, *given):
        self.graph.output((self.call, *given))
        passes.reuse_operand_buffers(self.graph)
        return self.call.kwargs["kwargs"]["y_ptr"] is self.x


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(passes, "_OVER", {})
    passes.declare_inplace(KERNEL, y_ptr="x_ptr")


@pytest.mark.parametrize("autotuned", [False, True])
def test_an_operand_that_nobody_reads_any_more(autotuned):
    assert Built(autotuned=autotuned).is_written_over()


@pytest.mark.parametrize("how", [{"made": False}, {"layout": (1, 4)}, {"dtype": torch.bfloat16}], ids=str)
def test_not_an_input_nor_other_memory(how):
    """Of a backward pass, say, that may run twice."""
    assert not Built(**how).is_written_over()


def test_not_what_is_read_later_nor_given_out():
    built = Built()
    later = built.node("call_function", torch.ops.aten.neg.default, (built.x,), (4, 8), (8, 1))
    assert not built.is_written_over(later)
    built = Built()
    assert not built.is_written_over(built.x.args[0])


def test_not_by_kernels_that_do_not_say_so(monkeypatch):
    monkeypatch.setattr(passes, "_OVER", {})
    assert not Built().is_written_over()
