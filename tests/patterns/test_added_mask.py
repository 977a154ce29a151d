"""Masks that are added to the scores of torch's attention: which keys are seen is read of them; what only looks so is not."""

import pytest
import torch
from common import DEVICE
from test_alibi import HEADS, at, powers
from test_attention import Attention
from test_eager_attention import LEFT, additive, compiled, same
from test_mask_meaning import S, causal, narrow_window, padded, strict
from torch.nn.attention import SDPBackend, sdpa_kernel

from sloth.rewriter.report import MATCHED

LEAST = torch.finfo(torch.float32).min


def chosen(seen, x):
    return additive(seen, x.dtype)


def filled(seen, x):
    return torch.zeros((), device=x.device, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)


def one_less(seen, x):
    """BLT's: 1 − m, and the least number where that is not 0."""
    hidden = 1.0 - seen.to(x.dtype)
    return hidden.masked_fill(hidden.bool(), torch.finfo(x.dtype).min)


def below(seen, x):
    """Falcon's, of a mask that is added already."""
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(additive(seen, x.dtype) < -1, torch.finfo(x.dtype).min)


def not_zero(seen, x):
    """Doge's."""
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(additive(seen, x.dtype) != 0, torch.finfo(x.dtype).min)


def infinite(seen, x):
    return torch.where(seen, 0.0, -torch.inf)


def biased(seen, x):
    """Falcon's ALiBi."""
    return (powers()[:, None, None] * at() / 3).to(x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)


def counted(seen, x):
    """ALiBi where there is padding."""
    return torch.where(seen, powers()[:, None, None] * (LEFT.cumsum(-1)[:, None, None] - 1), LEAST)


SPELLINGS = [chosen, filled, one_less, below, not_zero, infinite, biased, counted]


def model_of(mask, spelling, groups=2, **more):
    torch.manual_seed(0)
    return Attention(lambda x, *data: spelling(mask(x, *data), x), groups, **more).to(DEVICE), torch.randn(
        2, S, 32, device=DEVICE
    )


@pytest.mark.parametrize("mask", [causal, narrow_window], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_spellings(spelling, mask):
    model, x = model_of(mask, spelling)
    assert same(model, x)[0] == [MATCHED]


@pytest.mark.parametrize("mask", [padded, strict], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", [s for s in SPELLINGS if s is not infinite], ids=lambda f: f.__name__)
def test_queries_that_see_nothing(spelling, mask):
    """They weigh all keys alike, gradients included: torch's fused kernels lose the sum of weights in the least number there."""
    model, x = model_of(mask, spelling)
    with sdpa_kernel(SDPBackend.MATH):
        assert same(model, x, *([LEFT] if mask is padded else []))[0] == [MATCHED]


def test_queries_that_see_nothing_where_infinity_or_too_little_is_added():
    model, x = model_of(padded, infinite)
    _, statuses, sites = compiled(model, x, LEFT)
    assert statuses == ["check"] and "nan" in sites[0].reason
    model, x = model_of(padded, chosen)
    _, statuses, sites = compiled(model.half(), x.half(), LEFT)
    assert statuses == ["check"] and "does not absorb" in sites[0].reason


def small(seen, x):
    return torch.where(seen, 0.0, -1e4)


def turned(seen, x):
    return torch.where(seen, LEAST, 0.0)


def seen_itself(seen, x):
    m = seen.to(x.dtype)
    return m.masked_fill(m.bool(), LEAST)


def above(seen, x):
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(additive(seen, x.dtype) < 1, LEAST)


def far_below(seen, x):
    return torch.zeros_like(seen, dtype=x.dtype).masked_fill(torch.where(seen, 0.0, -3.39e38) < -3.4e38, LEAST)


@pytest.mark.parametrize("spelling", [small, turned, seen_itself, far_below], ids=lambda f: f.__name__)
def test_what_is_said_counts_and_not_what_is_usual(spelling):
    """Keys behind a query, or all: queries that see nothing weigh all keys alike."""
    model, x = model_of(causal, spelling)
    with sdpa_kernel(SDPBackend.MATH):
        assert same(model, x)[0] == [MATCHED]


def one(seen, x):
    return torch.where(seen, 1.0, LEAST)


def two_less(seen, x):
    """Not 0 where it is seen."""
    hidden = 2.0 - seen.to(x.dtype)
    return hidden.masked_fill((1.0 - seen.to(x.dtype)).bool(), LEAST)


def of_distance(seen, x):
    return torch.where(seen, powers()[:, None, None] * (at() - at()[:, None]).abs(), LEAST)


def learned(seen, x):
    return torch.where(seen, x[:, :, :HEADS].mT[:, :, None], LEAST)


NEARLY = [above, one, two_less, of_distance, learned]


@pytest.mark.parametrize("spelling", NEARLY, ids=lambda f: f.__name__)
def test_what_only_looks_like_it(spelling):
    model, x = model_of(causal, spelling)
    assert same(model, x)[0] == ["check"]


def test_a_bias_that_is_learned():
    class Learned(Attention):
        def __init__(self):
            super().__init__(self.biased, 2)
            self.slopes = torch.nn.Parameter(powers())

        def biased(self, x):
            return torch.where(causal(x), self.slopes[:, None, None] * at(), LEAST)

    torch.manual_seed(0)
    assert same(Learned().to(DEVICE), torch.randn(2, S, 32, device=DEVICE))[0] == ["gradient"]


@pytest.mark.parametrize(("spelling", "status"), [(chosen, MATCHED), (biased, "check")], ids=["causal", "biased"])
def test_dropout(spelling, status):
    model, x = model_of(causal, spelling, dropout=0.5)
    assert compiled(model, x)[1] == [status]
