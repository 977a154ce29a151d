"""The attention operator with masks of which nothing is known: intervals are measured; the mask is read in their holes."""

import pytest
import torch
import torch.nn.functional as F
from common import DEVICE, cases, compare, make, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import Recorder, interpret
from test_interval_attention import DTYPES, mask_of, padding, small_tiles  # noqa: F401

from sloth.kernels.attention import interval_attention as kernels
from sloth.kernels.attention.attention import attention, measured
from sloth.kernels.attention.interval_attention import Tile

SCALE = 0.3


def at(n):
    return torch.arange(n, device=DEVICE)


def chance(B, S, T, density, seed=0):
    return (torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(seed)) < density).to(DEVICE)


def blocks(S):
    """Causal, but the keys of one block see each other: an image in a text."""
    block = (at(S) > S // 4) & (at(S) < S // 2)
    return mask_of(S, ahead=0) | (block & block[:, None])


S = 60
MASKS = {
    "causal": mask_of(S, ahead=0),
    "everything": mask_of(S),
    "nothing": mask_of(S) & False,
    "prefixes": mask_of(S, ahead=0) | (at(S) < torch.tensor([[[[30]]], [[[7]]]], device=DEVICE)),
    "blocks": blocks(S),
    "chosen keys": chance(2, S, S, 0.2) & mask_of(S, ahead=0),
    "few": chance(2, S, S, 0.05, 1),
    "one": chance(2, S, S, 0.02, 1),
    "padded queries": mask_of(S, ahead=0) & padding(2, S, "left", 3)[:, None, :, None],
    "alternating": (at(S) + at(S)[:, None]) % 2 == 0,
    "fewer keys": chance(2, S, 40, 0.5) & (at(40) <= at(S)[:, None] // 2),
    "more keys": chance(1, S, 80, 0.9),
}


def eager(mask, uniform):
    def function(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        s = wide(q @ k.mT * SCALE)
        p = (s + torch.where(mask, s.new_zeros(()), torch.finfo(s.dtype).min)).softmax(-1)
        return (p if uniform else p * mask).to(v.dtype) @ v

    return function


def ours(mask, uniform=False):
    return lambda q, k, v: attention(q, k, v, [], [], scale=SCALE, visible=mask, uniform=uniform)


def check(mask, dtype, uniform, E=24, **bounds):
    S, T = mask.shape[-2:]
    q, k, v = make((2, 2, S, 24), dtype), make((2, 1, T, 24), dtype, seed=1), make((2, 1, T, E), dtype, seed=2)
    compare(ours(mask, uniform), eager(mask, uniform), [q, k, v], strides=False, slack=8.0, few=5, **bounds)


CASES = [(name, dtype, False) for name in MASKS for dtype in DTYPES]
CASES += [(name, DTYPES[-1], True) for name in ("nothing", "prefixes", "chosen keys", "few", "padded queries")]


@pytest.mark.parametrize(("name", "dtype", "uniform"), CASES)
@pytest.mark.covered(1)
def test_masks(name, dtype, uniform):
    if name == "one" and dtype != torch.float32:
        pytest.skip("where queries see a key or two, out's rounding in δ shows: the docstring of the kernels tells how much")
    with interpret(), Recorder() as calls:
        check(MASKS[name], dtype, uniform, E=40 if name == "blocks" else 24)
    assert calls.named("interval_attention")


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels take it there")
@pytest.mark.parametrize("uniform", [False, True], ids=["nothing", "uniform"])
@pytest.mark.parametrize("name", ["nothing", "prefixes", "one", "fewer keys", "more keys"])
def test_by_aten(name, uniform):
    for dtype in (torch.float32, torch.float64):
        check(MASKS[name], dtype, uniform)


@settings(cases, max_examples=4)
@given(st.data())
def test_any_mask(data):
    B, S, T = (data.draw(st.integers(1, n)) for n in (2, 70, 70))
    mask = chance(
        data.draw(st.sampled_from([1, B])), S, T, data.draw(st.sampled_from([0.02, 0.5, 0.98])), data.draw(st.integers(0, 99))
    )
    q, k, v = (
        make((B, 2, S, 8), torch.float32),
        make((B, 1, T, 8), torch.float32, seed=1),
        make((B, 1, T, 8), torch.float32, seed=2),
    )
    with interpret():
        compare(ours(mask), eager(mask, False), [q, k, v], strides=False, few=10**6, scale=float(q.numel()) ** 0.5)


@cases
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.05, 0.5, 1.0]), st.integers(0, 999))
def test_measured(B, S, T, density, seed):
    """Bounds are the first and the last key of each query and the other way round; holes and gaps say what lies between."""
    mask = chance(B, S, T, density, seed)[:, 0]
    (lo, hi, first, last), holes, gaps = measured(mask)
    assert all(t.dtype == torch.int32 for t in (lo, hi, first, last))
    of_queries = (lo[..., None] <= at(T)) & (at(T) <= hi[..., None])
    of_keys = (first[:, None] <= at(S)[:, None]) & (at(S)[:, None] <= last[:, None])
    for span, false, dim in ((of_queries, holes, -1), (of_keys, gaps, -2)):
        assert not (mask & ~span).any() and torch.equal(false, (span & ~mask).any(dim))
        assert torch.equal(span.any(dim), mask.any(dim))


