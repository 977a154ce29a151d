"""The matcher: bindings, spellings that meet, the exact second look, pairs of results, choice, reasons for misses, cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import (
    Call,
    Norm,
    Stack,
    captured,
    checked,
    counts,
    inputs_like,
    llama_norm,
    matched,
    missed,
    normalise,
    rotate_half,
    tables,
    turned,
)

from sloth import options
from sloth.rewriter.graph.value import Value, ValueGraph
from sloth.rewriter.match.matcher import Match, Matcher
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.plan.choice import select_non_overlapping

BF16 = torch.bfloat16


def found(fn: Callable[..., Any], *tensors: Tensor) -> tuple[list[Match], list[Value], Matcher]:
    """All matches of sloth's entries in `fn`, its inputs, and the matcher."""
    shadow, mode = ValueGraph(), FakeTensorMode()
    inputs = inputs_like(shadow, list(tensors))
    normalise(shadow, fn, inputs, mode)
    matcher = Matcher(patterns(), mode)
    return list(matcher.matches(shadow.values)), inputs, matcher


def largest(fn: Callable[..., Any], *tensors: Tensor) -> Match | None:
    matches, *_ = found(fn, *tensors)
    return max(matches, key=lambda m: m.size, default=None)


def x_w(dtype: torch.dtype = torch.float32, weight: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return torch.empty(2, 3, 8, dtype=dtype), torch.empty(8, dtype=weight or dtype)


# ---------------------------------------------------------------- bindings


def test_bindings_go_by_the_names_of_the_reference() -> None:
    matches, (x, w), _ = found(lambda x, w: llama_norm(x, w, 3e-5), *x_w(BF16))
    match = max(matches, key=lambda m: m.size)
    assert str(match.variant) == "rms_norm[llama]" and match.pattern.name == "rms_norm"
    assert match.x is x and match.weight is w and match.eps == 3e-5
    assert x not in match.values and w not in match.values and match.roots[0] in match.values
    with pytest.raises(AttributeError, match="bias"):
        match.bias  # noqa: B018


def test_numbers_are_bound_wherever_they_stand() -> None:
    def capped(logits, target):
        z = torch.tanh(logits / 30.0) * 30.0
        return F.cross_entropy(z.float().view(-1, z.shape[-1]), target, ignore_index=-7)

    match = largest(capped, torch.empty(2, 3, 11, dtype=BF16), torch.empty(6, dtype=torch.int64))
    assert match is not None and match.numbers == {"softcap": 30.0, "ignore_index": -7, "loss_dtype": torch.float32}


def test_one_number_bound_twice_must_be_one_number() -> None:
    def capped(logits, target):
        z = torch.tanh(logits / 30.0) * 31.0
        return F.cross_entropy(z.float().view(-1, z.shape[-1]), target)

    match = largest(capped, torch.empty(2, 3, 11, dtype=BF16), torch.empty(6, dtype=torch.int64))
    assert match is not None and "softcap" not in match.numbers


def test_the_same_tensor_may_stand_for_two_operands() -> None:
    match = largest(lambda x, w: (h := x + x, llama_norm(h, w))[::1], *x_w())
    assert match is not None and match.pattern.name == "add_rms_norm" and match.x is match.residual


# ---------------------------------------------------------------- spellings

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": llama_norm,
    "weight behind": lambda x, w: (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * w,
    "rsqrt in front": lambda x, w: w * (torch.rsqrt(1e-6 + x.float().square().mean(-1, True)) * x.float()).type_as(x),
    "division": lambda x, w: w * (x.float() / torch.sqrt((x.float() * x.float()).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
    "power": lambda x, w: w * (x.float() * (x.float().pow(2).mean([-1], keepdim=True) + 1e-6) ** -0.5).to(x.dtype),
    "no-ops": lambda x, w: (
        w.view(8) * 1.0 * F.dropout(x.float() * torch.rsqrt(x.float().pow(2).mean(2, True) + 1e-6), 0.0).to(x.dtype)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_of_the_norm(spelling: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    match = largest(spelling, *x_w(dtype))
    assert match is not None and match.pattern.name == "rms_norm" and set(match.tensors) == {"x", "weight"}, match
    assert match.eps == 1e-6


@pytest.mark.parametrize("swap", range(4))
def test_commutativity_of_sums_and_products(swap: int) -> None:
    """Both products and both operands of the rotation's sum, in either order, in models without casts."""

    def rotation(x, cos, sin):
        a = cos * x if swap & 1 else x * cos
        b = sin * rotate_half(x)
        return b + a if swap & 2 else a + b

    match = largest(rotation, torch.empty(2, 2, 3, 8), *(torch.empty(2, 1, 3, 8) for _ in range(2)))
    assert match is not None and match.pattern.name == "rope_single"
    assert [match.tensors[n].args[0] for n in ("x", "cos", "sin")] == ["x0", "x1", "x2"]


def test_products_that_only_look_swapped() -> None:
    """sin on x and cos on the rotated x is no rotation by the same tables: cos and sin are bound the other way round."""
    match = largest(lambda x, cos, sin: x * sin + rotate_half(x) * cos, torch.empty(2, 2, 3, 8), *(torch.empty(2, 1, 3, 8),) * 2)
    assert match is not None and match.cos.args[0] == "x2" and match.sin.args[0] == "x1"


def test_casts_of_the_reference_may_be_absent() -> None:
    """In an fp32 model x.float() and .to(x.dtype) leave no trace; in bf16 both are there."""
    for dtype, casts in ((torch.float32, 0), (BF16, 2)):
        match = largest(llama_norm, *x_w(dtype))
        assert match is not None and sum(v.op == "cast" for v in match.values) == casts


# ---------------------------------------------------------------- the exact second look

# what is written, dtypes of x and weight → the entry that is right for it, or None
DTYPE_PLACEMENT: list[tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype, torch.dtype, str | None]] = [
    (llama_norm, BF16, BF16, "llama"),
    (llama_norm, BF16, torch.float32, "llama"),
    (lambda x, w: (w * (h := x.float()) * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-6)).to(x.dtype), BF16, BF16, None),
    (lambda x, w: (w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6))).to(x.dtype), BF16, BF16, "olmo2"),
    (
        lambda x, w: (w.float() * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6))).to(x.dtype),
        BF16,
        BF16,
        "helium",
    ),
    (
        lambda x, w: ((x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-6)) * (1.0 + w.float())).type_as(x),
        BF16,
        BF16,
        "gemma",
    ),
    # the variance in bf16
    (lambda x, w: w * (x.float() * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)).to(x.dtype), BF16, BF16, None),
    # everything in bf16: the operator is more exact
    (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)), BF16, BF16, "in_dtype"),
    # in fp16 instead of fp32
    (lambda x, w: w * (x.half() * torch.rsqrt(x.half().pow(2).mean(-1, True) + 1e-6)).to(x.dtype), BF16, BF16, None),
    # rounded to bf16 in the middle
    (
        lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True).bfloat16().float() + 1e-6)).to(x.dtype),
        BF16,
        BF16,
        None,
    ),
]


