"""sloth.kernels.linear.lora_grad_b: u = s·g B and dB = s·gᵀ t in one pass over g, against the two products."""

import pytest
import torch
from common import DEVICE, assert_no_worse, cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.linear import lora_grad_b as module
from sloth.kernels.linear.lora_grad_b import MAX_RANK, lora_grad_b

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter cannot round to bf16
PATHS = {"operator": lora_grad_b, "kernel": module._triton}
each_path = pytest.mark.parametrize("path", PATHS)
dtypes = st.sampled_from(DTYPES)


def compare(path, g, b, t, scale):
    """No worse than eager's two products, each scaled after it is rounded."""
    found = PATHS[path](g, b, t, scale)
    eager = scale * (g.to(b.dtype) @ b), scale * (g.to(b.dtype).t() @ t)
    g, b, t = g.to(b.dtype).double(), b.double(), t.double()
    for ours, theirs, exact in zip(found, eager, (scale * (g @ b), scale * (g.t() @ t)), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert_no_worse(ours, theirs, exact, few=256, scale=1.0)
    return found


@each_path
@cases
@given(st.integers(1, 90), st.integers(1, 300), st.integers(1, 20), dtypes, dtypes, st.sampled_from([1.0, 2.0, 0.37]), seeds)
def test_products(path, m, n, r, dtype, of_g, scale, seed):
    """Tiles, strips and ranks that are not full; g in a dtype of its own."""
    g, b, t = make((m, n), of_g, seed=3 * seed), make((n, r), dtype, seed=3 * seed + 1), make((m, r), dtype, seed=3 * seed + 2)
    compare(path, g, b, t, scale)


@each_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, MAX_RANK])
def test_many_tiles(path, dtype, rank, monkeypatch):
    """Several strips, each in several splits, each of several tiles."""
    monkeypatch.setattr(module, "multiprocessors", lambda _: 3)
    compare(path, make((200, 600), dtype), make((600, rank), dtype, seed=1), make((200, rank), dtype, seed=2), 0.5)


@each_path
def test_other_layouts(path):
    """Rows of g and of t cut from wider ones, and columns in the place of rows."""
    g, t = make((40, 90), torch.float32)[:, 10:70], make((40, 12), torch.float32, seed=1)[:, 3:7]
    compare(path, g, make((4, 60), torch.float32, seed=2).t(), t, 1.0)
    compare(path, make((60, 40), torch.float32).t(), make((60, 4), torch.float32, seed=2), t, 1.0)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    u, db = lora_grad_b(make((rows, 30), torch.float32), make((30, 4), torch.float32), make((rows, 4), torch.float32), 1.0)
    assert u.shape == (rows, 4) and db.shape == (30, 4) and bool(rows) == bool(db.any())


@each_path
def test_deterministic(path):
    given_ = make((300, 520), torch.float16), make((520, 8), torch.float16, seed=1), make((300, 8), torch.float16, seed=2), 1.0
    for first, second in zip(PATHS[path](*given_), PATHS[path](*given_), strict=True):
        assert torch.equal(first, second)


def test_opcheck():
    torch.library.opcheck(
        lora_grad_b, (make((6, 20), torch.float32), make((20, 4), torch.float32), make((6, 4), torch.float32), 2.0)
    )
