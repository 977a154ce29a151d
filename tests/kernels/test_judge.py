"""The judge of all other tests tells eager's luck from a fault."""

import pytest
import torch
from common import compare, make

SEEDS = range(20)


def few(seed):
    """Three elements each: either side may be nearer to fp64."""
    return [make((3,), torch.bfloat16, seed=64 * seed + i) for i in range(2)]


def coarser(x, y):
    """Its intermediate result is larger than that of `rounded_twice`, and so is its rounding, as a rule."""
    return x * (y + 1)


def rounded_twice(x, y):
    return x * y + x


def rounded_thrice(x, y):
    return x * y + (x / 3) * 3


@pytest.mark.parametrize("seed", SEEDS)
def test_luck_is_no_fault(seed):
    compare(rounded_twice, coarser, few(seed))


def test_a_fault_is_not_luck():
    """A rounding too many: where one draw tells, the other draws do not take it back."""

    def found(seed):
        try:
            compare(rounded_thrice, rounded_twice, few(seed))
        except AssertionError:
            return True
        return False

    assert any(found(seed) for seed in SEEDS)
