"""The shadow of whole graphs: bodies of higher-order operators, regions, autocast, opaque nodes, symbols, memoisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from toys import Call, Layer, Norm, Stack, captured, checked, counts, llama_norm, matched, missed, tables

from sloth.rewriter.graph import lower as shadow_module
from sloth.rewriter.graph.lower import lower
from sloth.rewriter.graph.value import Region
from sloth.rewriter.report import Report


def x_like(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(grad)


def only(report: Report, **expected: str) -> None:
    assert counts(report) == expected, report.to_json()
    assert not [g.untouched for g in report.graphs if g.untouched]


# ---------------------------------------------------------------- bodies


class Checkpointed(Stack):
    def forward(self, x):
        cos, sin = tables(x.shape[0], x.shape[1], self.d)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False)
        return x.pow(2).mean()


def test_checkpoint_bodies_are_viewed_and_rewritten() -> None:
    report = checked(Checkpointed(1), x_like(2, 4, 8))
    only(report, rms_norm="2/2", rope="1/1", gated_mlp="1/1")
    assert any("tag_activation_checkpoint" in why for why in report.graphs[0].opaque.values())


def test_views_of_bodies_have_paths_and_their_own_values() -> None:
    outer, body = captured(Checkpointed(1), x_like(1, 4, 8))
    assert outer.path == "" and body.path.startswith("wrap_body")
    assert not [v for v in outer.shadow.values if v.op == "rsqrt"]
    assert len([v for v in body.shadow.values if v.op == "rsqrt"]) == 2
    assert body.region == Region(grad=True)


def test_checkpoint_within_checkpoint() -> None:
    def fn(m, x):
        inner = lambda x: llama_norm(x, m.w)  # noqa: E731
        return checkpoint(lambda x: checkpoint(inner, x, use_reentrant=False) * 2, x, use_reentrant=False)

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


def test_dropout_in_a_checkpoint_draws_the_same_twice() -> None:
    """Recomputation with rewritten nodes in front of the dropout must see the same mask."""

    def fn(m, x):
        return checkpoint(lambda x: F.dropout(llama_norm(x, m.w), 0.5) * x, x, use_reentrant=False)

    options = {"sloth.inner_backend": "aot_eager"}  # which keeps the mask
    only(checked(Call(fn), x_like(2, 3, 8), options=options), rms_norm="1/1")


class Scaled(torch.autograd.Function):
    """Norm in the forward pass, with a backward pass of its own: a straight-through gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return llama_norm(x, weight)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return llama_norm(dy, weight), dy.sum((0, 1))


def test_autograd_functions_keep_their_own_backward() -> None:
    report = checked(Call(lambda m, x: Scaled.apply(x * 2, m.w) + 1), x_like(2, 3, 8))
    assert any("autograd_function_apply" in why for why in report.graphs[0].opaque.values())
    assert matched(report)["rms_norm"] == 2  # in the forward body and in the backward body


def test_nothing_in_the_body_of_an_autograd_function_wants_a_gradient() -> None:
    outer, *bodies = captured(Call(lambda m, x: Scaled.apply(x, m.w)), x_like(2, 3, 8))
    assert len(bodies) == 2
    assert all(not v.meta.requires_grad for b in bodies for v in b.shadow.values if v.meta is not None)
    (result,) = [v for v in outer.shadow.values if v.op == "result" and v.nodes]
    assert result.meta.requires_grad, "what the function returns does"


def test_a_function_inside_a_checkpoint() -> None:
    def fn(m, x):
        return checkpoint(lambda x: Scaled.apply(llama_norm(x, m.v), m.w) * 2, x, use_reentrant=False)

    report = checked(Call(fn), x_like(2, 3, 8))
    assert matched(report)["rms_norm"] == 3


def test_bodies_of_other_operators_are_left_alone() -> None:
    def fn(m, x):
        return torch.cond(x.sum() > 1e9, lambda x: llama_norm(x, m.w), lambda x: llama_norm(x, m.v), (x,)) * m.w

    report = checked(Call(fn), x_like(2, 3, 8))
    assert not report.sites and [why for why in report.graphs[0].opaque.values() if "cond" in why]


# ---------------------------------------------------------------- grad mode


