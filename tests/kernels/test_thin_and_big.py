"""sloth.kernels.linear.lowrank_gemm: bias + s T U + X W in one kernel, against the products one after the other."""

import pytest
import torch
from common import DEVICE, assert_no_worse, cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.linear import gemm
from sloth.kernels.linear import lowrank_gemm as module
from sloth.kernels.linear.gemm import sum_of_products

DTYPES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter cannot round to bf16
GPU = pytest.mark.skipif(DEVICE != "cuda" or not module._hopper(torch.device("cuda", 0)), reason="runs on Hopper GPUs")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many of them in small matrices, in groups that are not full; any GPU is filled by them."""
    if DEVICE == "cpu":
        for name, size in {"BM": 16, "BN": 32, "BK": 16, "GROUP": 2}.items():
            monkeypatch.setattr(module, name, size)
        monkeypatch.setattr(module, "_hopper", lambda _: True)
    for name in ("FULL", "LEAST"):
        monkeypatch.setattr(module, name, 0.0)


def operands(m, k, n, r, dtype, by_columns, seed):
    """T, U, X, W as views of wider matrices, whose strides are multiples of 8 elements."""
    drawn = iter(range(8 * seed, 8 * seed + 8))

    def matrix(rows, columns, by_columns=False):
        if by_columns:
            return matrix(columns, rows).t()
        return make((rows, (columns + 23) // 8 * 8), dtype, seed=next(drawn))[:, 8 : 8 + columns]

    return matrix(m, r), matrix(r, n, by_columns[0]), matrix(m, k), matrix(k, n, by_columns[1])


def compare(t, u, x, w, scale, bias=None):
    """No worse than eager's products, each rounded, then added up."""
    assert module.serves(t, u, x, w, scale)
    y = torch.full((x.shape[0], w.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    module.lowrank_gemm(t, u, x, w, scale, bias, y)

    def written_out(convert):
        total = scale * (convert(t) @ convert(u)) + convert(x) @ convert(w)
        return total if bias is None else total + convert(bias)

    assert_no_worse(y, written_out(lambda a: a), written_out(torch.Tensor.double), few=256, scale=1.0)


@cases
@given(
    *(st.integers(1, n) for n in (70, 70, 13, 64)), st.sampled_from(DTYPES), st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([1.0, 0.5, 0.37, -0.2]), st.booleans(), seeds,
)  # fmt: skip
def test_products(small_tiles, m, k, n, r, dtype, by_columns, scale, with_bias, seed):
    """Tiles that are not full, ranks that are no powers of two, both orders of U and W."""
    bias = make((8 * n,), dtype, seed=seed) if with_bias else None
    compare(*operands(m, k, 8 * n, r, dtype, by_columns, seed), scale, bias)


@GPU
@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(4096, 4096, 14336, 16), (4096, 14336, 4096, 32), (2000, 4096, 4104, 48), (9000, 72, 1024, 8)]
)
def test_large(small_tiles, m, k, n, r, by_columns):
    for dtype in (torch.bfloat16, torch.float16):
        t, u, x, w = operands(m, k, n, r, dtype, (by_columns, by_columns), 1)
        compare(t, u, x, w * 0.1, 0.37)


def test_what_it_does_not_serve(small_tiles):
    """Rows that TMA cannot address, ranks beyond its tiles, other dtypes, scales that might overflow."""
    t, u, x, w = operands(40, 32, 40, 16, torch.float16, (True, False), 0)
    assert module.serves(t, u, x, w, 1.0)
    wide = make((40, 80), torch.float16)
    assert not module.serves(t, u, x, w, 1.5)
    assert not module.serves(t.float(), u.float(), x.float(), w.float(), 1.0)
    assert not module.serves(t, u, make((40, 33), torch.float16)[:, 1:], w, 1.0)
    assert not module.serves(t, u, make((40, 36), torch.float16)[:, :32], w, 1.0)
    assert not module.serves(t, u, x.t().contiguous().t(), w, 1.0)
    assert not module.serves(wide[:, :72], make((72, 40), torch.float16), x, w, 1.0)
    assert not module.serves(t, u[:, :39], x, w[:, :39], 1.0)
    assert not module.serves(t[:0], u, x[:0], w, 1.0)


def test_too_few_tiles_for_the_gpu(monkeypatch):
    monkeypatch.setattr(module, "_hopper", lambda _: True)
    monkeypatch.setattr(module, "LEAST", 0.0)
    monkeypatch.setattr(module, "multiprocessors", lambda _: 10)
    for m, served in ((128, False), (8 * 128, False), (9 * 128, True), (11 * 128, False), (18 * 128, True)):
        assert module.serves(*operands(m, 16, 256, 8, torch.float16, (False, False), 0), 1.0) is served


def test_products_too_small(monkeypatch):
    monkeypatch.setattr(module, "_hopper", lambda _: True)
    monkeypatch.setattr(module, "FULL", 0.0)
    monkeypatch.setattr(module, "LEAST", 2e10)
    of = lambda m: operands(m, 4096, 4096, 16, torch.float16, (True, True), 0)  # noqa: E731
    assert module.serves(*of(640), 1.0) and not module.serves(*of(512), 1.0)


@pytest.mark.parametrize("bias", [False, True])
def test_in_a_sum(small_tiles, bias, monkeypatch):
    """The operator takes it for two products, where the second has no scale."""
    calls = []
    monkeypatch.setattr(gemm, "lowrank_gemm", lambda *args: calls.append(args) or module.lowrank_gemm(*args))
    t, u, x, w = operands(40, 32, 72, 16, torch.float16, (True, False), 0)
    added = make((72,), torch.float16) if bias else None

    def exact(alpha):
        total = sum(s * (a.double() @ b.double()) for s, a, b in zip(alpha, (t, x, x), (u, w, w), strict=False))
        return total if added is None else total + added

    for alpha, served in (([0.5, 1.0], 1), ([0.5, 2.0], 0), ([0.5, 1.0, 2.0], 0)):
        calls.clear()
        n = len(alpha)
        found = sum_of_products([t, x, x][:n], [u, w, w][:n], alpha, added)
        assert len(calls) == served
        torch.testing.assert_close(found.double(), exact(alpha), rtol=2e-2, atol=2e-2)
