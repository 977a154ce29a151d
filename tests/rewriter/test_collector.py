"""sloth.rewriter.dynamo.collector: old objects are spared until a graph of sloth's is compiled, and not longer."""

from __future__ import annotations

import gc

import pytest
import torch

from sloth.rewriter.backend import sloth
from sloth.rewriter.dynamo.collector import NEVER

MODEL = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
X = torch.randn(2, 4)


@pytest.fixture(autouse=True)
def thresholds():
    torch._dynamo.reset()
    before = gc.get_threshold()
    gc.set_threshold(500, 7, 9)
    yield
    gc.set_threshold(*before)


def seen_by(inner) -> list[tuple]:
    """The collector's thresholds where a graph is compiled, traced for sloth or not, and behind that."""
    seen = []

    def backend(gm, inputs):
        seen.append(gc.get_threshold())
        return inner(gm, inputs)

    backend.__name__ = inner.__name__
    torch.compile(MODEL, backend=backend)(X)
    return [*seen, gc.get_threshold()]


def eager(gm, inputs):
    return gm.forward


def sloth_and_eager(gm, inputs):
    return sloth(gm, inputs, options={"sloth.inner_backend": "eager"})


def test_while_it_compiles():
    sloth_and_eager.__name__ = "sloth"
    assert seen_by(sloth_and_eager) == [(500, 7, NEVER), (500, 7, 9)]


def test_not_for_others():
    assert seen_by(eager) == [(500, 7, 9), (500, 7, 9)]


def test_when_compiling_fails():
    def failing(gm, inputs):
        raise ZeroDivisionError

    failing.__name__ = "sloth"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        seen_by(failing)
    assert gc.get_threshold() == (500, 7, 9)


def test_what_somebody_sets_meanwhile_stays():
    def setting(gm, inputs):
        gc.set_threshold(100, 1, 1)
        return gm.forward

    setting.__name__ = "sloth"
    assert seen_by(setting)[-1] == (100, 1, 1)


def test_old_objects_are_not_due_when_it_is_compiled():
    """Their passes are counted anew, or all that is about to be dropped would be walked over at once."""
    counts = []

    def counting(gm, inputs):
        for _ in range(20):
            gc.collect(1)
        counts.append(gc.get_count()[2])
        return gm.forward

    counting.__name__ = "sloth"
    seen_by(counting)
    assert counts[0] >= 20 and gc.get_count()[2] < 9


def test_what_somebody_froze_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        sloth_and_eager.__name__ = "sloth"
        seen_by(sloth_and_eager)
        assert gc.get_freeze_count() > frozen // 2 > 0
    finally:
        gc.unfreeze()