@pytest.mark.parametrize("view", ["of one", "of rows", "transposed", "two dimensions"])
def test_layouts_of_the_mask(view):
    mask = chance(1, S, S, 0.4)
    given = {
        "of one": mask.expand(2, -1, -1, -1),
        "of rows": mask[:, :, :1].expand(2, -1, S, -1),
        "transposed": mask.mT,
        "two dimensions": mask[0, 0],
    }[view]
    with interpret():
        check(given, torch.float32, False)


def test_the_tiles_in_use(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "FORWARD", {64: (Tile(64, 64, 4, 1),)})
    mask = blocks(150) & (at(150) != 77)
    q, (k, v) = make((1, 2, 150, 64), torch.float16), (make((1, 1, 150, 64), torch.float16, seed=n) for n in (1, 2))
    with interpret():
        compare(ours(mask), eager(mask, False), [q, k, v], strides=False)


def test_beside_a_bias():
    """And a cap, on the scores of keys that a mask leaves."""
    q, k, v = (make((2, 2, S, 8), torch.float32, seed=n) for n in range(3))
    bias, mask = make((2, 2, S), torch.float32, seed=4), MASKS["chosen keys"]

    def theirs(q, k, v):
        s = torch.tanh(q @ k.mT * SCALE / 2) * 2 + bias.to(q.dtype)[:, :, None]
        return (s + torch.where(mask, 0.0, torch.finfo(torch.float32).min)).softmax(-1) @ v

    with interpret():
        how = {"scale": SCALE, "softcap": 2.0, "bias": bias, "visible": mask, "uniform": True}
        compare(lambda *t: attention(*t, [], [], **how), theirs, [q, k, v], strides=False, slack=8.0)


def test_beside_sinks():
    """A query that sees nothing gives all of its weight to the sink."""
    q, k, v = (make((2, 2, S, 8), torch.float32, seed=n) for n in range(3))
    sinks, mask = make((2,), torch.float32, seed=4), MASKS["one"]

    def theirs(q, k, v, sinks):
        s = q @ k.mT * SCALE + torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        return torch.cat((s, sinks.to(q.dtype).view(1, -1, 1, 1).expand(2, -1, S, 1)), -1).softmax(-1)[..., :-1] @ v

    def operator(q, k, v, sinks):
        return attention(q, k, v, [], [], scale=SCALE, visible=mask, sinks=sinks)

    with interpret():
        compare(operator, theirs, [q, k, v, sinks], strides=False, slack=8.0, few=5)


def test_what_it_gives_is_torch_s():
    q, k, v = (make((2, 2, S, 8), torch.float32, seed=n) for n in range(3))
    with interpret():
        out = ours(MASKS["one"])(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, MASKS["one"], scale=SCALE), rtol=1e-4, atol=1e-6)