@pytest.mark.parametrize("number", range(len(DTYPE_PLACEMENT)))
def test_dtype_placement_is_semantics(number: int) -> None:
    fn, dtype, weight, expected = DTYPE_PLACEMENT[number]
    matches, _, matcher = found(fn, *x_w(dtype, weight))
    whole = max((m for m in matches if "weight" in m.tensors), key=lambda m: m.size, default=None)
    assert (whole and whole.variant.name) == expected
    if not expected and not matches:
        assert any(d.status == "dtype" for _, d in matcher.misses.values()), "the reason is the dtype"


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean over another dimension": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-6)),
    "mean over two dimensions": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), True) + 1e-6)),
    "third power": lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, True) + 1e-6)),
    "another x in the product": lambda x, w: w * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)),
    "another x in the square": lambda x, w: w * (x * torch.rsqrt((x * (x + 1)).mean(-1, True) + 1e-6)),
    "root for reciprocal root": lambda x, w: w * (x * torch.sqrt(x.pow(2).mean(-1, True) + 1e-6)),
    "eps outside of the root": lambda x, w: w * (x / (torch.sqrt(x.pow(2).mean(-1, True)) + 1e-6)),
    "eps as a tensor": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True) + w)),
    "eps subtracted": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True) - 1e-6)),
}


