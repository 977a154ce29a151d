"""Calls of opaque operators in a graph that is about to be compiled are told ahead, with sizes of now and larger ones."""

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from sloth.rewriter.compile import kernels_ahead

OP = torch.ops.aten.mm.default


def test_each_kind_of_call_is_told_once(monkeypatch):
    told = []
    monkeypatch.setitem(kernels_ahead._AHEAD, OP, lambda device, a, b: told.append((device, a.shape, a.dtype, b.device.type)))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.STATIC])
    rows, columns = mode.from_tensor(torch.randn(6, 4), symbolic_context=sizes), mode.from_tensor(torch.randn(4, 8))
    with mode:
        result = torch.empty(rows.shape[0], 8, device="cuda")
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    a.meta["val"], b.meta["val"] = rows, columns
    for _ in range(3):
        graph.call_function(OP, (a, b)).meta["val"] = result
    kernels_ahead.compile_kernels_ahead(graph)
    assert told == [(result.device, (6 * times, 4), torch.float32, "meta") for times in kernels_ahead.TIMES]


def test_on_a_cpu_nothing_is(monkeypatch):
    monkeypatch.setitem(kernels_ahead._AHEAD, OP, lambda *_: 1 / 0)
    graph = fx.Graph()
    a = graph.placeholder("a")
    a.meta["val"] = torch.empty(4, 4)
    graph.call_function(OP, (a, a)).meta["val"] = torch.empty(4, 4)
    kernels_ahead.compile_kernels_ahead(graph)
