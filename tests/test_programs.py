"""Random programs give what eager gives, or no more than 1.05 times its distance from fp64: tests/programs.py."""

from collections import Counter

import pytest
import torch
from programs import by_torch, compare, matches, written

PLAIN = 100  # each takes a sixth of a second
EACH = 50


def run(seeds, plain: bool) -> Counter:
    """How often each entry was matched. Raises what is wrong, behind the program as Python."""
    found = Counter()
    for i, seed in enumerate(seeds):
        if i % 25 == 0:
            torch.compiler.reset()
        program = written(seed, plain)
        try:
            found.update(matches(compare(program) or []))
        except Exception as e:
            if by_torch(program):
                continue
            raise AssertionError(f"{type(e).__name__}: {e}\n{program}") from e
    return found


def test_short_programs():
    found = run(range(PLAIN), plain=True)
    assert {name.removeprefix("linear_").split("_")[0] for name in found} >= {
        "rms", "add", "layer", "rope", "gated", "lora", "attention", "cross", "eager", "adapter"
    }  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(0, 1000, EACH))
def test_programs(first):
    """Of 5,000 and more: python -m tests.programs 0 5000."""
    run(range(first, first + EACH), plain=False)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(PLAIN, 2000, 4 * EACH))
def test_more_short_programs(first):
    run(range(first, first + 4 * EACH), plain=True)
