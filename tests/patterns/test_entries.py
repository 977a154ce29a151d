"""Every variant of every registered entry, tested from the entry alone: a new entry is tested by being registered."""

import copy
import functools
import random

import pytest
import torch
from common import LAYOUTS, cases, compare
from harness import ENTRIES, VARIANTS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sloth.rewriter.backend import listening
from sloth.rewriter.match.registry import patterns
from sloth.rewriter.pipeline import rewrite
from sloth.rewriter.plan.lazy_outputs import wrap_outputs
from sloth.testing.graphs import captured, described, doubled
from sloth.testing.mutants import mutants
from sloth.testing.samples import (
    accepts,
    arguments,
    cotangents,
    expression,
    made_match,
    numbers,
    operator_of,
    outputs,
    random_tensor,
    reference,
    sample,
    sites,
)  # fmt: skip

FIRST, NEXT = 2, 3  # variants of an entry in each run of the suite, and in each night; the others belong to the sweep


def tier(variant):
    at = variant.pattern.variants.index(variant)
    return [pytest.mark.sweep] if at >= NEXT else [pytest.mark.nightly] if at >= FIRST else []


each_variant = pytest.mark.parametrize("variant", [pytest.param(v, marks=tier(v)) for v in VARIANTS], ids=str)
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda p: p.name)
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
floats = pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS.keys())


class References(torch.nn.Module):
    """Calls every reference of an entry on tensors of its own, each in a checkpoint if wanted.

    With `shared`, they get their tensors plus a constant: shared leaves then are different values (and few symbolic sizes). The
    constant is never 1, by which the weight of a norm becomes that of another form.
    """

    def __init__(self, entry, dtype, checkpointed=False, shared=False):
        super().__init__()
        self.calls = [functools.partial(v.reference, **numbers(v, dtype)) for v in entry.variants]
        self.checkpointed, self.shared = checkpointed, shared

    def forward(self, *tensors):
        if self.shared:
            tensors = [[t + (i + 0.5) / 64 if t.is_floating_point() else t for t in own] for i, own in enumerate(tensors)]
        call = functools.partial(checkpoint, use_reentrant=False) if self.checkpointed else lambda function, *own: function(*own)
        return [call(function, *own) for function, own in zip(self.calls, tensors, strict=True)]


def results(model, tensors):
    """For each variant its outputs and gradients."""
    out = [outputs(result) for result in model(*tensors)]
    flat = [t for own in out for t in own]
    loss = sum((t.float() * d).sum() for t, d in zip(flat, cotangents(flat), strict=True))
    found = iter(torch.autograd.grad(loss, [t for own in tensors for t in own if t.requires_grad]))
    return [[*mine, *(next(found) for t in own if t.requires_grad)] for mine, own in zip(out, tensors, strict=True)]


# ---------------------------------------------------------------- the entry matches its own reference


WAYS = [pytest.param(dtype, how, id=f"{how}-{name}", marks=[pytest.mark.sweep] * (how == "dynamic" and name == "bf16"))
        for how in ("static", "dynamic", "autocast", "checkpoint") for name, dtype in FLOATS.items()]  # fmt: skip