def test_regions_follow_the_grad_mode() -> None:
    def fn(x):
        with torch.no_grad():
            a = x.exp()
            with torch.enable_grad():
                b = x.exp()
            c = a.sin()
        return a, b, c, x.exp()

    (view,) = captured(fn, x_like(3))
    a, b, c, d = (view.env[n] for n in view.gm.graph.find_nodes(op="output")[0].args[0])
    assert [v.region.grad for v in (a, b, c, d)] == [False, True, False, True]
    assert [v.meta.requires_grad for v in (a, b, c, d)] == [False, True, False, True]
    assert a is not d and b is d, "the same value only within the same mode"


def test_norm_under_no_grad_gives_no_gradient() -> None:
    def fn(m, x):
        with torch.no_grad():
            target = llama_norm(x, m.w)
        return x * target

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


@pytest.mark.parametrize("copied", [Tensor.clone, Tensor.detach, lambda x: x + 0, lambda x: x.view(3, 2, 8).clone()])
def test_operand_copied_under_no_grad_stays_without_gradient(copied: Callable[[Tensor], Tensor]) -> None:
    def fn(m, x):
        with torch.no_grad():
            c = copied(x)
        return llama_norm(c, m.w).sum() + x.sum()

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


def test_a_cast_that_is_none_keeps_the_gradient_under_no_grad() -> None:
    """x.float() of an fp32 tensor is x itself, in whatever mode."""

    def fn(m, x):
        with torch.no_grad():
            c = x.float()
        return llama_norm(c, m.w).sum()

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


def test_grad_switched_on_within_an_inference_call() -> None:
    def fn(m, x):
        with torch.enable_grad():
            return llama_norm(x, m.w)

    m = Call(fn)
    with torch.no_grad():
        (view,) = captured(m, x_like(2, 3, 8, grad=False))
    assert not view.region.grad
    assert {v.region.grad for v in view.shadow.values if v.op == "rsqrt"} == {True}


# ---------------------------------------------------------------- autocast


