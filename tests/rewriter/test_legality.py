"""Legality: what each rule refuses, under which status, and that the compiled step equals eager in every case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from toys import Call, Stack, captured, checked, compiled, llama_norm, matched, missed, tables, turned

import sloth
from sloth.rewriter.backend import listening
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.plan import legality
from sloth.rewriter.plan.plan import plan
from sloth.rewriter.report import Report
from sloth.testing.judge import compare, make, wide

BF16 = torch.bfloat16


def x_like(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(grad)


def statuses(report: Report) -> list[tuple[str, str]]:
    assert not [g.untouched for g in report.graphs if g.untouched]
    return sorted((s.construct, s.status) for s in report.sites)


# ---------------------------------------------------------------- escapes


def norm_and(use: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A norm, and what else is made of its mean and of its reciprocal root."""

    def fn(m, x):
        mean = x.pow(2).mean(-1, keepdim=True)
        r = torch.rsqrt(mean + 1e-6)
        return m.w * (x * r), use(x, mean, r)

    return fn


@pytest.mark.parametrize(
    "use",
    [
        lambda x, mean, r: r * 2,
        lambda x, mean, r: r,
        lambda x, mean, r: mean.sum(),
        lambda x, mean, r: x * r,
        lambda x, mean, r: (x * r).detach(),
    ],
)
def test_the_root_of_a_norm_used_elsewhere(use: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
    report = checked(Call(norm_and(use)), x_like(2, 3, 8))
    status = [s.status for s in report.sites]
    # where x · r is what is used, the norm without weight is a match of its own
    assert status == ["escape"] or [s.variant for s in report.sites] == ["rms_norm[no_weight]"], report.to_json()
    if status == ["escape"]:
        assert "used elsewhere" in report.sites[0].reason


def test_uses_that_nobody_reads_do_not_count() -> None:
    def fn(m, x):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        r * 2
        return m.w * (x * r)

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")]


ROOTS = {
    "divided": lambda x, m: x / torch.sqrt(m),
    "inverse": lambda x, m: x * (1 / m.sqrt()),
    "reciprocal": lambda x, m: x * m.sqrt().reciprocal(),
    "powers": lambda x, m: torch.div(x, m**0.5),
}


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_what_a_rule_looks_through_is_used_by_nobody(root: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The node of sqrt(m) is read by that of x / sqrt(m) alone, which holds x · rsqrt(m)."""

    def fn(m, x):
        return m.w * root(x, x.pow(2).mean(-1, keepdim=True) + 1e-6)

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")]


def test_what_a_rule_looks_through_may_be_read_far_away() -> None:
    def fn(m, x):
        r = (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        y, far = m.w * (x / r), r
        for _ in range(20):
            far = far.cos()
        return y + far

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "escape")]


@pytest.mark.parametrize("use", [lambda a, g: a + 1, lambda a, g: a, lambda a, g: a.detach() * g, lambda a, g: a[..., :2]])
def test_a_cheap_value_used_elsewhere_is_computed_twice(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    def fn(m, x):
        g = x * m.w
        a = F.silu(g)
        return a * (x * m.v), use(a, g)

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("gated_mlp", "matched")]


def cohere(x: Tensor, h: Tensor, w: Tensor) -> Tensor:
    h = h - h.mean(-1, keepdim=True)
    return (wide(w) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))).to(x.dtype)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: (h := wide(x), (cohere(x, h, w), h))[-1],
        lambda x, w: (h := wide(x), (cohere(x, h, w), h.sin()))[-1],
        lambda x, w: (h := wide(x), cohere(x, h, w) * cohere(x, h, w.flip(0)))[-1],
        lambda x, w: (h := wide(x) * 0.5, (F.cross_entropy(h, torch.arange(64))[None], h.sin() * w.sum()))[-1],
    ],
    ids=["given out", "read", "two norms", "what is made of it is read"],
)
def test_gradients_of_a_cast_are_added_up_in_the_wider_dtype(fn: Callable[[Tensor, Tensor], Any]) -> None:
    """And rounded once: a norm of the narrow tensor would round its own first."""
    x, w = make((64, 64), torch.bfloat16), make((64,), torch.bfloat16, seed=1, mean=1.0)
    compare(compiled(fn), fn, [x, w])


def test_the_residual_stream_is_a_result() -> None:
    def fn(m, x, r):
        h = x + r
        return llama_norm(h, m.w) + h, h.exp()

    report = checked(Call(fn), x_like(2, 3, 8), x_like(2, 3, 8))
    assert matched(report) == {"add_rms_norm": 1}


# ---------------------------------------------------------------- grad mode


def test_a_norm_whose_root_has_no_gradient() -> None:
    def fn(m, x):
        with torch.no_grad():
            r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return m.w * (x * r)

    report = checked(Call(fn), x_like(2, 3, 8))
    assert statuses(report) == [("rms_norm", "region")] and "grad mode" in report.sites[0].reason


def test_a_norm_whose_root_is_detached() -> None:
    report = checked(Call(lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6).detach())), x_like(2, 3, 8))
    assert [s for _, s in statuses(report)] == ["structure"]


def test_a_norm_of_which_only_x_is_detached() -> None:
    """x in the square is detached, x in the product is not: two operands, where the entry knows one."""

    def fn(m, x):
        return m.w * (x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True) + 1e-6))

    assert not matched(checked(Call(fn), x_like(2, 3, 8)))


def test_a_norm_under_no_grad_used_outside() -> None:
    def fn(m, x):
        with torch.no_grad():
            n = llama_norm(x, m.w)
        return n * x

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")]


def test_an_operand_computed_under_no_grad() -> None:
    """The weight is trainable, the input is not: frozen layers below."""

    def fn(m, x):
        with torch.no_grad():
            h = (x * m.v).tanh()
        return llama_norm(h, m.w)

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")]


def test_a_norm_right_behind_one_without_gradient() -> None:
    """The first call is put into the no_grad region; the second must not follow it there."""

    def fn(m, x):
        with torch.no_grad():
            h = llama_norm(x, m.v)
        return llama_norm(h, m.w)

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")] * 2


def test_a_norm_without_gradient_between_two_with() -> None:
    def fn(m, x):
        a = llama_norm(x, m.v)
        with torch.no_grad():
            b = llama_norm(a, m.w)
        return llama_norm(a * b, m.w) + a

    assert statuses(checked(Call(fn), x_like(2, 3, 8))) == [("rms_norm", "matched")] * 3


def test_rotation_across_a_grad_region() -> None:
    """q is turned with gradient, k without: no pair."""

    def fn(m, q, k):
        cos, sin = tables(2, 4, 8)
        a = turned(q * m.w, cos, sin)
        with torch.no_grad():
            b = turned(k * m.v, cos, sin)
        return a * b

    report = checked(Call(fn), x_like(2, 2, 4, 8), x_like(2, 2, 4, 8))
    assert matched(report)["rope"] == 0


# ---------------------------------------------------------------- operators and gradients

_names = itertools.count()


@pytest.fixture
def entry() -> Iterator[Callable[..., Any]]:
    """Registers patterns of x · exp(y), under a construct of their own, and forgets them afterwards."""
    known = {p.name for p in patterns()}
    construct = sloth.Construct("product", "product", anchor=lambda v: v.op == "mul" and any(a.op == "exp" for a in v.inputs))

    def register(op: Any, reference: Callable[..., Any] | None = None, **more: Any) -> Any:
        def times_exp(x, y):
            return x * y.exp()

        dims = {"x": "B S D", "y": "B S D"}
        return sloth.pattern(construct, op=op, dims=dims, name=f"p{next(_names)}", **more)(reference or times_exp)

    yield register
    for p in patterns():
        if p.name not in known:
            sloth.unregister(p.name)


def operator(fake: Callable[..., Any], returns: str = "Tensor", kernel: Callable[..., Any] | None = None) -> Any:
    """An operator (x, y) → …, without a backward."""
    name = f"sloth_tests::op{next(_names)}"
    torch.library.define(name, f"(Tensor x, Tensor y) -> {returns}")
    torch.library.impl(name, "CPU", kernel or (lambda x, y: x * y.exp()))
    torch.library.register_fake(name, fake)
    return getattr(torch.ops.sloth_tests, name.split("::")[1]).default


def derivative(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    return d * y.exp(), d * x * y.exp()


def custom(backward: Callable[..., Any] | None) -> Any:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return x * y.exp()

    op = torch.library.custom_op(f"sloth_tests::custom{next(_names)}", kernel, mutates_args=())
    op.register_fake(lambda x, y: torch.empty_like(x))
    if backward is not None:
        op.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return op


def product(m: Any, x: Tensor) -> Tensor:
    return (x * m.w) * (x + m.v).exp()


OPERATORS: dict[str, tuple[Callable[[], Any], bool]] = {
    "custom_op without backward": (lambda: custom(None), False),
    "custom_op with backward": (lambda: custom(derivative), True),
    "torch.library without backward": (lambda: operator(lambda x, y: torch.empty_like(x)), False),
}


@pytest.mark.parametrize("make, differentiable", OPERATORS.values(), ids=OPERATORS.keys())
def test_operators_without_backward_never_meet_a_gradient(make: Callable[[], Any], differentiable: bool, entry: Any) -> None:
    registered = entry(make())
    assert legality.has_backward(registered.op) == differentiable
    report = checked(Call(product), x_like(2, 3, 8))
    assert statuses(report) == [("product", "matched" if differentiable else "gradient")]
    if not differentiable:
        assert "no registered backward" in report.sites[0].reason


@pytest.mark.parametrize("make", [lambda: custom(None), lambda: operator(lambda x, y: torch.empty_like(x))])
def test_operators_without_backward_serve_where_no_gradient_flows(make: Callable[[], Any], entry: Any) -> None:
    entry(make())
    model, x = Call(product), x_like(2, 3, 8, grad=False)
    with listening() as graphs, torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert statuses(Report(graphs)) == [("product", "matched")]
    report = checked(Call(product).requires_grad_(False), x)
    assert statuses(report) == [("product", "matched")]

    def half(m, x):
        with torch.no_grad():
            return product(m, x)

    assert statuses(checked(Call(lambda m, x: half(m, x) * m.w), x_like(2, 3, 8))) == [("product", "matched")]


def test_our_operators_have_a_backward() -> None:
    """But for what stands only where nothing wants a gradient: a few rows, as in generation."""
    assert [p.name for p in patterns() if not legality.has_backward(p.op)] == ["lora_rows", "linear_4bit_rows"]


def test_tables_that_want_a_gradient() -> None:
    """Learned cos and sin: the operator gives them none, so their rotation stays as it was."""

    def fn(m, q, k):
        cos, sin = (t.expand(2, 1, 4, 8) for t in (m.w.cos(), m.v.sin()))
        return turned(q, cos, sin), turned(k, cos, sin)

    report = checked(Call(fn), x_like(2, 2, 4, 8), x_like(2, 2, 4, 8))
    assert set(statuses(report)) == {("rope", "gradient")} and "no gradient to cos, sin" in missed(report)[0].reason


def test_tables_without_gradient_beside_those_that_want_one() -> None:
    def fn(m, q):
        cos, sin = (t.detach().expand(2, 1, 4, 8) for t in (m.w.cos(), m.v.sin()))
        return turned(q, cos, sin) * m.w

    assert matched(checked(Call(fn), x_like(2, 2, 4, 8))) == {"rope_single": 1}


def left(y: Tensor, how: str) -> tuple[Tensor, ...]:
    """Given out with a gradient, without one, or not at all."""
    return {"read": (y,), "detached": (y.detach(),), "dead": ()}[how]


@pytest.mark.parametrize("how, variant", [("read", "rope"), ("detached", "rope_single"), ("dead", "rope_single")])
def test_a_rotation_that_gets_no_gradient_asks_for_none(how: str, variant: str) -> None:
    """Of q and k only k's is trained through, and q is made by attention, which would hand on tensors that are not there."""
    cos, sin = tables(1, 3, 4)
    sees = torch.ones(3, 3, dtype=torch.bool).tril()

    def attend(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * m.w, x * m.v, attn_mask=sees)

    def fn(m: Any, x: Tensor) -> Any:
        return turned(x * m.w, cos, sin), *left(turned(attend(m, x), cos, sin), how)

    def checkpointed(m: Any, x: Tensor) -> Any:
        k, *q = checkpoint(lambda x: (turned(x * m.w, cos, sin), turned(attend(m, x), cos, sin)), x, use_reentrant=False)
        return k, *left(q[0], how)

    for model in (fn, checkpointed):
        report = checked(Call(model, 4), x_like(1, 2, 3, 4), options={"sloth.inner_backend": "aot_eager"})
        assert {name for name in matched(report) if name.startswith("rope")} == {variant}


@pytest.mark.parametrize("how, calls", [("read", 1), ("detached", 2)])
def test_adapters_that_get_no_gradient_are_a_call_of_their_own(how: str, calls: int) -> None:
    w, a, b = torch.randn(2, 6, 4), torch.randn(2, 2, 4), torch.randn(2, 6, 2)

    def fn(m: Any, x: Tensor) -> Any:
        one, other = (F.linear(x, w[i]) + F.linear(F.linear(x, a[i] * m.w), b[i]) * 2 for i in range(2))
        return one, *left(other, how)

    checked(Call(fn, 4), x_like(2, 3, 4), options={"sloth.inner_backend": "aot_eager"})
    (graph,) = plan(captured(Call(fn, 4), x_like(2, 3, 4)), [p for p in patterns() if p.variants]).graphs
    placements = [made for made in graph.placements if made[0].pattern.name == "lora"]
    assert len(placements) == calls and sum(map(len, placements)) == 2


# ---------------------------------------------------------------- results

RESULTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "dtype": (lambda: operator(lambda x, y: torch.empty_like(x, dtype=BF16)), "dtype", "bfloat16"),
    "shape": (lambda: operator(lambda x, y: x.new_empty(x.shape[1:])), "dtype", "[3, 8]"),
    "refusal": (lambda: operator(lambda x, y: torch._check(False, lambda: "not these")), "operator", "not these"),
    "list": (lambda: operator(lambda x, y: [], "Tensor[]"), "operator", "does not return 1 tensors"),
}


@pytest.mark.parametrize("make, status, reason", RESULTS.values(), ids=RESULTS.keys())
def test_an_operator_whose_results_do_not_fit(make: Callable[[], Any], status: str, reason: str, entry: Any) -> None:
    entry(make())
    report = checked(Call(product).requires_grad_(False), x_like(2, 3, 8, grad=False))
    assert statuses(report) == [("product", status)]
    assert reason in report.sites[0].reason, report.sites[0].reason


def test_an_operator_with_too_few_results(entry: Any) -> None:
    entry(operator(lambda x, y: torch.empty_like(x)), lambda x, y: (y.exp(), x * y.exp()))
    report = checked(Call(lambda m, x: ((x + 1).exp(), x * (x + 1).exp())).requires_grad_(False), x_like(2, 3, 8, grad=False))
    assert statuses(report) == [("product", "operator")]


def test_checks_of_entries_refuse_with_their_reason() -> None:
    def fn(m, x):
        return F.silu(x * m.w) * x.bfloat16()

    report = checked(Call(fn), x_like(2, 3, 8), tolerance=5e-2)
    assert statuses(report) == [("gated_mlp", "check")]
    assert report.sites[0].reason == "gate is torch.float32, up is torch.bfloat16"


def test_an_operator_is_not_tried_on_what_a_check_refuses(entry: Any) -> None:
    tried: list[Any] = []
    registered = entry(operator(lambda x, y: tried.append(x)))
    registered.check(lambda match: match.require(False, "not today"))
    report = checked(Call(product).requires_grad_(False), x_like(2, 3, 8, grad=False))
    assert statuses(report) == [("product", "check")] and report.sites[0].reason == "not today" and not tried


# ---------------------------------------------------------------- convexity


def test_k_made_of_the_turned_q_is_no_pair_with_it() -> None:
    def fn(m, q):
        cos, sin = tables(2, 4, 8)
        a = turned(q * m.w, cos, sin)
        return a, turned(a * m.v, cos, sin)

    report = checked(Call(fn), x_like(2, 2, 4, 8))
    assert matched(report) == {"rope_single": 2} and not missed(report)


def test_q_read_before_k_exists_waits_for_it() -> None:
    def fn(m, q, k):
        cos, sin = tables(2, 4, 8)
        a = turned(q * m.w, cos, sin)
        early = a.exp() + a.pow(2)
        b = turned(k * m.v, cos, sin)
        return early, b

    assert matched(checked(Call(fn), x_like(2, 2, 4, 8), x_like(2, 2, 4, 8))) == {"rope": 1}


BETWEEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reads memory that is written": lambda a, buffer: a + buffer,
    "draws by a method": lambda a, buffer: a.detach().sigmoid().bernoulli() * a,
    "draws": lambda a, buffer: torch.bernoulli(a.detach().sigmoid()) * a,
    "drops out": lambda a, buffer: F.dropout(a, 0.5),
}