@pytest.mark.parametrize("fn", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_norm_is_not_matched(fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert largest(fn, *x_w()) is None


WRONG_ROTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sign": lambda x, c, s: x * c + torch.cat((x.chunk(2, -1)[1], -x.chunk(2, -1)[0]), -1) * s,
    "no sign": lambda x, c, s: x * c + torch.cat(x.chunk(2, -1)[::-1], -1) * s,
    "thirds": lambda x, c, s: x * c + torch.cat((-x[..., 3:], x[..., :3]), -1) * s,
    "difference": lambda x, c, s: x * c - rotate_half(x) * s,
    "another dimension": lambda x, c, s: x * c + torch.cat((-x.chunk(2, 1)[1], x.chunk(2, 1)[0]), 1) * s,
    "pairs the wrong way": lambda x, c, s: x * c + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * s,
    "two tensors": lambda x, c, s: x * c + rotate_half(x + 1) * s,
}


@pytest.mark.parametrize("fn", WRONG_ROTATIONS.values(), ids=WRONG_ROTATIONS.keys())
def test_what_is_no_rotation_is_not_matched(fn: Callable[..., Tensor]) -> None:
    assert largest(fn, torch.empty(2, 4, 3, 8), *(torch.empty(2, 1, 3, 8) for _ in range(2))) is None


def test_bounds_of_slices_count() -> None:
    """The loose look takes any bounds; the exact one wants those of the reference for these shapes."""

    def partial(cut):
        def fn(x, cos, sin):
            return torch.cat((turned(x[..., :cut], cos, sin), x[..., cut:]), -1)

        return fn

    tensors = torch.empty(2, 2, 3, 12), *(torch.empty(2, 1, 3, 8) for _ in range(2))
    match = largest(partial(8), *tensors)
    assert match is not None and match.variant.name.endswith("partial")

    def overlapping(x, cos, sin):
        return torch.cat((turned(x[..., :8], cos, sin), x[..., 6:]), -1)

    match = largest(overlapping, *tensors)
    assert match is None or not match.variant.name.endswith("partial")


def test_layer_norm_and_rms_norm_are_not_taken_for_each_other() -> None:
    def centred(x, w):
        h = x - x.mean(-1, keepdim=True)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    match = largest(centred, *x_w())
    assert match is not None and match.pattern.construct.name == "layer_norm"


# ---------------------------------------------------------------- pairs


def test_rotations_of_q_and_k_are_found_from_the_tables_they_share() -> None:
    """Several layers share cos and sin: q of a layer must meet k of the same layer."""

    def model(x, cos, sin):
        out = []
        for _ in range(3):
            q, k = (x * 2).exp(), x[:, :2].sin()
            out += [q, k]
            x = turned(q, cos, sin) + turned(k, cos, sin).repeat_interleave(2, 1)
        return (*out, x)

    shadow, mode = ValueGraph(), FakeTensorMode()
    inputs = inputs_like(shadow, [torch.empty(2, 4, 3, 8), *(torch.empty(2, 1, 3, 8) for _ in range(2))])
    *qk, _ = normalise(shadow, model, inputs, mode)
    accepted, _ = select_non_overlapping(list(Matcher(patterns(), mode).matches(shadow.values)))
    pairs = {frozenset((qk.index(m.q), qk.index(m.k))) for m in accepted if m.pattern.name == "rope"}
    assert pairs == {frozenset((0, 1)), frozenset((2, 3)), frozenset((4, 5))}


def test_pairs_in_a_model_of_several_layers() -> None:
    model = Stack(3)
    report = checked(model, torch.randn(2, 4, 8, requires_grad=True))
    assert counts(report)["rope"] == "3/3" and matched(report)["rope"] == 3


def test_a_rotation_without_partner_is_matched_alone() -> None:
    def fn(m, x):
        cos, sin = tables(2, 4, 8)
        return turned(x, cos, sin)

    assert matched(checked(Call(fn), torch.randn(2, 2, 4, 8, requires_grad=True))) == {"rope_single": 1}


def test_tables_that_differ_make_no_pair() -> None:
    def fn(m, x):
        cos, sin = tables(2, 4, 8)
        return turned(x, cos, sin), turned(x * 2, sin, cos)

    assert matched(checked(Call(fn), torch.randn(2, 2, 4, 8, requires_grad=True))) == {"rope_single": 2}


# ---------------------------------------------------------------- choice


def test_the_largest_match_wins_and_losers_are_no_misses() -> None:
    """residual + norm is one match; the norm inside it, and its part without the weight, are not reported as missed."""

    def fn(m, x):
        h = x + x.exp()
        return h, llama_norm(h, m.w)

    report = checked(Call(fn), torch.randn(2, 3, 8, requires_grad=True))
    assert [(s.variant, s.status) for s in report.sites] == [("add_rms_norm[llama]", "matched")]


def test_a_smaller_match_takes_the_place_of_one_that_is_refused() -> None:
    """A norm of a norm: the first, with the second's root for a weight, would be a match if nobody else read it."""

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    report = checked(Call(lambda m, x: (h := norm(x), norm(h) * m.w)), torch.randn(2, 3, 8, requires_grad=True))
    assert sorted((s.variant, s.status) for s in report.sites) == [
        ("rms_norm[llama]", "matched"),
        ("rms_norm[no_weight]", "matched"),
    ]
    report = checked(Call(lambda m, x: norm(norm(x))), torch.randn(2, 3, 8, requires_grad=True))
    assert [s.status for s in report.sites] == ["matched", "matched"]


def test_choice_takes_no_value_twice() -> None:
    matches, *_ = found(lambda x, r, w: (h := x + r, llama_norm(h, w)), torch.empty(2, 3, 8), *x_w())
    accepted, losers = select_non_overlapping(matches)
    assert len(accepted) == 1 and accepted[0].pattern.name == "add_rms_norm"
    assert "rms_norm" in {m.pattern.name for m, winner in losers if winner is accepted[0]}
    computed = [v for m in accepted for v in m.values]
    assert len(computed) == len(set(computed))


def test_two_norms_of_one_input_with_one_weight_are_one_value() -> None:
    report = checked(Call(lambda m, x: llama_norm(x, m.w) + llama_norm(x, m.w)), torch.randn(2, 3, 8, requires_grad=True))
    assert counts(report) == {"rms_norm": "1/1"}


# ---------------------------------------------------------------- reasons


def only_miss(
    fn: Callable[[Any, Tensor], Any], dtype: torch.dtype = torch.float32, construct: str = "rms_norm"
) -> tuple[str, str, str]:
    """(variant, status, reason) of the one site, which was missed."""
    report = checked(Call(fn).to(dtype), torch.randn(2, 3, 8).to(dtype).requires_grad_(), tolerance=5e-2)
    assert [s.construct for s in report.sites] == [construct], report.to_json()
    (site,) = missed(report)
    assert site.file in (__file__, llama_norm.__code__.co_filename) and site.line > 0
    return site.variant, site.status, site.reason


def test_reason_wrong_dimension() -> None:
    variant, status, reason = only_miss(lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(1, True) + 1e-6)))
    assert status in ("constant", "structure") and "(2,)" in reason and "mean" in reason, (variant, status, reason)


