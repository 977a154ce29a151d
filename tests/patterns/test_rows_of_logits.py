"""Losses of a part of the logits: the same operator, of the hidden states and words that count; logits given out stay whole."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, compare, make, wide
from inner import OPTIONS as QUICK

from sloth.lazy.functions import LazyLogits, materialize
from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED

B, S, H, V = 2, 9, 16, 40
NEXT = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(7)).to(DEVICE)
NEXT[:, 2:4] = -100
FEW = NEXT.clamp(max=29)


def mean(z, labels):
    return F.cross_entropy(wide(z), labels)


SPELLINGS = {
    "contiguous view": lambda z: mean(z[:, :-1].contiguous().view(-1, V), NEXT[:, 1:].contiguous().view(-1)),
    "flatten": lambda z: mean(z[..., :-1, :].flatten(0, 1), NEXT[..., 1:].flatten()),
    "cast first": lambda z: mean(wide(z)[:, :-1, :].reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "cast between": lambda z: mean(wide(z[:, :-1]).reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "narrow": lambda z: mean(z.narrow(1, 0, z.shape[1] - 1).reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "twice": lambda z: mean(z[:, 1:][:1, :-1].reshape(-1, V), NEXT[:1, 2:].reshape(-1)),
    "every other": lambda z: mean(z[:, ::2].reshape(-1, V), NEXT[:, ::2].reshape(-1)),
    "one sequence": lambda z: mean(z[1, :-1], NEXT[1, 1:]),
    "flat first": lambda z: mean(z.view(-1, V)[:-1], NEXT.view(-1)[1:]),
    "scaled, capped": lambda z: mean((torch.tanh(wide(z) / 5.0) * 5.0)[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "vocabulary": lambda z: mean(z[..., :30].reshape(-1, 30), FEW.reshape(-1)),
    "vocabulary, flat": lambda z: mean(z.view(-1, V)[:, :30], FEW.reshape(-1)),
    "vocabulary from 10 on, shifted": lambda z: mean(z[:, :-1, 10:].reshape(-1, 30), FEW[:, 1:].reshape(-1)),
    "classes second": lambda z: mean(z.transpose(1, 2), NEXT),
    "classes second, shifted": lambda z: mean(wide(z)[:, :-1].mT, NEXT[:, 1:]),
    "classes second of four": lambda z: mean(z.view(B, 3, 3, V).permute(0, 3, 1, 2), NEXT.view(B, 3, 3)),
    "all ignored but one": lambda z: mean(z[:, :1].reshape(-1, V), NEXT[:, 1:2].reshape(-1)),
}
OTHERS = {  # another row or word of these is another number
    "softmax over positions": lambda z: mean(z.softmax(1)[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "classes and sequences exchanged": lambda z: mean(z.permute(1, 2, 0), NEXT.t()),
    "probabilities of classes": lambda z: mean(z.transpose(1, 2), wide(z).detach().transpose(1, 2).softmax(1)),
    "positions reversed": lambda z: mean(z.flip(1)[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "words reversed": lambda z: mean(z.flip(-1)[..., :30].reshape(-1, 30), FEW.reshape(-1)),
    "regrouped": lambda z: mean(z.reshape(B, S, 2, V // 2)[:, :, 0].reshape(-1, V // 2), FEW.clamp(max=19).reshape(-1)),
    "two losses": lambda z: mean(z[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)) + mean(z[:, -1], NEXT[:, 0]),
    "a norm too": lambda z: mean(z[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)) + wide(z).square().mean(),
    "written": lambda z: mean(z[:, :-1].clone().mul_(2).reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "written behind": lambda z: mean(z.mul_(2)[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)),
    "without gradient": lambda z: mean(z.detach()[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1)) + wide(z).square().mean(),
}


def tensors(dtype, bias=True):
    return [make((B, S, H), dtype, seed=1), make((V, H), dtype, seed=2, scale=0.3), *[make((V,), dtype, seed=3)] * bias]


def compiled(fn, dynamic=None, **options):
    """`fn` of hidden states and a head with the backend, and the variants that its losses were matched by."""
    torch._dynamo.reset()
    ours = torch.compile(fn, backend="sloth", dynamic=dynamic, options=QUICK | options)
    variants = []

    def run(*leaves):
        for weight in leaves[1:]:  # as those of a module are
            torch._dynamo.mark_static(weight)
        with listening() as reports:
            out = ours(*leaves)
        assert not any(r.untouched for r in reports), reports
        variants.extend(s.variant for r in reports for s in r.sites if (s.construct, s.status) == ("cross_entropy", MATCHED))
        return out

    return run, variants


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.covered(1)
def test_spellings(name, dynamic):
    fn = lambda h, w, b=None: SPELLINGS[name](F.linear(h, w, b))  # noqa: E731
    run, variants = compiled(fn, dynamic)
    compare(
        run,
        fn,
        tensors(torch.float32, bias=name != "scaled, capped"),
        None,
        [torch.tensor(0.7, device=DEVICE)],
        slack=8,
        scale=1.0,
    )
    assert variants and all(v.startswith("linear_cross_entropy[") for v in variants), variants


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["contiguous view", "cast first", "vocabulary"])
@pytest.mark.covered(1)
def test_low_precision(name, dtype):
    fn = lambda h, w: SPELLINGS[name](F.linear(h, w))  # noqa: E731
    run, variants = compiled(fn)
    compare(run, fn, tensors(dtype, bias=False), None, [torch.tensor(1.0, device=DEVICE)], slack=2**12, few=64)
    assert [v.split("[")[0] for v in variants] == ["linear_cross_entropy"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_part_of_the_logits(name):
    fn = lambda h, w: OTHERS[name](F.linear(h, w))  # noqa: E731
    run, variants = compiled(fn)
    compare(run, fn, tensors(torch.float32, bias=False), None, [torch.tensor(0.7, device=DEVICE)], slack=8, scale=1.0)
    assert not any(v.startswith("linear_cross_entropy[") for v in variants), variants


@pytest.mark.parametrize("name", ["contiguous view", "cast first", "vocabulary from 10 on, shifted"])
def test_logits_on_given_ones_where_the_head_is_disabled(name):
    """The normal form knows of no logits that the graph has not."""
    fn = lambda h, w: SPELLINGS[name](F.linear(h, w))  # noqa: E731
    run, variants = compiled(fn, **{"sloth.disable": "linear_cross_entropy"})
    compare(run, fn, tensors(torch.bfloat16, bias=False), None, [torch.tensor(1.0, device=DEVICE)], slack=2**12, few=64)
    assert [v.split("[")[0] for v in variants] == ["cross_entropy"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["contiguous view", "cast first", "vocabulary"])
@pytest.mark.parametrize("given", ["whole", "words"])
@pytest.mark.covered(1)
def test_logits_given_out_are_computed_when_they_are_read(name, dynamic, given):
    def fn(h, w):
        z = F.linear(h, w)
        return SPELLINGS[name](z), z if given == "whole" else z[..., :30]

    leaves = [t.requires_grad_() for t in tensors(torch.float32, bias=False)]
    run, variants = compiled(fn, dynamic)
    (loss, logits), (eager, real) = run(*leaves), fn(*leaves)
    lazy = given == "whole" or name == "vocabulary"  # the words of this loss; others are somebody's own use of the logits
    assert isinstance(logits, LazyLogits) == lazy and all(v.startswith("linear") == lazy for v in variants)
    torch.testing.assert_close(materialize(logits), real)
    both = [torch.autograd.grad(a + b.square().mean(), leaves) for a, b in ((loss, logits), (eager, real))]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)


def test_a_padded_head_gets_gradients_for_its_words_alone():
    leaves = [t.requires_grad_() for t in tensors(torch.float32)]
    run, _ = compiled(lambda h, w, b: SPELLINGS["vocabulary"](F.linear(h, w, b)))
    _, dw, db = torch.autograd.grad(run(*leaves), leaves)
    assert dw[:30].any(1).all() and not dw[30:].any() and db[:30].all() and not db[30:].any()


def test_a_label_beyond_the_words_is_refused():
    h, w, _ = tensors(torch.float32)
    run, _ = compiled(lambda h, w: mean(F.linear(h, w)[..., :30].reshape(-1, 30), torch.full((B * S,), 35, device=DEVICE)))
    if DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            run(h, w)
    else:
        assert run(h, w).isnan()


CLASSES = torch.linspace(0.1, 2, V, device=DEVICE)
TERMS = {
    "smooth": lambda z: F.cross_entropy(wide(z)[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1), label_smoothing=0.1),
    "classes": lambda z: F.cross_entropy(wide(z)[:, :-1].flatten(0, 1), NEXT[:, 1:].flatten(), CLASSES.to(wide(z).dtype)),
    "each token": lambda z: F.cross_entropy(wide(z)[:, :-1].flatten(0, 1), NEXT[:, 1:].flatten(), reduction="none")[1:].sum() / 7,
    "each token, classes second": lambda z: F.cross_entropy(wide(z).mT, NEXT, reduction="none").mul(NEXT > 7).sum() / 7,
    "z-loss": lambda z: mean(z.view(-1, V), NEXT.view(-1)) + 0.01 * wide(z.logsumexp(-1)).pow(2).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name, entry", zip(TERMS, ("terms", "terms", "rows", "rows", "terms"), strict=True))
@pytest.mark.covered(1)
def test_what_is_added_to_a_loss(name, entry, dtype):
    fn = lambda h, w: TERMS[name](F.linear(h, w))  # noqa: E731
    run, variants = compiled(fn)
    slack = 8 if dtype == torch.float32 else 2**12
    compare(run, fn, tensors(dtype, bias=False), None, [torch.tensor(1.0, device=DEVICE)], slack=slack, few=64)
    assert [v.split("[")[0] for v in variants] == [f"linear_cross_entropy_{entry}"]


ADAPTED = TERMS | {
    "bias": lambda z: mean(z.view(-1, V), NEXT.view(-1)),
    "items": lambda z: F.cross_entropy(
        wide(z).view(-1, V), NEXT.view(-1), label_smoothing=0.1, reduction="sum"
    ) / torch.tensor(37.0, device=DEVICE),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.covered(1)
def test_what_is_added_to_a_loss_of_an_adapted_head(name, dtype):
    """Each row's loss has no operator that knows adapters: the adapter's own computes the logits."""
    given = tensors(dtype, bias=name == "bias")
    given += [make((B, S, 3), dtype, seed=4), make((V, 3), dtype, seed=5, scale=0.3)]

    def fn(h, w, *more):
        *bias, a, b = more
        base = F.linear(h, w, *bias)
        return ADAPTED[name]((base + F.linear(a, b) * 1.7).to(base.dtype))

    run, variants = compiled(fn)
    slack = 8 if dtype == torch.float32 else 2**12
    compare(run, fn, given, None, [torch.tensor(1.0, device=DEVICE)], slack=slack, few=64)
    headed = [v.startswith("linear_cross_entropy") and "adapter" in v for v in variants]
    assert headed == ["each" not in name] and len(variants) == 1, variants


@pytest.mark.parametrize("entry", ["linear_cross_entropy_terms", "linear_cross_entropy", "cross_entropy_terms", "cross_entropy"])
def test_sizes_stay_symbols(entry):
    """No operator's check of its operands makes them constants."""
    h, w, _, a, b = *tensors(torch.float32), make((B, S, 3), torch.float32, seed=4), make((V, 3), torch.float32, seed=5)
    labels = NEXT.clone()
    for t in (h, a, labels):
        torch._dynamo.mark_dynamic(t, 1)

    def fn(h, w, a, b, labels):
        logits = F.linear(h, w) + F.linear(a, b) * 1.7
        return F.cross_entropy(logits.view(-1, V), labels.view(-1), label_smoothing=0.1 * entry.endswith("terms"))

    headed = "linear_cross_entropy,linear_cross_entropy_terms"
    run, variants = compiled(fn, **({} if entry.startswith("linear") else {"sloth.disable": headed}))
    torch.testing.assert_close(run(h, w, a, b, labels), fn(h, w, a, b, labels))
    assert [v.split("[")[0] for v in variants] == [entry]


