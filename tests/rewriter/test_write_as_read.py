"""sloth.rewriter.compile.passes.write_as_read: what is rounded only to be cast to fp32 is written in fp32, and nothing else."""

import operator
from functools import partial

import pytest
import torch
from torch import fx
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map

from sloth.kernels.common.device import H100, pretending
from sloth.kernels.linear.gemm import sum_of_products
from sloth.kernels.linear.gemm_rows import product_in_rows
from sloth.kernels.linear.lora import lora_linear
from sloth.kernels.linear.lora_grad_b import lora_grad_b
from sloth.rewriter.backend import patterns
from sloth.rewriter.compile.inductor import compiler
from sloth.rewriter.compile.passes import write_as_read

CAST = torch.ops.prims.convert_element_type.default
LOW = torch.bfloat16
patterns()  # which declare what of theirs may be


VIEW, ABS = torch.ops.aten.view.default, torch.ops.aten.abs.default


def graph_of(op, operands, casts, through=None):
    """A graph that calls `op` and casts its results, or what `through` makes of them, each to these dtypes; those without any are
    given out.
    """
    graph, values = fx.Graph(), op(*operands)
    at = iter(range(9))

    def node(a):
        if isinstance(a, torch.Tensor):
            n = graph.placeholder(f"x{next(at)}")
            n.meta["val"] = a
            return n
        return a

    args = tuple([node(x) for x in a] if isinstance(a, list) else node(a) for a in operands)
    call = graph.call_function(op, args)
    call.meta["val"], out = values, []
    for i, dtypes in enumerate(casts):
        part, value = call, values
        if isinstance(values, list):
            part, value = graph.call_function(operator.getitem, (call, i)), values[i]
            part.meta["val"] = value
        if through is not None:
            more = [[-1]] if through is VIEW else []
            part, value = graph.call_function(through, (part, *more)), through(value, *more)
            part.meta["val"] = value
        for dtype in dtypes:
            cast = graph.call_function(CAST, (part, dtype))
            cast.meta["val"] = value.to(dtype)
            out.append(cast)
        out += [part] if not dtypes else []
    graph.output(tuple(out))
    return graph


def run(graph, operands):
    flat = [x for a in operands for x in (a if isinstance(a, list) else [a]) if isinstance(x, torch.Tensor)]
    return fx.GraphModule({}, graph)(*flat)


def changed(op, operands, casts, through) -> bool:
    """Is it written in fp32? Results are no further from those in fp64 than before, and of the same dtypes."""
    graph = graph_of(op, operands, casts, through)
    before = run(graph, operands)
    write_as_read(graph)
    graph.lint()
    after = run(graph, operands)
    wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) else x, operands)
    exact = run(graph_of(op, wide, [[torch.float64] * len(dtypes) for dtypes in casts], through), wide)
    for x, y, z in zip(before, after, exact, strict=True):
        assert x.dtype == y.dtype and (y.double() - z).norm() <= 1.001 * (x.double() - z).norm()
    found = CAST not in {n.target for n in graph.nodes}
    assert op is sum_of_products or found != all(map(torch.equal, before, after))  # which is fp32 on a CPU until it is whole
    for n in graph.find_nodes(op="call_function", target=operator.getitem):
        assert n.meta["val"].dtype == n.args[0].meta["val"][n.args[1]].dtype
    return found


def of_rows():
    return [torch.randn(8, 64, dtype=LOW), torch.randn(64, 32, dtype=LOW), [4, 4]]


def of_layers():
    g, b = [torch.randn(64, n, dtype=LOW) for n in (48, 32)], [torch.randn(n, 4, dtype=LOW) for n in (48, 32)]
    return [g, b, torch.randn(64, 8, dtype=LOW), [0.5, 0.5]]


def of_sum(n):
    return [
        [torch.randn(8, 64, dtype=LOW) for _ in range(n)],
        [torch.randn(64, 32, dtype=LOW) for _ in range(n)],
        [1.0, 0.5, 2.0][:n],
    ]


WIDE = [torch.float32]


@pytest.mark.parametrize(
    "op, operands, casts, through, expected",
    [
        (product_in_rows, of_rows, [WIDE, WIDE], None, True),
        (product_in_rows, of_rows, [WIDE, WIDE], VIEW, True),
        (product_in_rows, of_rows, [WIDE], None, True),
        (lora_grad_b, of_layers, [[], WIDE, WIDE], None, True),
        (sum_of_products, partial(of_sum, 3), [WIDE], None, True),
        (sum_of_products, partial(of_sum, 3), [WIDE], VIEW, True),
        (sum_of_products, partial(of_sum, 3), [WIDE], ABS, False),
        (sum_of_products, partial(of_sum, 2), [WIDE], None, False),
        (product_in_rows, of_rows, [WIDE, []], None, False),
        (product_in_rows, of_rows, [WIDE, [torch.float16]], None, False),
        (product_in_rows, of_rows, [WIDE, [torch.float32, torch.float32]], None, False),
        (lora_grad_b, of_layers, [WIDE, [], []], None, False),
    ],
)
def test_what_is_read_in_fp32_alone(op, operands, casts, through, expected):
    torch.manual_seed(0)
    assert changed(op, operands(), casts, through) == expected


def test_through_inductor():
    """q, k and v of a bf16 layer with adapters in fp32, compiled as for a GPU: gradients of the adapters are written in fp32."""
    x, widths = torch.randn(3, 7, 24, requires_grad=True), (32, 16, 16)
    weight = [torch.randn(n, 24, dtype=LOW) for n in widths]
    a = [torch.randn(4, 24, requires_grad=True) for _ in widths]
    b = [torch.randn(n, 4, requires_grad=True) for n in widths]

    def layer(x, *adapters):
        low = [p.to(LOW) for p in adapters]
        q, k, v = lora_linear(x.to(LOW), weight, [None] * 3, [None] * 3, low[:3], low[3:], [0.5] * 3)
        return q.sin().sum() + (k * v).sum()

    with pretending(H100):
        loss, code = run_and_get_code(torch.compile(layer, backend=compiler("inductor", None, {})), x, *a, *b)
    calls = [line for line in "".join(code).splitlines() if "extern_kernels.sloth_" in line]
    assert sum("products_in_columns" in c for c in calls) == 1, calls
    assert all("torch.float32" in c for c in calls if "up_gradients" in c or "product_in_rows" in c or "sum_of" in c), calls
    inputs = (x, *a, *b)
    for ours, eager in zip(*(torch.autograd.grad(y, inputs) for y in (loss, layer(*inputs))), strict=True):
        assert ours.dtype == torch.float32 and (ours - eager).norm() <= 3e-2 * eager.norm()
