"""sloth.kernels.attention.decode_attention against torch's own, over caches that are partly filled."""

import pytest
import torch
import torch.nn.functional as F
from common import assert_no_worse, cases, make, seeds
from hypothesis import given
from hypothesis import strategies as st

from sloth.kernels.attention import decode_attention as module
from sloth.kernels.attention.attention import attention
from sloth.kernels.attention.decode_attention import decode_attention


def spelled(q, k, v, seen, scale, softcap, uniform):
    """The formula, in the dtypes of the operands. A query that sees nothing gives 0, or weighs all keys alike."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * scale
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen[:, None, None], torch.finfo(s.dtype).min if uniform else -torch.inf)
    return s.softmax(-1, dtype=torch.promote_types(s.dtype, torch.float32)).to(v.dtype).nan_to_num(0.0) @ v


@pytest.mark.parametrize("path", [module._triton, decode_attention])
@cases
@given(
    st.integers(1, 3), st.sampled_from([(4, 2), (3, 3), (6, 1)]), st.integers(1, 300),
    st.sampled_from([(16, 16), (24, 8), (80, 80)]), st.booleans(), st.sampled_from([None, 5.0]), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seeds,
)  # fmt: skip
def test_over_a_cache(path, B, heads, T, widths, one_mask, softcap, uniform, dtype, seed):
    """Padding at the left, a cache that is not full, holes; a row that sees nothing; caches that are views."""
    (H, G), (D, E) = heads, widths
    q = make((B, 1, H, D), dtype, seed=seed).transpose(1, 2)
    k, v = make((B, G, T + 5, D), dtype, seed=seed + 1)[:, :, 5:], make((B, T, G, E), dtype, seed=seed + 2).transpose(1, 2)
    draw = torch.Generator().manual_seed(seed)
    seen = torch.rand(1 if one_mask else B, T, generator=draw).to(q.device) < 0.7
    seen[:, T * 2 // 3 :] = False
    given = seen, D**-0.5, softcap, uniform
    eager, exact = spelled(q, k, v, *given), spelled(*(t.double() for t in (q, k, v)), *given)
    assert_no_worse(path(q, k, v, *given), eager, exact, few=1000)


def test_a_cache_of_many_parts(monkeypatch):
    """More keys than the least of a program in each of the most programs."""
    monkeypatch.setattr(module, "PARTS", 2)
    q, k, v = (
        make((2, 4, 1, 32), torch.float32),
        make((2, 2, 700, 32), torch.float32, seed=1),
        make((2, 2, 700, 32), torch.float32),
    )
    seen = torch.arange(700, device=q.device)[None] < torch.tensor([[600], [90]], device=q.device)
    given = seen, 0.2, None, False
    exact = spelled(*(t.double() for t in (q, k, v)), *given)
    assert_no_worse(module._triton(q, k, v, *given), spelled(q, k, v, *given), exact, few=1000)


def test_the_operator_of_attention_takes_it(monkeypatch):
    """Of one query without gradients; with them, or of two queries, it measures the mask."""
    taken = []
    monkeypatch.setattr(
        "sloth.kernels.attention.attention.decode_attention", lambda *of: taken.append(of) or decode_attention(*of)
    )
    q, k, v = make((2, 4, 1, 16), torch.float32), *(make((2, 2, 9, 16), torch.float32, seed=s) for s in (1, 2))
    mask = torch.ones(2, 1, 1, 9, device=q.device).bool()
    mask[..., [0, 8]] = False
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert torch.allclose(attention(q, k, v, [], [], visible=mask), expected, atol=1e-6) and len(taken) == 1
    learned = q.clone().requires_grad_()
    assert torch.allclose(attention(learned, k, v, [], [], visible=mask), expected, atol=1e-6)
    two = q.expand(2, 4, 2, 16), k, v
    assert torch.allclose(attention(*two, [], [], visible=mask.expand(2, 1, 2, 9))[:, :, :1], expected, atol=1e-6)
    assert len(taken) == 1
    with torch.no_grad():
        attention(learned, k, v, [], [], visible=mask)
    assert len(taken) == 2


def test_bad_operands_are_refused():
    q, k, v = make((1, 4, 1, 16), torch.float32), *(make((1, 2, 9, 16), torch.float32) for _ in "kv")
    seen = torch.ones(1, 9, device=q.device).bool()
    for bad in ((q.expand(1, 4, 2, 16), k, v, seen), (q, k, v, seen.int()), (q.expand(3, 4, 1, 16), k, v, seen)):
        with pytest.raises(RuntimeError, match="decode_attention: query"):
            decode_attention(*bad, 0.25)
    for bad in ((q, k[:, :, :8], v, seen), (q, k, v, seen[:, :8])):
        with pytest.raises(RuntimeError, match="of lengths"):
            decode_attention(*bad, 0.25)
    with pytest.raises(RuntimeError, match="no derivative"):
        decode_attention(q.requires_grad_(), k, v, seen, 0.25)


def test_operator_is_well_formed():
    q, k, v = make((2, 4, 1, 16), torch.float32), *(make((2, 2, 9, 16), torch.float32, seed=s) for s in (1, 2))
    torch.library.opcheck(decode_attention, (q, k, v, torch.ones(2, 9, device=q.device).bool(), 0.25, 20.0, True))
