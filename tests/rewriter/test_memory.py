"""Memory that somebody writes: a match may read it when all writes are done, and compute nothing that lies in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_shadow import only, x_like
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Call, Norm, captured, checked, llama_norm, matched, rewritten_graph, tables, turned

from sloth.rewriter.graph.value import Value
from sloth.rewriter.report import MATCHED


def filled(x: Tensor) -> Tensor:
    """As keys of latent attention: their memory first, and then what is in it."""
    h = torch.empty_like(x)
    h[..., :4].copy_(x[..., :4].sin())
    h[..., 4:].copy_(x[..., 4:])
    return h


# What is written before the norm reads it, whoever writes it under which name.
AT_REST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in front": lambda m, x: (h := x * 2, h.add_(1), llama_norm(h, m.w) + h)[-1],
    "part by part": lambda m, x: llama_norm(filled(x), m.w),
    "through a view": lambda m, x: (h := x * 2, h.view(-1).mul_(3), llama_norm(h, m.w))[-1],
    "read through a view": lambda m, x: (h := x * 2, v := h[:, 1:], h.mul_(3), llama_norm(v, m.w))[-1],
    "through detach": lambda m, x: (h := x * 2, h.detach().add_(1), llama_norm(h, m.w))[-1],
    "through a mask": lambda m, x: (h := x * 2, h.__setitem__(x > 0, 0.5), llama_norm(h, m.w))[-1],
    "through the result of a write": lambda m, x: (h := x * 2, z := h.add_(1), h.mul_(3), llama_norm(z, m.w))[-1],
    "by setitem": lambda m, x: (h := x * 2, h.__setitem__(0, 1.0), llama_norm(h, m.w))[-1],
    "with out=": lambda m, x: (h := x * 2, d := x.detach() + 1, torch.mul(x.detach(), 3, out=d), llama_norm(d, m.w) + h)[-1],
    "a written sum": lambda m, x: (h := x + x.sin(), h.mul_(2), h + llama_norm(h, m.w))[-1],
    "in a copy that is written itself": lambda m, x: (
        h := x.mT.reshape(x.shape), h.mul_(2), llama_norm(h.view(-1, 8), m.w))[-1],
    "of a copy in other memory": lambda m, x: (h := x * 2, y := h.mT.reshape(x.shape), h.mul_(2), llama_norm(y, m.w))[-1],
    "in a copy from behind": lambda m, x: (h := x * 2, h.mul_(2), llama_norm(h.clone(), m.w) + h)[-1],
    "made behind the writes of another": lambda m, x: (
        g := x * 2, g.add_(1), a := llama_norm(g, m.w), h := x * 3, h.add_(1), a + llama_norm(h, m.v))[-1],
    "a copy that is written itself": lambda m, x: (
        h := x.detach() * 2, h.mul_(2), c := h.clone(), c.mul_(3), llama_norm(c, m.w) + h)[-1],
}  # fmt: skip


def test_what_is_written_without_gradients_has_none() -> None:
    """Its rotation is not done together with that of a key which has one: it would get one."""

    def fn(m, x, cos, sin):
        q, k = x.detach() * 2, x * m.w
        q.mul_(2)
        return turned(q, cos, sin), turned(k, cos, sin)

    report = checked(Call(fn), x_like(1, 2, 3, 8), *tables(1, 3, 8))
    assert [s.variant.split("[")[0] for s in report.sites] == ["rope_single"] * 2


def test_a_checkpoint_that_nobody_reads_writes() -> None:
    def fn(m, x):
        h = x.detach() * 2
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)  # the norm computes it
        checkpoint(lambda h, n: (h.mul_(3), n * 2)[-1], h, n, use_reentrant=False)
        return m.w * n, h

    assert matched(checked(Call(fn), x_like(2, 3, 8))) == {"rms_norm": 1}


class Product(torch.autograd.Function):
    """x (w + 1), as some layers compute it: what its passes write to they made themselves."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        w = w * 1
        w += 1
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        dx = g * w
        dx += g
        return dx, (g * x).sum((0, 1))


def test_a_function_that_nobody_reads_and_that_writes_to_its_own_goes() -> None:
    """Or it would be traced, and hold what it reads."""

    def fn(m, x):
        n = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)  # the norm computes it
        Product.apply(n, m.v)
        return m.w * n

    gm = rewritten_graph(Call(fn), x_like(2, 3, 8))
    assert not [n for n in gm.graph.nodes if "autograd" in str(n.target)], gm.graph
    assert [n.target for n in gm.graph.nodes if "rms_norm" in str(n.target)]