@each_entry
@pytest.mark.parametrize(("dtype", "how"), WAYS)
@pytest.mark.covered(2, entry=lambda entry: entry.construct.name)
def test_matches_its_own_references(entry, dtype, how):
    """Each variant once and whole, and what is compiled gives the references' values and gradients."""
    model, tensors = References(entry, dtype, how == "checkpoint", how == "dynamic"), [sample(v, dtype) for v in entry.variants]
    if how == "dynamic":
        leaves = {}
        for variant, own in zip(entry.variants, tensors, strict=True):
            own[:] = [leaves.setdefault((n, t.shape), t) for n, t in zip(variant.tensors, own, strict=True)]
    torch._dynamo.reset()
    inner = "aot_eager" if how == "static" else "eager"  # quicker, and the rewritten graph is the same
    compiled = torch.compile(model, backend="sloth", dynamic=how == "dynamic", options={"sloth.inner_backend": inner})
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        with listening() as reports:
            found = results(compiled, tensors)
        eager = results(model, tensors)
    matched, missed = sites(reports, entry)
    assert not missed, missed
    names = {str(v): v for v in entry.variants}
    assert len(matched) == len(entry.variants) and all(s.variant in names for s in matched), matched
    for variant, site in zip(entry.variants, matched, strict=True):  # sites are told in the order of the graph
        same = site.variant == str(variant) or expression(names[site.variant], dtype) == expression(variant, dtype)
        assert same or how == "autocast", (str(variant), site)
    tolerance = 2e-6 if dtype == torch.float32 and how != "autocast" else 3e-2
    for variant, ours, theirs in zip(entry.variants, found, eager, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.dtype == b.dtype, (str(variant), i)
            assert (a - b).double().norm() <= tolerance * max(b.double().norm().item(), 1e-3), (str(variant), i)


# ---------------------------------------------------------------- what is nearly the reference is not taken for it

SAMPLED = 6  # mutants of each variant; `make sweep` tries all


def rewritten(gm, tensors, entry):
    """A copy of `gm` as the backend runs it, and the report."""
    copied = copy.deepcopy(gm)
    assert described(copied, tensors)
    report = rewrite(copied, [p for p in patterns() if p.construct is entry.construct], [entry.construct])
    return wrap_outputs(copied, report.deferred), report


def assert_same(ours, eager, exact, name, dtype):
    """No further from the truth than twice what eager is (where gradients meet, one may be rounded twice), and ulps for luck: of
    the operands' dtype, in which logits are rounded on the way to a loss in fp32.
    """
    assert [t is None for t in ours] == [t is None for t in eager], f"{name}: gradients lost or won"
    size = max(t.double().norm().item() for t in exact if t is not None)
    low = any(t is not None and t.dtype in (torch.bfloat16, torch.float16) for t in ours) or dtype != torch.float32
    luck = 1e-3 if low else 4e-6
    for i, (a, b, c) in enumerate(zip(ours, eager, exact, strict=True)):
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, (name, i)
            error, limit = ((t.double() - c.double()).norm().item() for t in (a, b))
            assert error <= 2 * limit + luck * size, (name, i, error, limit)


def calls(function, tensors):
    """Outputs and gradients, None where eager refuses (gradients through what was written in place)."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    with torch.enable_grad():
        out = outputs(function(*leaves))
    if any(t.grad_fn is None and t.requires_grad for t in out):
        return None
    loss = sum((t.double() * d.double()).sum() for t, d in zip(out, cotangents(out), strict=True) if t.is_floating_point())
    wanted = [t for t in leaves if t.requires_grad]
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return [*out], [None] * len(wanted)
    return [*out], list(torch.autograd.grad(loss, wanted, allow_unused=True))


def meaningful(t):
    """Finite, and of operands around 1 not made by division by next to nothing, where one rounding decides about everything."""
    return bool(torch.isfinite(t).all()) and t.double().norm().item() < 1e6


def check_mutant(variant, gm, what, dtype):
    """Rewritten or not, the mutant still computes what it says. Returns whether the entry was matched in it."""
    tensors = sample(variant, dtype)
    if not described(gm, tensors):
        return None
    try:
        eager = calls(gm, tensors)
        exact = calls(
            doubled(gm), [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
        )
    except (RuntimeError, IndexError):  # eager itself refuses it
        return None
    if eager is None or exact is None or not all(meaningful(t) for t in (*exact[0], *exact[1]) if t is not None):
        return None
    ours, report = rewritten(gm, tensors, variant.pattern)
    assert not report.untouched, (what, report.untouched)
    matched, missed = sites([report], variant.pattern)
    assert all(s.reason for s in missed), what
    if matched:
        found = calls(ours, tensors)
        computed = {n.meta["example_value"].dtype for n in gm.graph.nodes if isinstance(n.meta["example_value"], torch.Tensor)}
        lowest = min((t for t in computed if t.is_floating_point), key=lambda t: t.itemsize)  # the mutant's own
        assert_same([*found[0], *found[1]], [*eager[0], *eager[1]], [*exact[0], *exact[1]], what, lowest)
    return any(s.variant.startswith(variant.pattern.name + "[") for s in matched)


def check_mutants(variant, dtype, limit):
    gm = captured(variant, dtype)
    edits = list(mutants(gm))
    random.Random(str(variant)).shuffle(edits)
    steps = len([n for n in gm.graph.nodes if n.op.startswith("call")])
    told, tried = [], 0
    for what, edit in edits:
        if limit and tried >= limit and False in told:
            break
        try:
            edited = edit()
        except RuntimeError:  # not a graph
            continue
        verdict = check_mutant(variant, edited, f"{variant}, {what}", dtype)
        tried += verdict is not None
        told.append(verdict)
    assert False in told or steps < 4, told  # what is more than one call is told apart from something


@each_variant
def test_mutants_keep_their_meaning(variant):
    """One change to the reference: it is not matched, or what is put in its place computes the changed code."""
    check_mutants(variant, torch.float32 if len(str(variant)) % 2 else torch.bfloat16, SAMPLED)


@pytest.mark.sweep
@each_variant
@floats
def test_all_mutants_keep_their_meaning(variant, dtype):
    check_mutants(variant, dtype, None)


# ---------------------------------------------------------------- the entry's operator computes its reference


@each_variant
@settings(cases, max_examples=4)
@given(st.data())
def test_operator_computes_the_reference(variant, data):
    """Forward and all gradients, of any sizes, layouts and dtypes that the rewriter accepts: no worse than eager beside fp64."""
    letters = sorted({c for spec in variant.dims.values() for c in spec if c.isupper()})
    sizes = {c: variant.pattern.sizes.get(c) or data.draw(st.integers(1, 9), label=c) for c in letters}
    dtypes = data.draw(st.sampled_from([[torch.float32], [torch.bfloat16], [torch.float16], [torch.float32, torch.bfloat16]]))
    turn = data.draw(st.integers(0, 2), label="numbers")
    described, grads = [], []
    for i, name in enumerate(variant.tensors):
        meta = variant.meta(name, sizes, data.draw(st.sampled_from(dtypes)))
        layout = data.draw(st.sampled_from(LAYOUTS if len(meta.shape) > 1 else ["contiguous"]))
        described.append((name, meta, 64 * data.draw(st.integers(0, 999)) + i, layout))
        grads.append(name not in variant.pattern.no_grad and meta.dtype.is_floating_point and data.draw(st.booleans()))

    def draw(salt: int):
        below = min(sizes.values())
        tensors = [random_tensor(name, meta, variant, seed + salt, layout, below) for name, meta, seed, layout in described]
        with torch.no_grad():
            return tensors, cotangents(outputs(reference(variant, turn)(*tensors)), salt)

    try:
        tensors, douts = draw(0)
        assume(accepts(made_match(variant, tensors, turn)))
    except (RuntimeError, IndexError, ValueError):  # eager does not take these dtypes or sizes
        assume(False)
    eps = max(torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point())
    logits = "hidden" in variant.tensors  # rounded on the way to sums that may cancel, to nothing where all classes are the same
    functions, bounds = (
        (operator_of(variant, turn), reference(variant, turn)),
        {"slack": 16 + logits * 0.25 * eps * 2**23, "scale": 1.0},
    )
    compare(*functions, tensors, grads, douts, **bounds, few=64, strides=False, again=draw)


def exact_sample(variant):
    sizes = {c: variant.pattern.sizes.get(c, 2) for spec in variant.dims.values() for c in spec if c.isupper()}
    return [random_tensor(t, variant.meta(t, sizes, torch.float64), variant, 64 * i + 3) for i, t in enumerate(variant.tensors)]


@each_variant
def test_in_fp64_operator_and_reference_agree_and_the_backward_is_the_derivative(variant):
    tensors = exact_sample(variant)
    ours, theirs = outputs(operator_of(variant)(*tensors)), outputs(reference(variant)(*tensors))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for name, t in zip(variant.tensors, tensors, strict=True):
        t.requires_grad_(t.is_floating_point() and name not in variant.pattern.no_grad)
    torch.autograd.gradcheck(operator_of(variant), tensors, fast_mode=True)
    if len(ours) > 1:  # gradcheck takes one result at a time: also where all of them have gradients
        torch.autograd.gradcheck(lambda *t: torch.cat([o.flatten() for o in operator_of(variant)(*t)]), tensors, fast_mode=True)


@each_entry
def test_operator_obeys_the_rules_of_torch_library(entry):
    for variant in entry.variants[:1]:
        torch.library.opcheck(entry.op, arguments(variant, sample(variant, torch.float32)))