IN_ITS_OWN_PRECISION = {
    "mean": lambda z: F.cross_entropy(z.view(-1, V), NEXT.view(-1)),
    "shifted": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), NEXT[:, 1:].reshape(-1), reduction="sum"),
    "capped": lambda z: F.cross_entropy((torch.tanh(z / 5.0) * 5.0).view(-1, V), NEXT.view(-1)),
    "each token": lambda z: F.cross_entropy(z.view(-1, V), NEXT.view(-1), reduction="none")[1:].sum() / 7,
    "smooth": lambda z: F.cross_entropy(z.view(-1, V), NEXT.view(-1), label_smoothing=0.1),
    "classes": lambda z: F.cross_entropy(z.view(-1, V), NEXT.view(-1), CLASSES.to(z.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "disabled", ["", "linear_cross_entropy,linear_cross_entropy_terms,linear_cross_entropy_rows"], ids=["head", "logits"]
)
@pytest.mark.parametrize("name", IN_ITS_OWN_PRECISION)
@pytest.mark.covered(1)
def test_a_loss_that_nobody_casts(name, dtype, disabled):
    """Its result is of the logits' dtype, and computed in fp32 all the same."""
    fn = lambda h, w: IN_ITS_OWN_PRECISION[name](F.linear(h, w))  # noqa: E731
    run, variants = compiled(fn, **({"sloth.disable": disabled} if disabled else {}))
    compare(run, fn, tensors(dtype, bias=False), None, [torch.tensor(1.0, device=DEVICE, dtype=dtype)], slack=2**12, few=64)
    others = {"each token": "_rows", "smooth": "_terms", "classes": "_terms"}
    whole = "cross_entropy_terms" if name in others else "cross_entropy"  # of logits that are there
    assert [v.split("[")[0] for v in variants] == [whole if disabled else f"linear_cross_entropy{others.get(name, '')}"]


def test_a_loss_in_another_precision_is_left_alone():
    fn = lambda h, w: F.cross_entropy(F.linear(h, w).view(-1, V).double(), NEXT.view(-1))  # noqa: E731
    run, variants = compiled(fn)
    leaves = tensors(torch.bfloat16, bias=False)
    assert torch.equal(run(*leaves), fn(*leaves)) and not variants
