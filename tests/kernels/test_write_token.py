"""sloth.kernels.attention.write_token against what transformers' static cache does."""

import pytest
import torch
from common import cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.attention import write_token as module
from sloth.kernels.attention.write_token import write_token


def cache_of(B, G, T, D, E, dtype, length):
    keys, values = make((B, G, T, D), dtype), make((B, G, T, E), dtype, seed=1)
    return keys, values, torch.tensor(length, device=keys.device)


@pytest.mark.parametrize("path", [module._triton, module._aten, write_token])
@cases
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 40), st.sampled_from([(16, 16), (24, 8), (5, 80)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data(), seeds,
)  # fmt: skip
def test_as_transformers_cache(path, B, G, T, widths, dtype, data, seed):
    """Tokens as layers give them, a transposed view; nothing else of the cache changes."""
    from transformers.cache_utils import StaticLayer

    D, E = widths
    key, value = (make((B, 1, G, n + 3), dtype, seed=seed + n)[..., 1 : n + 1].transpose(1, 2) for n in (D, E))
    keys, values, length = cache_of(B, G, T, D, E, dtype, data.draw(st.integers(0, T - 1)))
    layer = StaticLayer(max_cache_len=T)
    layer.lazy_initialization(key, value)
    layer.keys, layer.values, layer.cumulative_length = keys.clone(), values.clone(), length.clone()
    expected = *layer.update(key, value), layer.cumulative_length
    path(keys, values, length, key, value)
    assert all(torch.equal(x, y) for x, y in zip((keys, values, length), expected, strict=True))


def test_more_rows_than_one_program_copies(monkeypatch):
    monkeypatch.setattr(module, "MOST", 100)
    given = cache_of(3, 2, 9, 24, 8, torch.float32, 4)
    key, value = make((3, 2, 1, 24), torch.float32, seed=2), make((3, 2, 1, 8), torch.float32, seed=3)
    module._triton(*given, key, value)
    keys, values, length = given
    assert torch.equal(keys[:, :, 4:5], key) and torch.equal(values[:, :, 4:5], value) and length == 5


def test_a_full_cache_is_told():
    given = cache_of(1, 2, 4, 8, 8, torch.float32, 4)
    token = make((1, 2, 1, 8), torch.float32)
    if token.device.type == "cpu":  # a GPU is lost after that
        with pytest.raises((RuntimeError, IndexError), match="out of"):
            write_token(*given, token, token)


def test_bad_operands_are_refused():
    keys, values, length = cache_of(2, 2, 4, 8, 8, torch.float32, 1)
    token = make((2, 2, 1, 8), torch.float32)
    two, narrow = token.expand(2, 2, 2, 8), token[..., :4]
    for bad in (
        (keys, values, length, two, two),
        (keys, values, length, narrow, token),
        (keys, values, length, token[:1], token),
    ):
        with pytest.raises(RuntimeError, match="write_token: keys"):
            write_token(*bad)
    with pytest.raises(RuntimeError, match="for a cache of"):
        write_token(keys, values, length, token.double(), token)
    with pytest.raises(RuntimeError, match="one int64"):
        write_token(keys, values, length.int(), token, token)
    with pytest.raises(RuntimeError, match="contiguous"):
        write_token(keys.mT.contiguous().mT, values, length, token, token)
    with pytest.raises(RuntimeError, match="no derivative"):
        write_token(keys, values, length, token.clone().requires_grad_(), token)


def test_operator_is_well_formed():
    token = make((2, 3, 1, 8), torch.float32)
    torch.library.opcheck(write_token, (*cache_of(2, 3, 4, 8, 8, torch.float32, 1), token, token))
