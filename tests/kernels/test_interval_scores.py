"""The attention operator with scores that are no plain products (soft caps, sinks, biases), values of another width, and queries
that see nothing and weigh all keys alike: its kernels and its ATen path against eager."""

import contextlib

import pytest
import sympy
import torch
from common import DEVICE, compare, make, wide
from recorder import Recorder, interpret
from test_interval_attention import DTYPES, ids, mask_of, padding, small_tiles  # noqa: F401

from sloth.kernels.attention.attention import attention

S, SCALE = 70, 0.3
CAUSAL = ([], [], 0, None)
WINDOW = ([], [], 0, 20)
LEFT = ([], [padding(2, S, "left", 3)], 0, None)
RIGHT = ([], [padding(2, S, "right", 3)], 0, None)
HOLES = ([ids(2, S, 1, 0.05)], [padding(2, S, "holes", 4)], 0, 30)
EMPTY = ([], [padding(2, S, "nothing")], 0, None)
STRICT = ([], [], -1, None)

# name → mask, cap, which vectors, blind queries weigh all alike, width of values
CASES = {
    "cap": (CAUSAL, 2.0, (), False, 24),
    "wide cap": (WINDOW, 50.0, (), False, 24),
    "sinks": (CAUSAL, None, ("sinks",), False, 24),
    "sinks, left": (LEFT, None, ("sinks",), False, 24),
    "bias": (CAUSAL, None, ("bias",), False, 24),
    "bias, both sides": (([], [], 9, 9), None, ("bias",), False, 24),
    "bias, left": (LEFT, None, ("bias",), True, 24),
    "narrow values": (RIGHT, None, (), False, 8),
    "wide values": (HOLES, None, (), False, 40),
    "blind, left": (LEFT, None, (), True, 24),
    "blind, holes": (HOLES, None, (), True, 24),
    "blind, all": (EMPTY, None, (), True, 24),
    "blind, none": (RIGHT, None, (), True, 24),
    "blind, strict": (STRICT, None, (), True, 24),
    "all of these": (HOLES, 3.0, ("bias",), True, 40),
    "cap and sinks": (HOLES, 3.0, ("sinks",), False, 8),
}


def eager(how, softcap, vectors, uniform):
    """As models write it, the mask added to scores in fp32, whose least number absorbs them."""

    def function(q, k, v, *given):
        of = dict(zip(vectors, given, strict=True))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        s = q @ k.mT * SCALE
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        mask = mask_of(S, *how)
        s = wide(s)
        if "bias" in of:
            s = s + wide(of["bias"])[:, :, None]
        s = s + torch.where(mask, s.new_zeros(()), torch.finfo(s.dtype).min)
        if "sinks" in of:
            s = torch.cat((s, wide(of["sinks"])[:, None, None].expand(*s.shape[:-1], 1)), -1)
        p = s.softmax(-1)[..., :S]
        return (p if uniform else p * mask).to(v.dtype) @ v

    return function


def check(name, dtype, kernels=True):
    how, softcap, vectors, uniform, E = CASES[name]
    q, k, v = make((2, 2, S, 24), dtype), make((2, 1, S, 24), dtype, seed=1), make((2, 1, S, E), dtype, seed=2)
    shapes = {"sinks": (2,), "bias": (2, 2, S)}
    more = [make(shapes[vector], dtype, seed=3 + n) for n, vector in enumerate(vectors)]

    def ours(q, k, v, *given):
        documents, valid, ahead, behind = how
        of = dict(zip(vectors, given, strict=True))
        return attention(
            q, k, v, list(documents), list(valid), ahead, behind, scale=SCALE, softcap=softcap, uniform=uniform, **of
        )

    grads = [True] * 3 + [name == "sinks" for name in vectors]
    with interpret() if kernels else contextlib.nullcontext(), Recorder() as calls:
        compare(ours, eager(how, softcap, vectors, uniform), [q, k, v, *more], grads, strides=False, slack=8.0, few=5)
    assert bool(calls.named("interval_attention")) == kernels or DEVICE == "cuda"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.covered(1)