def written_after(m: Any, x: Tensor, q: Tensor) -> Tensor:
    h = x.detach() * 2
    y = q + h
    h.mul_(3)
    return y


def without_gradients(m: Any, x: Tensor, q: Tensor) -> Tensor:
    with torch.no_grad():
        return q * 2


@pytest.mark.parametrize("read", [written_after, without_gradients])
def test_readers_of_a_result_stay_where_they_are(read: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    """q and k would be turned in one call, behind what k is made of; what reads q stands in front of that."""

    def fn(m, x, cos, sin):
        y = read(m, x, turned(x, cos, sin))
        return y, turned(x * m.w, cos, sin)

    report = checked(Call(fn), x_like(1, 2, 3, 8), *tables(1, 3, 8))
    assert [s.variant.split("[")[0] for s in report.sites] == ["rope_single"] * 2


def mean_first(m: Any, x: Tensor) -> Tensor:
    """Between the mean of the squares and their use."""
    h = x.detach() * 2
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    h.mul_(3)
    return m.w * (h * scale)


def root_first(m: Any, x: Tensor) -> Tensor:
    """A root that is written is not the root any more that a quotient is known by."""
    h = x.detach()
    scale = torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    scale.add_(1)
    return m.w * (h / scale)


def rebound(m: Any, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    p.data = q
    return llama_norm(x, p)


# What is written after it was read, and versions that a name does not tell apart.
NOT_AT_REST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "behind": lambda m, x: (h := x.detach() * 2, n := llama_norm(h, m.w), h.add_(1), n + h)[-1],
    "in front and behind": lambda m, x: (h := x.detach() * 2, h.mul_(3), n := llama_norm(h, m.w), h.add_(1), n + h)[-1],
    "behind, through a view": lambda m, x: (h := x.detach() * 2, n := llama_norm(h, m.w), h[:, 1:].add_(1), n + h)[-1],
    "behind, read through a view": lambda m, x: (
        h := x.detach() * 2, n := llama_norm(h[:, 1:], m.w), h.add_(1), n + h[:, 1:])[-1],
    "a copy from before": lambda m, x: (h := x * 2, c := h.clone(), h.add_(1), llama_norm(c, m.w) + h)[-1],
    "a sum of nothing from before": lambda m, x: (h := x * 2, c := h + 0, h.add_(1), llama_norm(c, m.w) + h)[-1],
    "between": mean_first,
}  # fmt: skip


@pytest.mark.parametrize("inner", [pytest.param("aot_eager", marks=pytest.mark.nightly), "eager"])
@pytest.mark.parametrize("fn", AT_REST.values(), ids=AT_REST.keys())
def test_a_norm_of_memory_at_rest(fn: Callable[[Any, Tensor], Tensor], inner: str) -> None:
    report = checked(Call(fn), x_like(2, 3, 8), options={"sloth.inner_backend": inner})
    assert {s.status for s in report.sites} == {MATCHED}, report.to_json()


@pytest.mark.parametrize("inner", [pytest.param("aot_eager", marks=pytest.mark.nightly), "eager"])
@pytest.mark.parametrize("fn", NOT_AT_REST.values(), ids=NOT_AT_REST.keys())
def test_a_norm_of_memory_that_is_written_again(fn: Callable[[Any, Tensor], Tensor], inner: str) -> None:
    report = checked(Call(fn), x_like(2, 3, 8), options={"sloth.inner_backend": inner})
    assert not report.graphs[0].untouched
    assert [(s.construct, s.status) for s in report.sites] == [("rms_norm", "mutation")], report.to_json()
    assert "written in place" in report.sites[0].reason


@pytest.mark.parametrize("write", ["mul_", "copy_"])
def test_what_is_computed_and_an_operand_too(write: str) -> None:
    """A rotation of one tensor, found as one of two: q in half precision, and k that is q in fp32, which is written between."""

    def rotated(m: Any, x: Tensor) -> Tensor:
        t = x.float()
        t.mul_(2) if write == "mul_" else t.copy_(t.flip(0))
        a, b = t.chunk(2, -1)
        angle = torch.arange(x.shape[-2]).float()[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        return (torch.cat((-b, a), -1) * angle.sin()[None, None] + t * angle.cos()[None, None]).to(x.dtype)

    report = checked(Call(rotated), x_like(2, 3, 5, 4, dtype=torch.float16), options={"sloth.inner_backend": "eager"})
    assert [(s.construct, s.status) for s in report.sites] == [("rope", MATCHED)], report.to_json()


def gate_first(m: Any, x: Tensor) -> Tensor:
    """A sigmoid that is written, for some rows, makes no SiLU."""
    gate, up = x.detach(), x * 3
    s = torch.sigmoid(gate)
    s[0].mul_(2)
    return gate * s * up


@pytest.mark.parametrize("fn", [root_first, gate_first])
def test_nothing_is_seen_through_what_is_written(fn: Callable[[Any, Tensor], Tensor]) -> None:
    assert not matched(checked(Call(fn), x_like(2, 3, 8)))


def test_what_is_another_tensor_by_now_is_never_at_rest() -> None:
    """The norm does without its weight."""
    report = checked(Call(rebound), x_like(2, 3, 8), torch.ones(8), torch.rand(8))
    assert [s.variant for s in report.sites] == ["rms_norm[no_weight]"]


def test_an_operand_that_is_filled_with_a_result() -> None:
    """The weight of add_rms_norm is made of its sum, though no edge says so: the norm without weight takes its place."""

    def fn(m, x):
        h, w = x + x.sin(), torch.empty(8)
        w.copy_(h[0, 0])
        return h, llama_norm(h, w)

    (site,) = checked(Call(fn), x_like(2, 3, 8)).sites
    assert site.status == "matched" and site.variant == "add_rms_norm[no_weight]"


def test_memory_in_the_body_of_a_checkpoint() -> None:
    def fn(m, x):
        return checkpoint(lambda x: llama_norm(filled(x), m.w), x, use_reentrant=False)

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


def test_what_is_written_brings_a_gradient() -> None:
    """The memory is made without one."""
    (view,) = captured(Call(lambda m, x: llama_norm(filled(x), m.w)), x_like(2, 3, 8))
    assert [v.meta.requires_grad for v in view.shadow.values if v.op == "empty_like"] == [True]


@pytest.mark.parametrize("write", [lambda n: n.mul_(2), lambda n: n[..., :2].zero_()])
def test_a_norm_whose_result_is_written(write: Callable[[Tensor], Tensor]) -> None:
    """A result is memory of its own: its readers may write it (`loss += router_loss`), as they did the model's."""

    def fn(m, x):
        n = llama_norm(x, m.w)
        write(n)
        return n + 1

    assert [(s.variant, s.status) for s in checked(Call(fn), x_like(2, 3, 8)).sites] == [("rms_norm[llama]", "matched")]


def test_a_written_result_that_the_match_reads_again() -> None:
    """add_rms_norm's h: its norm is of what was written, so the norm alone is matched."""

    def fn(m, x):
        h = x + x.sin()
        h.mul_(2)
        return h, llama_norm(h, m.w)

    assert [s.variant for s in checked(Call(fn), x_like(2, 3, 8)).sites] == ["rms_norm[llama]"]


def test_a_norm_beside_the_written_memory_is_matched() -> None:
    def fn(m, x):
        h = x * 2
        h.add_(llama_norm(x, m.w))
        return h

    only(checked(Call(fn), x_like(2, 3, 8)), rms_norm="1/1")


def test_inputs_that_share_memory() -> None:
    """y is a view of x: writing to one is writing to the other."""

    def fn(m, x, y):
        y.add_(1)
        n = llama_norm(x, m.w)
        y.mul_(2)
        return n

    views_of_one = captured(Call(fn), base := torch.randn(2, 3, 8), base.view(-1))
    names = {n.name: v.mutated_storage for n, v in views_of_one[0].env.items() if n.op == "placeholder" and isinstance(v, Value)}
    assert names["l_x_" if "l_x_" in names else "l_args_0_"] and names["l_y_" if "l_y_" in names else "l_args_1_"], names


def test_buffers_written_each_step() -> None:
    """A running average beside the norm: its memory is written, the norm's is not."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()
            self.register_buffer("average", torch.zeros(8))

        def forward(self, x):
            self.average.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
            return self.norm(x) + self.average

    only(checked(Running(), x_like(2, 3, 8)), rms_norm="1/1")


def test_a_constant_that_is_filled_in_place_is_read_behind_that() -> None:
    """Its value has no node but the last write: what reads it by its first name stays behind it."""

    def fn(m, x):
        y = llama_norm(x, m.w)
        scale = torch.ones(8)
        scale.masked_fill_(y[0, 0] > 0, 2.0)  # depends on a result
        return llama_norm(y * scale, scale) + scale

    assert matched(checked(Call(fn), x_like(2, 3, 8)))["rms_norm"] == 2