def test_reason_missing_cast() -> None:
    variant, status, reason = only_miss(
        lambda m, x: m.w * (x.float() * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)).to(x.dtype), BF16
    )
    assert status == "dtype" and "float32" in reason or "cast" in reason, (variant, status, reason)


@pytest.fixture
def without_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only entries that know neither weights of classes nor smoothing."""
    monkeypatch.setattr(options, "patterns", lambda: [p for p in patterns() if p.name != "cross_entropy_terms"])


def test_reason_weight_where_there_should_be_none(without_terms: None) -> None:
    """Weights of classes: the entries have None there."""
    target = torch.randint(8, (6,))

    def fn(m, x):
        return F.cross_entropy(x.float().view(-1, 8), target, weight=m.w.detach())

    variant, status, reason = only_miss(fn, construct="cross_entropy")
    assert variant.startswith("cross_entropy[") and status == "constant"
    assert "cross_entropy_loss with None" in reason, reason


def test_reason_another_constant(without_terms: None) -> None:
    target = torch.randint(8, (6,))
    _, status, reason = only_miss(
        lambda m, x: F.cross_entropy((x * m.w).view(-1, 8), target, label_smoothing=0.1), construct="cross_entropy"
    )
    assert status == "constant" and "cross_entropy_loss with 0.0" in reason, reason


def test_a_centred_norm_without_weight_is_a_layer_norm() -> None:
    def fn(m, x):
        h = x - x.mean(-1, keepdim=True)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) + m.w

    assert [s.variant for s in checked(Call(fn), torch.randn(2, 3, 8, requires_grad=True)).sites] == ["layer_norm[written_plain]"]


def test_reason_extra_operation_in_the_middle() -> None:
    variant, status, reason = only_miss(lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6).clamp(max=10)))
    assert status == "structure" and variant.startswith("rms_norm["), (variant, status, reason)
    assert "expected mul after rsqrt: `rsqrt` float32 [" in reason and "found clamp" in reason, reason


def test_reason_names_the_line_of_the_difference() -> None:
    def fn(m, x):
        h = x.pow(2)
        h = h.mean(1, keepdim=True)  # the line
        return m.w * (x * torch.rsqrt(h + 1e-6))

    report = checked(Call(fn), torch.randn(2, 3, 8, requires_grad=True))
    (site,) = missed(report)
    first = fn.__code__.co_firstlineno
    assert site.file == __file__ and first < site.line <= first + 3


# ---------------------------------------------------------------- cost


def layers_of(count: int) -> Callable[..., Any]:
    def model(x, w, v, cos, sin):
        for _ in range(count):
            h = llama_norm(x, w)
            q = h.view(1, 4, 2, 8).transpose(1, 2)
            q, k = turned(q @ v, cos, sin), turned(q * 2, cos, sin)
            x = x + (q + k).transpose(1, 2).flatten(2)
            h = llama_norm(x, w)
            x = x + F.silu(h * 3) * h.exp()
        return x

    return model


def matching_seconds(layers: int) -> float:
    shadow, mode = ValueGraph(), FakeTensorMode()
    tensors = torch.empty(1, 4, 16), torch.empty(16), torch.empty(8, 8), torch.empty(1, 1, 4, 8), torch.empty(1, 1, 4, 8)
    normalise(shadow, layers_of(layers), inputs_like(shadow, list(tensors)), mode)
    best = float("inf")
    for _ in range(3):
        matcher = Matcher(patterns(), mode)
        start = time.process_time()
        accepted, _ = select_non_overlapping(list(matcher.matches(shadow.values)))
        best = min(best, time.process_time() - start)
    assert len(accepted) == 4 * layers, "two norms, a rotation and an MLP for each layer"
    return best


def test_cost_grows_with_the_layers_and_not_with_their_square() -> None:
    """q and k of every layer hang on the same tables: the search for partners must not look at all of them."""
    assert matching_seconds(40) / matching_seconds(10) < 8


def test_references_are_traced_once_for_all_sites_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth.rewriter.match import pattern

    traced = []
    trace = pattern.trace
    monkeypatch.setattr(pattern, "trace", lambda *a: traced.append(1) or trace(*a))
    numbers = []
    for layers in (2, 8):
        traced.clear()
        found(layers_of(layers), torch.empty(1, 4, 16), torch.empty(16), torch.empty(8, 8), *(torch.empty(1, 1, 4, 8),) * 2)
        numbers.append(len(traced))
    assert numbers[0] == numbers[1] < 60


def test_norms_of_different_width_are_traced_apart() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Norm(8), Norm(4, eps=1e-3)

        def forward(self, x):
            return self.a(x), self.b(x[..., :4])

    assert counts(checked(Two(), torch.randn(2, 3, 8, requires_grad=True))) == {"rms_norm": "2/2"}


def test_all_the_graph_is_looked_at_and_nothing_invented() -> None:
    (view,) = captured(Stack(2), torch.randn(1, 4, 8))
    matcher = Matcher(patterns(), FakeTensorMode())
    for match in matcher.matches(view.shadow.values):
        assert match.values <= set(view.shadow.values)
        assert all(v in view.shadow.values for v in match.tensors.values())
        assert not set(match.tensors.values()) & match.values


def test_tracing_references_leaves_random_numbers_and_threads_alone() -> None:
    """Small tensors are run through them; some drop out."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for entry in patterns():
        for variant in entry.variants:
            variant._traced_loose()
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_a_difference_has_an_order() -> None:
    """A LayerNorm of mean − x is one with the other sign."""

    def fn(m: Any, x: Tensor) -> Tensor:
        h = x.mean(-1, keepdim=True) - x
        return m.w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))

    assert not matched(checked(Call(fn), torch.randn(2, 3, 8).requires_grad_()))["layer_norm"]
