"""Attention with masks of which nothing is proven is eager's: wherever they come from, in bodies of checkpoints too."""

import pytest
import torch
from common import DEVICE, assert_no_worse
from inner import OPTIONS as QUICK
from test_added_mask import LEAST, chosen
from test_attention import Across, Attention, all_keys, outcomes, sites_of
from test_eager_attention import same
from test_mask_meaning import PADDING, RESTART, S, causal, falling, positions, prefix
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sloth.rewriter.backend import listening
from sloth.rewriter.report import MATCHED

GIVEN = (torch.rand(2, 1, S, S, generator=torch.Generator().manual_seed(0)) < 0.3).to(DEVICE)  # some queries see nothing


def images(x, ids):
    """Tokens of one image see each other."""
    b, (i, j) = torch.arange(x.shape[0], device=x.device)[:, None, None, None], positions(x)
    return (j <= i) | ((ids[b, i] == ids[b, j]) & (ids[b, i] > 0))


def chosen_keys(x, _):
    """Of each query the four that it likes most."""
    likes = (x @ x.mT)[:, None]
    return causal(x) & torch.zeros_like(likes, dtype=torch.bool).scatter(-1, likes.topk(4).indices, True)


def valid_on_both_sides(x, padding):
    return padding[:, None, :, None] & padding[:, None, None, :]


def from_outside(x, mask):
    return mask


def for_all(x, mask):
    return mask[:1].expand(x.shape[0], -1, -1, -1)


def of_two_dimensions(x, mask):
    return mask[0, 0]


IDS = torch.where((torch.arange(S, device=DEVICE) > 4) & (torch.arange(S, device=DEVICE) < 13), 1, 0).expand(2, -1)
MASKS = {
    prefix: RESTART, falling: RESTART, chosen_keys: RESTART, images: IDS, valid_on_both_sides: PADDING, from_outside: GIVEN,
    for_all: GIVEN, of_two_dimensions: GIVEN,
}  # fmt: skip


def made(mask, groups=2, **more):
    torch.manual_seed(0)
    return Attention(mask, groups, **more).to(DEVICE), torch.randn(2, S, 32, device=DEVICE)


@pytest.mark.parametrize(("groups", "native"), [(4, False), (2, False), (2, True)])
@pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
@pytest.mark.covered(1)
def test_masks(mask, groups, native):
    model, x = made(mask, groups, native=native)
    statuses, sites = same(model, x, MASKS[mask])
    assert statuses == [MATCHED] and sites[0].variant.startswith("attention_by_mask")


@pytest.mark.parametrize("mask", [prefix, from_outside, valid_on_both_sides], ids=lambda f: f.__name__)
def test_masks_that_are_added(mask):
    """A query that sees nothing weighs all keys alike then."""
    model, x = made(lambda x, data: chosen(mask(x, data), x))
    with sdpa_kernel(SDPBackend.MATH):  # as in test_added_mask.py
        statuses, sites = same(model, x, MASKS[mask])
    assert statuses == [MATCHED] and sites[0].variant.startswith("attention_by_mask")


def test_a_graph_break_behind_the_mask():
    class Broken(Attention):
        def forward(self, x):
            mask = causal(x)
            torch._dynamo.graph_break()
            return super().forward(x, mask)

    torch.manual_seed(0)
    statuses, sites = same(Broken(from_outside, 2).to(DEVICE), torch.randn(2, S, 32, device=DEVICE))
    assert statuses == [MATCHED] and sites[0].variant == "attention_by_mask[grouped]"


def test_in_bodies_of_checkpoints():
    layer, x = made(from_outside)

    def run(x, ids):
        mask = images(x, ids)
        for _ in range(2):
            x = x + checkpoint(layer, x, mask, use_reentrant=False).transpose(1, 2).flatten(2)
        return x

    torch._dynamo.reset()
    with listening() as reports:
        ours = torch.compile(run, backend="sloth", options=QUICK)(x, IDS)
    theirs = run(x, IDS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(out.square().sum(), layer.parameters()) for out in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)
    assert [s.status for s in sites_of(reports)] == [MATCHED] * 2


def far_keys(x, y):
    i, j = (torch.arange(t.shape[1], device=x.device) for t in (x, y))
    return ((j[None, None, None] - i[None, None, :, None]).abs() > 2) | all_keys(x, y)[..., :1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("keys", "width"), [(S - 8, 8), (S + 8, 16), (S, 8)])
@pytest.mark.covered(1)
def test_widths_and_numbers_of_keys(keys, width, dtype):
    torch.manual_seed(0)
    model, x = Across(far_keys, keys, width).to(DEVICE, dtype), torch.randn(2, S, 32, device=DEVICE, dtype=dtype)
    torch._dynamo.reset()
    with listening() as reports:
        ours = outcomes(model, x, [], torch.compile(model, backend="sloth", options=QUICK))
    assert_no_worse(ours, outcomes(model, x, [], model), outcomes(model.double(), x.double(), [], model))
    assert [s.status for s in sites_of(reports)] == [MATCHED], sites_of(reports)


# ---------------------------------------------------------------- what is left alone


def of_heads(x, mask):
    return mask & (torch.arange(4, device=x.device)[:, None, None] < torch.arange(1, S + 1, device=x.device))


def numbers(x, mask):
    return torch.where(mask, x[:, None, :, :1], LEAST)


def infinite(x, mask):
    return torch.where(mask, 0.0, -torch.inf)


LEFT_ALONE = {of_heads: "from head to head", numbers: "a bias that is not proven", infinite: "from outside"}


@pytest.mark.parametrize("mask", LEFT_ALONE, ids=lambda f: f.__name__)
def test_what_is_left_alone(mask):
    model, x = made(mask)
    _, (site,) = same(model, x, GIVEN | torch.eye(S, dtype=torch.bool, device=DEVICE))
    assert site.status == "check" and LEFT_ALONE[mask] in site.reason


def test_one_mask_for_each_head_where_there_are_as_many_sequences():
    """[1, 4, S, S] is that of the heads, whatever the batch."""
    q, mask = torch.randn(4, 4, S, 8, device=DEVICE), torch.rand(1, 4, S, S, device=DEVICE) < 0.6
    torch._dynamo.reset()
    attend = lambda q, mask: torch.nn.functional.scaled_dot_product_attention(q, q, q, mask | (mask.sum(-1, True) == 0))  # noqa: E731
    torch.testing.assert_close(torch.compile(attend, backend="sloth", options=QUICK)(q, mask), attend(q, mask))


def test_dropout():
    model, x = made(prefix, dropout=0.5)
    torch._dynamo.reset()
    with listening() as reports:
        torch.compile(model, backend="sloth", options=QUICK)(x, RESTART)
    (site,) = sites_of(reports)
    assert site.status == "check" and "dropout" in site.reason


def test_what_is_proven_is_not_measured():
    model, x = made(causal)
    _, (site,) = same(model, x)
    assert site.variant == "attention[grouped]"