def test_ambient_autocast_makes_casts_explicit() -> None:
    linear = nn.Linear(8, 8, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        (view,) = captured(lambda x: F.silu(linear(x)) + x, x_like(2, 8))
    (product,) = [v for v in view.shadow.values if v.op == "linear"]
    assert [(v.op, v.meta.dtype) for v in product.inputs] == [("cast", torch.bfloat16)] * 2
    (total,) = [v for v in view.shadow.values if v.op == "add"]
    assert total.meta.dtype == torch.float32


def test_ambient_autocast_leaves_no_cast_where_there_is_none() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        (view,) = captured(lambda x: x.exp() + 1, x_like(2, 8, dtype=torch.bfloat16))
    assert not [v for v in view.shadow.values if v.op == "cast"]


def test_training_under_ambient_autocast() -> None:
    """Norms in fp32, projections in bf16: each operator gets the operands that the model's code gave to it."""
    model, x = Stack(1), x_like(2, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        report = checked(model, x, tolerance=5e-2)
    assert matched(report)["rms_norm"] + matched(report)["add_rms_norm"] == 2 and matched(report)["rope"] == 1


def test_regions_are_told_apart_by_the_state_of_autocast() -> None:
    linear = nn.Linear(8, 8, bias=False)

    def fn(x):
        before = linear(x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = linear(x)
            with torch.autocast("cpu", enabled=False):
                off = linear(x)
        return before, inside, off, linear(x)

    (view,) = captured(fn, x_like(2, 8))
    before, inside, off, after = (view.env[n] for n in view.gm.graph.find_nodes(op="output")[0].args[0])
    assert before.meta.dtype == off.meta.dtype == torch.float32 and inside.meta.dtype == torch.bfloat16
    assert after is before is off, "a block that changes nothing is no region"
    assert (before.region.autocast, inside.region.autocast) == ((), (("cpu", torch.bfloat16),))
    assert {v.op for v in inside.inputs} == {"cast"} and {v.op for v in off.inputs} == {"input"}
    assert not torch.is_autocast_enabled("cpu"), "the lowering leaves no autocast behind"


def test_training_with_autocast_inside_the_model() -> None:
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer, self.last = Norm(), Layer(), Norm()

        def forward(self, x):
            x = self.norm(x)
            with torch.autocast("cpu", torch.bfloat16):
                x = self.layer(x, *tables(*x.shape[:2], 4))
            with torch.autocast("cpu", enabled=False):
                return self.last(x.float())

    report = checked(Mixed(), x_like(2, 4, 8), tolerance=5e-2)
    assert matched(report)["rms_norm"] + matched(report)["add_rms_norm"] == 4, report.to_json()


def test_the_rewritten_call_stays_in_its_autocast_block() -> None:
    """The norm's weight is made by a matmul: in bf16 outside, in fp32 inside the block that switches autocast off."""

    def fn(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x.mT
            with torch.autocast("cpu", enabled=False):
                z = llama_norm(x, m.w)
            return y.float().sum() + (z @ z.mT).float().sum()

    only(checked(Call(fn), x_like(2, 3, 8), tolerance=5e-2), rms_norm="1/1")


# ---------------------------------------------------------------- opaque nodes


@torch.library.custom_op("sloth_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.sin()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


mystery.register_autograd(
    lambda ctx, dy: dy * ctx.saved_tensors[0].cos(), setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def test_custom_operators_are_single_values() -> None:
    report = checked(Call(lambda m, x: llama_norm(mystery(llama_norm(x, m.w)), m.v)), x_like(2, 3, 8))
    only(report, rms_norm="2/2")
    (view,) = captured(lambda x: mystery(x) + mystery(x), x_like(3))
    assert [v.op for v in view.shadow.values] == ["input", "sloth_tests::mystery", "add"]


def test_sizes_that_depend_on_data_leave_the_rest_matched() -> None:
    def fn(m, x):
        h = llama_norm(x, m.w)
        rows = h[x.detach().sum(-1) > 0]
        return rows.sum() + llama_norm(x + h, m.v).sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = checked(Call(fn), x_like(2, 3, 8), fullgraph=True)
    only(report, rms_norm="2/2")
    assert "its size depends on data" in report.graphs[0].opaque.values()


def test_norm_of_rows_picked_by_a_mask() -> None:
    """As a mixture of experts does: what has an unknown size is not looked into."""

    def fn(m, x):
        rows = x[x.detach().sum(-1) > 0]
        return llama_norm(rows, m.w).sum()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        report = checked(Call(fn), x_like(2, 3, 8), fullgraph=True)
    assert not matched(report) and not report.graphs[0].untouched
    assert "its size depends on data" in report.graphs[0].opaque.values()


def test_values_read_on_the_host() -> None:
    def fn(m, x):
        return llama_norm(x * x.detach().sum().item(), m.w)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        only(checked(Call(fn), x_like(2, 3, 8), fullgraph=True), rms_norm="1/1")


def test_vmapped_code_stays_right() -> None:
    """Inside of vmap a tensor is not what its shape says."""

    def fn(m, x):
        h = torch.vmap(lambda row: llama_norm(row, m.w))(x)
        return llama_norm(h, m.v)

    report = checked(Call(fn), x_like(2, 3, 8))
    assert sorted((s.construct, s.status) for s in report.sites) == [("rms_norm", "matched"), ("rms_norm", "region")]


def test_inference_mode_is_a_region_without_gradient() -> None:
    def fn(m, x):
        with torch.inference_mode():
            y = llama_norm(x, m.w)
        return llama_norm(x, m.v), y

    (view,) = captured(Call(fn), x_like(2, 3, 8))
    assert {v.region.grad for v in view.shadow.values if v.op == "rsqrt"} == {True, False}
    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="2/2")


def test_tensors_of_one_number_are_lowered() -> None:
    """torch.tensor is no operator."""
    report = checked(Call(lambda m, x: torch.where(x > 0, torch.tensor(0.5, dtype=x.dtype), x) * m.w), torch.randn(2, 3, 8))
    assert report.graphs[0].opaque == {}


def test_calls_that_cannot_be_lowered_are_opaque_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = shadow_module.trace

    def failing(call: Any, metas: Any, mode: Any) -> Any:
        out = trace(call, metas, mode)
        if any("sin" in str(s.op) for s in out.steps):
            raise NotImplementedError("no sine here\nand a second line")
        return out

    monkeypatch.setattr(shadow_module, "trace", failing)
    report = checked(Call(lambda m, x: llama_norm(llama_norm(x, m.w).sin(), m.v)), x_like(2, 3, 8))
    only(report, rms_norm="2/2")
    assert report.graphs[0].opaque == {"sin": "NotImplementedError: no sine here"}


def graph_of(target: Any, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.Node, fx.Node]:
    """x → y = x · 2 → target(…) → y + 1, as Dynamo would leave it."""
    mode = FakeTensorMode()
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    called = graph.call_function(
        target, tuple(y if a == "y" else a for a in args), {k: y if a == "y" else a for k, a in kwargs.items()}
    )
    after = graph.call_function(torch.add, (y, 1))
    graph.output((after,))
    with mode:
        for n in (x, y, after):
            n.meta["example_value"] = torch.empty(4)
    called.meta["example_value"] = None
    return fx.GraphModule({}, graph), y, after


def test_a_triton_kernel_in_the_model_may_write_to_what_it_is_given() -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation

    gm, y, _ = graph_of(
        triton_kernel_wrapper_mutation, kernel_idx=0, constant_args_idx=0, grid=[], tma_descriptor_metadata={}, kwargs="y"
    )
    (view,) = lower(gm)
    assert view.env[y].mutated_storage


@pytest.mark.parametrize("name", ["scribble_", "__iadd__", "read", "__invert"])
def test_unknown_functions_write_where_their_name_says_so(name: str) -> None:
    def unknown(x):
        raise NotImplementedError

    unknown.__name__ = name
    gm, y, _ = graph_of(unknown, "y")
    (view,) = lower(gm)
    assert view.opaque and view.env[y].mutated_storage == (name in ("scribble_", "__iadd__", "__invert"))


# ---------------------------------------------------------------- dynamic shapes


def test_dynamic_shapes_with_lifted_floats() -> None:
    """dynamic=True turns eps into an input; what is matched is as in the static case, and another length needs no new graph."""
    model = Stack(1)
    report = checked(model, x_like(2, 4, 8), dynamic=True)
    assert {c: n.split("/")[0] == n.split("/")[1] for c, n in counts(report).items()} == dict.fromkeys(counts(report), True)
    assert matched(report)["rms_norm"] + matched(report)["add_rms_norm"] == 2 * len(report.graphs)


def test_dynamic_shapes_are_symbols_in_the_shadow() -> None:
    (view,) = captured(lambda x: llama_norm(x, torch.ones(8)), x_like(2, 5, 8), dynamic=True)
    (root,) = [v for v in view.shadow.values if v.op == "rsqrt"]
    assert [type(s) for s in root.meta.shape] == [torch.SymInt, torch.SymInt, int]


# ---------------------------------------------------------------- memoisation


@pytest.mark.parametrize("layers", [2, 30])
def test_layers_alike_are_traced_once(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: Counter[str] = Counter()
    trace = shadow_module.trace

    def counting(call: Any, metas: Any, mode: Any) -> Any:
        traced["calls"] += 1
        return trace(call, metas, mode)

    monkeypatch.setattr(shadow_module, "trace", counting)
    (view,) = captured(Stack(layers), x_like(1, 4, 8, grad=False))
    nodes = len(view.gm.graph.nodes)
    assert nodes > 40 * layers
    assert traced["calls"] < 60, f"{traced['calls']} traces for {nodes} nodes"


def test_equal_calls_under_other_autocast_are_traced_anew() -> None:
    def fn(x):
        a = x @ x
        with torch.autocast("cpu", torch.bfloat16):
            b = x @ x
        return a, b

    (view,) = captured(fn, x_like(3, 3))
    assert sorted(str(v.meta.dtype) for v in view.shadow.values if v.op == "matmul") == ["torch.bfloat16", "torch.float32"]


def test_the_graph_is_only_read() -> None:
    before: list[str] = []
    after: list[str] = []

    def look(gm: fx.GraphModule, _: Any) -> Any:
        before.append(gm.print_readable(print_output=False))
        lower(gm)
        after.append(gm.print_readable(print_output=False))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Checkpointed(1), backend=look)(x_like(1, 4, 8))
    assert before == after and before


def test_misses_in_bodies_are_reported() -> None:
    def fn(m, x):
        return checkpoint(
            lambda x: (x.float() * torch.rsqrt((x.float() ** 2).mean(1, keepdim=True) + 1e-6)) * m.w, x, use_reentrant=False
        )

    report = checked(Call(fn), x_like(2, 3, 8))
    assert [s.construct for s in missed(report)] == ["rms_norm"] and missed(report)[0].line > 0