def test_scores(name, dtype):
    check(name, dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels take it there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_by_aten(name, dtype):
    check(name, dtype, kernels=False)


def test_blind_queries_take_the_mean_of_all_values():
    """And have the gradient that eager has, whose scores were swallowed, not cut off."""
    q, k, v = (make((2, 2, S, 8), torch.float32, seed=n).requires_grad_() for n in range(3))
    documents, valid, ahead, behind = LEFT
    with interpret():
        out = attention(q, k, v, documents, valid, ahead, behind, uniform=True)
        dq, dk = torch.autograd.grad(out[0, :, 0].square().sum(), (q, k))
    assert not valid[0][0, 0]
    torch.testing.assert_close(out[0, :, 0], v[0].mean(-2), rtol=1e-5, atol=1e-6)
    assert dq[0, :, 0].abs().min() > 0 and dk[0].abs().amin() > 0 and not dq[0, :, 1:].any() and not dk[1].any()


@pytest.mark.parametrize("D, E", [(192, 128), (64, 256), (16, 8)])
def test_widths_of_values(D, E):
    q, k, v = (
        make((1, 2, S, D), torch.float16),
        make((1, 1, S, D), torch.float16, seed=1),
        make((1, 1, S, E), torch.float16, seed=2),
    )
    with interpret():
        compare(lambda *t: attention(*t, [], [], 0, 20, scale=SCALE), eager(WINDOW, None, (), False), [q, k, v], strides=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_biases_that_count(dtype):
    """Of a long sequence they are large, where the scores that weigh differ little; one row for the batch, or with holes."""
    q, k, v = (make((2, 2, S, 24), dtype, seed=n) for n in range(3))
    counted = HOLES[1][0].cumsum(-1)[:, None] * (0.5 ** torch.arange(2, device=DEVICE))[:, None]
    for how, bias in ((CAUSAL, 1000 + torch.arange(S, device=DEVICE).expand(1, 2, S)), (HOLES, counted)):
        ours = lambda *t: attention(*t, how[0], how[1], *how[2:], scale=SCALE, bias=bias.to(dtype))  # noqa: B023, E731
        theirs = lambda *t: eager(how, None, ("bias",), False)(*t, bias.to(dtype))  # noqa: B023, E731
        with interpret():
            compare(ours, theirs, [q, k, v], strides=False)


def test_what_does_not_go_together():
    q = make((1, 1, 8, 8), torch.float32)
    with pytest.raises(RuntimeError, match="no dropout"):
        attention(q, q, q, [], [], 0, None, 0.5, softcap=2.0)
    with pytest.raises(RuntimeError, match="no bias beside sinks"):
        attention(q, q, q, [], [], 0, None, sinks=q[0, 0, 0, :1], bias=q[:, :, 0])


def test_formula():
    """The closed form of the docstring is the symbolic derivative: capped scores with a bias, and a sink."""
    x, v, g = sympy.symbols("x:3"), sympy.symbols("v:3"), sympy.Symbol("g")
    sink, bias, c = sympy.symbols("sink bias c", positive=True)
    s = [c * sympy.tanh(x[j] / c) + bias * (j - 2) for j in range(3)]
    total = sum(map(sympy.exp, s)) + sympy.exp(sink)
    p, p_sink = [sympy.exp(e) / total for e in s], sympy.exp(sink) / total
    out = sum(a * b for a, b in zip(p, v, strict=True))
    delta = g * out
    numbers = {e: sympy.Rational(n + 2, 7 + 3 * n) for n, e in enumerate((*x, *v, g, sink, bias, c))}
    for j in range(3):
        dx = p[j] * (g * v[j] - delta) * (1 - sympy.tanh(x[j] / c) ** 2)
        assert abs((g * out.diff(x[j]) - dx).evalf(30, subs=numbers)) < 1e-25
    assert abs((g * out.diff(sink) + p_sink * delta).evalf(30, subs=numbers)) < 1e-25
