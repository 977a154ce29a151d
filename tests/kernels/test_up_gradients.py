"""sloth.kernels.linear.lora_grad_b: u = s·g B and dB = s·gᵀ t in one pass over g, against the two products."""

import pytest
import torch
from common import DEVICE, assert_no_worse, cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.linear import lora_grad_b as module
from sloth.kernels.linear.lora_grad_b import MAX_RANK, lora_grad_b

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter cannot round to bf16
PATHS = {
    "operator": lora_grad_b,
    "kernel": lambda g, b, t, scale, dtype=None: module._triton(g, b, t, scale, dtype),
}
each_path = pytest.mark.parametrize("path", PATHS)
dtypes = st.sampled_from(DTYPES)


def compare(path, g, b, t, scale, dtype=None):
    """No worse than eager's two products for each layer, each scaled after it is rounded."""
    u, *db = PATHS[path](g, b, t, [scale] * len(g), dtype)
    columns = [bi.shape[1] for bi in b]
    assert u.shape == t.shape and len(db) == len(b)
    for gi, bi, ti, ui, dbi in zip(g, b, t.split(columns, 1), u.split(columns, 1), db, strict=True):
        eager = scale * (gi.to(bi.dtype) @ bi), scale * (gi.to(bi.dtype).t() @ ti)
        wide, bi_, ti_ = gi.to(bi.dtype).double(), bi.double(), ti.double()
        assert ui.dtype == bi.dtype and dbi.dtype == (dtype or bi.dtype) and dbi.shape == bi.shape
        for ours, theirs, exact in zip((ui, dbi), eager, (scale * (wide @ bi_), scale * (wide.t() @ ti_)), strict=True):
            assert_no_worse(ours, theirs.to(ours.dtype), exact, few=256, scale=1.0)
    return u, *db


def layers(m, widths, r, dtype, of_g, seed=0):
    """g, b: lists, and t of all."""
    g = [make((m, n), of_g, seed=9 * seed + 2 * i) for i, n in enumerate(widths)]
    b = [make((n, r), dtype, seed=9 * seed + 2 * i + 1) for i, n in enumerate(widths)]
    return g, b, make((m, r * len(widths)), dtype, seed=9 * seed + 8)


@each_path
@cases
@given(
    st.integers(1, 90), st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(1, 20), dtypes, dtypes,
    st.sampled_from([1.0, 2.0, 0.37]), st.booleans(), seeds,
)  # fmt: skip
def test_products(path, m, widths, r, dtype, of_g, scale, wide, seed):
    """Tiles, strips and ranks that are not full; g in a dtype of its own; dB in fp32, of up to three layers in one launch."""
    compare(path, *layers(m, widths, r, dtype, of_g, seed), scale, torch.float32 if wide else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_are_no_one_launch(dtype):
    """Other ranks, other scales, more than three."""
    g, b, t = layers(40, (30, 20, 50, 10), 4, dtype, dtype)
    compare("operator", g, b, t, 0.5)
    b[1], t = make((20, 7), dtype, seed=20), make((40, 19), dtype, seed=21)
    compare("operator", g, b, t, 0.5)
    u, *db = lora_grad_b(g[:2], b[:2], t[:, :11], [0.5, 2.0])
    torch.testing.assert_close(u[:, 4:], 2.0 * g[1] @ b[1], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(db[1], 2.0 * g[1].t() @ t[:, 4:11], rtol=2e-2, atol=2e-2)


@each_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, MAX_RANK])
def test_many_tiles(path, dtype, rank, monkeypatch):
    """Several strips, each in several splits, each of several tiles."""
    monkeypatch.setattr(module, "multiprocessors", lambda _: 5)
    compare(path, *layers(200, (600, 260), rank, dtype, dtype), 0.5)


@each_path
def test_other_layouts(path):
    """Rows of g and of t cut from wider ones, and columns in the place of rows."""
    g, t = make((40, 90), torch.float32)[:, 10:70], make((40, 12), torch.float32, seed=1)[:, 3:7]
    compare(path, [g], [make((4, 60), torch.float32, seed=2).t()], t, 1.0)
    compare(path, [make((60, 40), torch.float32).t()], [make((60, 4), torch.float32, seed=2)], t, 1.0)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    g, b, t = layers(rows, (30,), 4, torch.float32, torch.float32)
    u, db = lora_grad_b(g, b, t, [1.0])
    assert u.shape == (rows, 4) and db.shape == (30, 4) and bool(rows) == bool(db.any())


@each_path
def test_deterministic(path):
    given_ = *layers(300, (520, 70), 8, torch.float16, torch.float16), [1.0, 1.0]
    for first, second in zip(PATHS[path](*given_), PATHS[path](*given_), strict=True):
        assert torch.equal(first, second)


def test_opcheck():
    torch.library.opcheck(lora_grad_b, (*layers(6, (20, 8), 4, torch.float32, torch.float32), [2.0, 2.0]))
    with pytest.raises(RuntimeError, match="of 1 layers"):
        lora_grad_b(*layers(6, (20,), 4, torch.float32, torch.float32), [2.0, 2.0])