@pytest.mark.parametrize("use", BETWEEN.values(), ids=BETWEEN.keys())
def test_what_must_not_wait_keeps_its_place(use: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What is read of q early would have to move behind k, over a write or another draw: q and k are turned apart."""

    def fn(m, q, k):
        cos, sin = tables(2, 4, 8)
        buffer = torch.ones_like(q)
        a = turned(q * m.w, cos, sin)
        early = use(a, buffer)
        noise = F.dropout(torch.ones_like(q), 0.5)
        buffer.mul_(3)
        b = turned(k * m.v, cos, sin)
        return early, b + buffer, noise

    report = checked(Call(fn), x_like(2, 2, 4, 8), x_like(2, 2, 4, 8))
    assert matched(report) == {"rope_single": 2} and not missed(report)


# ---------------------------------------------------------------- overlap


def test_two_norms_of_one_input_with_two_weights() -> None:
    """Both want the same root. Whatever is made of them, it is right and reported."""
    report = checked(Call(lambda m, x: (llama_norm(x, m.w), llama_norm(x, m.v))), x_like(2, 3, 8))
    assert report.sites and not report.graphs[0].untouched


def test_a_sum_belongs_to_one_match() -> None:
    """h = x + r stands before two different norms; one of them takes it along."""

    def fn(m, x, r):
        h = x + r
        return llama_norm(h, m.w), llama_norm(h.flip(0), m.v), h

    report = checked(Call(fn), x_like(2, 3, 8), x_like(2, 3, 8))
    assert matched(report) == {"add_rms_norm": 1, "rms_norm": 1}


def test_a_model_with_all_of_it_in_low_precision() -> None:
    class Cast(Stack):
        def forward(self, x):
            cos, sin = (t.to(x.dtype) for t in tables(*x.shape[:2], self.d))
            return self.layers[0](x, cos, sin)

    report = checked(Cast(1).to(BF16), x_like(2, 4, 8, dtype=BF16), tolerance=6e-2)
    assert not missed(report) and not report.graphs[0].untouched


def test_partly_frozen_models() -> None:
    for frozen in ("w", "v"):
        m = Call(lambda m, x: llama_norm(x * m.v, m.w))
        getattr(m, frozen).requires_grad_(False)
        assert statuses(checked(m, x_like(2, 3, 8, grad=False))) == [("rms_norm", "matched")]
