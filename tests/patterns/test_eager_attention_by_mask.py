"""Attention spelled out with masks of which nothing is proven is eager's."""

import pytest
import torch
from test_attention_by_mask import GIVEN, MASKS, chosen_keys, from_outside, images
from test_eager_attention import capped, compiled, in_dtype, model_and_input, same, weighted, with_sinks
from test_mask_meaning import causal
from torch.utils.checkpoint import checkpoint

from sloth.rewriter.report import MATCHED

MEASURED = "eager_attention_by_mask"


def measured(statuses, sites):
    return statuses == [MATCHED] and sites[0].variant.startswith(MEASURED)


@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
def test_masks(mask):
    """Some leave queries without a key: eager then takes the mean of all values, and so do we, gradients included."""
    model, x = model_and_input(mask)
    assert measured(*same(model, x, MASKS[mask]))


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("weigh", [weighted, in_dtype, capped, with_sinks], ids=lambda f: f.__name__)
def test_ways_of_weighing(weigh, groups):
    """A query that sees nothing gives its weight to the sink."""
    model, x = model_and_input(from_outside, weigh, groups=groups)
    assert measured(*same(model, x, GIVEN, rtol=2e-4))


def test_in_the_body_of_a_checkpoint():
    model, x = model_and_input(chosen_keys)
    forward = model.forward
    model.forward = lambda x, data: checkpoint(forward, x, data, use_reentrant=False)
    assert measured(*same(model, x, MASKS[chosen_keys]))


def test_what_is_proven_is_not_measured():
    model, x = model_and_input(causal)
    statuses, sites = same(model, x)
    assert statuses == [MATCHED] and not sites[0].variant.startswith(MEASURED)


def test_left_alone():
    """Dropout, a mask that differs from head to head, one whose least number leaves something of scores."""

    def moderate(scores, mask):
        return (scores + torch.where(mask, 0.0, -1e4)).softmax(-1)

    for how, data in (
        ((images, weighted, 2, 0.1), MASKS[images]),
        ((from_outside, weighted), GIVEN.expand(-1, 4, -1, -1)),
        ((from_outside, moderate), GIVEN),
    ):
        model, x = model_and_input(*how)
        assert compiled(model, x, data)[1] == ["check"]
