"""What no anchor sees: an entry under a construct whose anchor was made for others. Numbers that a reference computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import Call, checked

import sloth
from sloth.rewriter.match.registry import patterns, unregister
from sloth.rewriter.report import GraphReport, Report, Site
from sloth.testing import check_pattern

GATED_MLP = next(p.construct for p in patterns() if p.name == "gated_mlp")
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("sloth_unseen::clamped", mutates_args=())
def clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    g, u = wide(gate), wide(up)
    c = g.clamp(max=limit)
    return (c * torch.sigmoid(alpha * c) * (u.clamp(-limit, limit) + 1)).to(gate.dtype)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    gate, up, ctx.alpha, ctx.limit = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, d: Tensor) -> tuple:
    gate, up, d = map(wide, (*ctx.saved_tensors, d))
    c = gate.clamp(max=ctx.limit)
    s, u = torch.sigmoid(ctx.alpha * c), up.clamp(-ctx.limit, ctx.limit)
    dg, du = d * (u + 1) * s * (1 + ctx.alpha * c * (1 - s)) * (gate <= ctx.limit), d * c * s * (up.abs() <= ctx.limit)
    dtype = ctx.saved_tensors[0].dtype
    return dg.to(dtype), du.to(dtype), None, None


clamped.register_fake(lambda gate, up, alpha, limit: torch.empty_like(gate))
clamped.register_autograd(_backward, setup_context=_setup)


def reference(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    known = {p.name for p in patterns()}
    yield
    for name in {p.name for p in patterns()} - known:
        unregister(name)


def entered(fn: Callable = reference, construct: sloth.Construct = GATED_MLP, **options: Any) -> Any:
    return sloth.pattern(construct, op=clamped, dims={"gate": "B S I", "up": "B S I"}, name="clamped", **options)(fn)


def model(
    most: float = 2.0, least: float = -2.0, inner: float = 2.0, act: Callable = torch.sigmoid, tail: Callable = lambda u: u + 1
):
    def fn(m: Any, x: Tensor) -> Tensor:
        gate, up = x * m.w, x * m.v
        gate = gate.clamp(max=inner)
        return gate * act(1.3 * gate) * tail(up.clamp(least, most))

    return Call(fn)


def sites(found: Any) -> list[Site]:
    report = checked(found, X.clone().requires_grad_())
    assert not report.graphs[0].untouched
    return report.sites


# ---------------------------------------------------------------- numbers that a reference computes


def test_a_number_may_be_computed_of_another() -> None:
    """clamp(-limit, limit), in a model clamp(-2.0, 2.0)."""
    entry = entered()
    assert not entry.variants[0].is_seen
    assert [(s.variant, s.status) for s in sites(model())] == [("clamped[default]", "matched")]
    check_pattern(entry)


COMPUTED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "negated alone": lambda u, limit: u.clamp(min=-limit).cos(),
    "twice, and itself": lambda u, limit: (u * limit).exp() + 2 * limit,
    "of a function": lambda u, limit: u.exp() * limit + math.sqrt(limit),
    "in two ways": lambda u, limit: (u + 1 / limit).exp() * (1 - limit) + limit,
}


@torch.library.custom_op("sloth_unseen::computed", mutates_args=())
def computed(u: Tensor, limit: float, which: int) -> Tensor:
    return list(COMPUTED.values())[which](u, limit).clone()


computed.register_fake(lambda u, limit, which: torch.empty_like(u))


@pytest.mark.parametrize("which", range(len(COMPUTED)), ids=COMPUTED.keys())
@pytest.mark.parametrize("right", [True, False])
def test_in_any_way(which: int, right: bool) -> None:
    """What is computed is compared: another number in its place is not matched."""
    fn = list(COMPUTED.values())[which]
    construct = sloth.Construct("computed", "computed", anchor=lambda v: v.op in ("exp", "cos"))

    @sloth.pattern(construct, op=computed, dims={"u": "B S"}, name="computed", which=which)
    def entry(u: Tensor, *, limit: float) -> Tensor:
        return fn(u, limit)

    def call(m: Any, x: Tensor) -> Tensor:
        if right:
            return fn(x, 3.0)
        return [
            lambda u: u.clamp(max=-3.0).cos(),
            lambda u: (u * 3.0).exp() + 7.0,
            lambda u: u.exp() * 3.0 + 1.75,
            lambda u: (u + 1 / 3.0).exp() * (1 - 3.5) + 3.0,
        ][which](x)

    report = checked(Call(call).requires_grad_(False), X)
    assert [s.status == "matched" for s in report.sites] == [right]


def test_a_number_that_never_stands_by_itself_is_told() -> None:
    construct = sloth.Construct("computed", "computed", anchor=lambda v: v.op == "exp")

    @sloth.pattern(construct, op=computed, dims={"u": "B S"}, name="computed", which=1)
    def entry(u: Tensor, *, limit: float) -> Tensor:
        return (u * (limit * limit)).exp()

    (site,) = checked(Call(lambda m, x: (x * 9.0).exp()).requires_grad_(False), X).sites
    assert site.status == "structure" and "limit stands by itself" in site.reason


def test_a_number_that_a_check_relates_to_another() -> None:
    """The operator has no argument for it: the error says how it is written, and written so it works."""

    def related(gate: Tensor, up: Tensor, *, alpha: float, most: float, least: float) -> Tensor:
        gate = gate.clamp(max=most)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(least, most) + 1)

    with pytest.raises(sloth.PatternError, match=r"has no argument most, least; .* limit=lambda match: match.limit"):
        entered(related)
    entry = entered(related, limit=lambda match: match.most)
    entry.check(lambda match: match.require(match.least == -match.most, f"up is clamped to {match.least}, {match.most}"))
    assert [s.status for s in sites(model())] == ["matched"]
    (site,) = sites(model(least=-1.0))
    assert site.status == "check" and "up is clamped to -1.0, 2.0" in site.reason
    with pytest.raises(AssertionError, match=r"check: .*'most': .* numbers= of sloth.pattern"):
        check_pattern(entry)
    unregister("clamped")
    together = {"most": (2.0, 1.0), "least": (-2.0, -1.0)}
    entry = entered(related, limit=lambda match: match.most, numbers=together)
    entry.check(lambda match: match.require(match.least == -match.most, "one bound"))
    check_pattern(entry)


# ---------------------------------------------------------------- near misses that no anchor sees


NEAR: dict[str, tuple[dict[str, Any], str, str]] = {
    "a number": ({"least": -1.5}, "constant", "expected clamp with -2.0, found clamp"),
    "a number that stands twice": ({"inner": 3.0}, "constant", "expected"),
    "a function in the middle": ({"act": torch.tanh}, "structure", "expected sigmoid, found tanh"),
    "a function at the end": ({"tail": lambda u: u * u}, "structure", "expected add, found mul"),
    "a step more": ({"act": lambda x: torch.sigmoid(x).cos()}, "structure", "expected sigmoid, found cos"),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_reference_that_nearly_matches_is_reported(name: str) -> None:
    changes, status, reason = NEAR[name]
    entered()
    (site,) = sites(model(**changes))
    assert (site.construct, site.variant, site.status, site.file) == ("gated_mlp", "clamped[default]", status, __file__)
    assert site.reason.startswith(reason) and site.reason.endswith("(no anchor of gated_mlp sees this place)")


def test_a_match_that_is_refused_is_reported() -> None:
    entered().check(lambda match: match.require(match.limit == 7.0, f"limit is {match.limit}"))
    (site,) = sites(model())
    assert (site.status, site.reason) == ("check", "limit is 2.0 (no anchor of gated_mlp sees this place)")


def test_an_anchor_that_sees_the_place_tells_it_alone() -> None:
    entered(construct=sloth.Construct("clamped", "clamped", anchor=lambda v: v.op == "sigmoid"))
    (site,) = [s for s in sites(model(least=-1.5)) if s.construct == "clamped"]  # quick GELU nearly matches too
    assert site.status == "constant" and "no anchor" not in site.reason


def test_a_construct_without_an_anchor() -> None:
    entered(construct=sloth.Construct("clamped", "clamped"))
    (site,) = sites(model(act=torch.tanh))
    assert site.reason == "expected sigmoid, found tanh: `tanh` float32 [2, 3, 8] (no anchor of clamped sees this place)"


def test_other_code_is_no_near_miss() -> None:
    entered()
    assert not sites(Call(lambda m, x: torch.sigmoid(x * m.w) * (x + 1)))
    assert not sites(Call(lambda m, x: x.clamp(-2.0, 2.0) + 1))
    assert not [s for s in sites(Call(lambda m, x: F.silu(x * m.w) * (x * m.v))) if s.status != "matched"]


def test_what_modules_have_and_no_code_looks_like_is_told() -> None:
    """And only that: what was seen has a line of its own."""
    site = Site("rope", "", "structure", reason="another")
    report = Report(
        [GraphReport([site])], expected={"gated_mlp": 2, "rope": 1}, titles={"gated_mlp": "gated MLP", "rope": "RoPE"}
    )
    assert "2 gated MLP of the modules called: no code in these graphs looks like it" in str(report)
    assert "RoPE of the modules called" not in str(report)


def test_anchors_of_sloths_own_constructs_see_their_references() -> None:
    """But for that of weights in 4 bits, and of layers, which no reference makes."""
    blind = {str(v) for p in patterns() for v in p.variants if not v.is_seen}
    assert all(name.startswith(("linear_4bit[", "linear_4bit_rows[", "gated_layers")) for name in blind), blind
