"""What is proven of masks that are computed, and what is not of masks that are nearly those."""

import pytest
import torch
from common import DEVICE

from sloth.patterns.attention.mask_analysis import Interval, meaning, why_not
from sloth.rewriter.graph.lower import lower

S = 24
CAUSAL = Interval(ahead=0)


def told(fn, *args, dynamic=False):
    """What the mask that `fn(x, *args)` gives means, in the graph that Dynamo makes of it; why not, where nothing is proven."""
    found = []

    def look(gm, _):
        (view,) = lower(gm)
        mask = view.env[gm.graph.output_node().args[0][0]]
        found.append(meaning(mask) or why_not(mask))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=look, dynamic=dynamic)(torch.zeros(2, S, device=DEVICE), *args)
    return found[0]


def counted(interval):
    """(ahead, behind, documents, valid), of the last two how many."""
    return interval and (interval.ahead, interval.behind, len(interval.documents), len(interval.valid))


def positions(x):
    n = torch.arange(x.shape[1], device=x.device)
    return n[None, None, :, None], n[None, None, None, :]


def batches(x):
    return torch.arange(x.shape[0], device=x.device)[:, None, None, None]


# ---------------------------------------------------------------- of positions alone


def causal(x):
    i, j = positions(x)
    return j <= i


def causal_turned(x):
    i, j = positions(x)
    return ~(j > i)


def causal_shifted(x):
    i, j = positions(x)
    return (j + 3 < i + 4) & x.new_ones(x.shape[0], 1, 1, 1, dtype=torch.bool)


def causal_gathered(x):
    """As transformers does: positions by index, sequences told apart by positions that restart."""
    p = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
    return packed(x, p)


def wide_window(x):
    i, j = positions(x)
    return (j <= i) & (j > i - S)


def wide_chunks(x):
    i, j = positions(x)
    return (i // S == j // S) & (j <= i)


def everything(x):
    i, j = positions(x)
    return (j <= i) | torch.ones_like(i, dtype=torch.bool)


def triangle(x):
    return torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def no_upper_triangle(x):
    return ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(diagonal=1)


def no_blocks(x):
    """Blocks that see each other, as of images, of which there are none here."""
    ids, (i, j) = torch.full(x.shape, -1, device=x.device), positions(x)
    of_i, of_j = ids[batches(x), i], ids[batches(x), j]
    return i.new_zeros((), dtype=torch.bool) | (j <= i) | ((of_i == of_j) & (of_i >= 0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "fn",
    [causal, causal_turned, causal_shifted, causal_gathered, triangle, no_upper_triangle, no_blocks],
    ids=lambda f: f.__name__,
)
def test_causal(fn, dynamic):
    assert told(fn, dynamic=dynamic) == CAUSAL


def test_what_is_wider_than_the_sequence_is_no_bound():
    assert told(wide_window) == CAUSAL and told(wide_chunks) == CAUSAL and told(everything) == Interval()


def two_bounds_a_side(x):
    i, j = positions(x)
    return (j <= i + 2) & (j <= i) & (j >= i - 3) & (j >= i - 5)


def two_bounds_a_side_turned(x):
    i, j = positions(x)
    return (j >= i - 5) & (j >= i - 3) & (j <= i) & (j <= i + 2)


@pytest.mark.parametrize("fn", [two_bounds_a_side, two_bounds_a_side_turned], ids=lambda f: f.__name__)
def test_of_two_bounds_the_tighter_holds(fn):
    assert told(fn) == Interval(ahead=0, behind=3)


def narrow_window(x):
    i, j = positions(x)
    return (j <= i) & (j > i - S + 1)


def strict(x):
    i, j = positions(x)
    return j < i


def exchanged(x):
    i, j = positions(x)
    return i <= j


def both_sides(x):
    i, j = positions(x)
    return (i - j).abs() <= 5


def band(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(2).triu(-3)


BOUNDS = {band: (2, 3), narrow_window: (0, S - 2), strict: (-1, None), exchanged: (None, 0), both_sides: (5, 5)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", BOUNDS, ids=lambda f: f.__name__)
def test_bounds(fn, dynamic):
    assert told(fn, dynamic=dynamic) == Interval(*BOUNDS[fn])


# ---------------------------------------------------------------- with data

PADDING = torch.arange(S, device=DEVICE)[None] < torch.tensor([[S], [7]], device=DEVICE)
RESTART = torch.cat((torch.arange(10), torch.arange(S - 10)))[None].expand(2, -1).contiguous().to(DEVICE)


def padded(x, padding):
    i, j = positions(x)
    return (j <= i) & padding.bool()[batches(x), j]


def padded_broadcast(x, padding):
    i, j = positions(x)
    return (j <= i).expand(x.shape[0], -1, -1, -1) & padding.bool()[:, None, None, :].expand(-1, -1, x.shape[1], -1)


def of_the_input(x):
    i, j = positions(x)
    return (j <= i) & (x[:, None, None, :] == 0)


def only_padding(x, padding):
    i, _ = positions(x)
    return (i >= 0) & padding.bool()[batches(x), positions(x)[1]]


def packed(x, p, window=None):
    """find_packed_sequence_indices of transformers, and its causal mask of the positions in each sequence."""
    b, (i, j) = batches(x), positions(x)
    sequence = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    mask = (sequence[b, i] == sequence[b, j]) & (p[b, j] <= p[b, i])
    return mask if window is None else mask & (p[b, j] > p[b, i] - window)


def packed_window(x, p):
    return packed(x, p, 5)


def packed_for_all(x, p):
    """One row of positions for the whole batch."""
    return packed(x, p[:1].expand(x.shape[0], -1))


def restarts(x, p):
    """Sequences counted by where they start, causal in the packed row."""
    b, (i, j) = batches(x), positions(x)
    sequence = (p == 0).int().cumsum(-1)
    return (sequence[b, j] == sequence[b, i]) & (j <= i)


def packed_without_blocks(x, p):
    i, j = positions(x)
    return packed(x, p) | ((i + j < 0) & (p[batches(x), j] == 3))


def chunked(x):
    i, j = positions(x)
    return (i // 8 == j // 8) & (j <= i)


def chunked_from_the_left(x, padding):
    """As Llama 4 does."""
    b, (i, j) = batches(x), positions(x)
    left = (padding.cumsum(-1) == torch.zeros_like(padding)).sum(-1)
    return ((j - left[b]) // 8 == (i - left[b]) // 8) & (j <= i) & padding.bool()[b, j]


def chunked_sequences(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (sequence[b, i] == sequence[b, j]) & (p[b, i] // 8 == p[b, j] // 8) & (p[b, j] <= p[b, i])


WITH_DATA = {
    padded: (PADDING.long(), (0, None, 0, 1)),
    padded_broadcast: (PADDING.long(), (0, None, 0, 1)),
    of_the_input: (None, (0, None, 0, 1)),
    only_padding: (PADDING, (None, None, 0, 1)),
    packed: (RESTART, (0, None, 1, 0)),
    packed_window: (RESTART, (0, 4, 1, 0)),
    packed_for_all: (RESTART, (0, None, 1, 0)),
    restarts: (RESTART, (0, None, 1, 0)),
    packed_without_blocks: (RESTART, (0, None, 1, 0)),
    chunked: (None, (0, None, 1, 0)),
    chunked_from_the_left: (PADDING.long(), (0, None, 1, 1)),
    chunked_sequences: (RESTART, (0, None, 2, 0)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("fn", WITH_DATA, ids=lambda f: f.__name__)
def test_data(fn, dynamic):
    data, expected = WITH_DATA[fn]
    assert counted(told(fn, *([] if data is None else [data]), dynamic=dynamic)) == expected


# ---------------------------------------------------------------- nearly, but not


def shifted_batch(x, p):
    """The padding of another batch's row is padding all the same, but a sequence must be this row's on both sides."""
    b, (i, j) = batches(x), positions(x)
    sequence = (p == 0).cumsum(-1)
    return (sequence[b, j] == sequence[1 - b, i]) & (j <= i)


def falling(x, p):
    """Ids that may fall: a run is no interval."""
    b, (i, j) = batches(x), positions(x)
    return (p[b, j] == p[b, i]) & (j <= i)


def summed_numbers(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = p.cumsum(-1)
    return (sequence[b, j] == sequence[b, i]) & (j <= i)


def summed_along_the_batch(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = (p == 0).cumsum(0)
    return (sequence[b, j] == sequence[b, i]) & (j <= i)


def negated(x, p):
    """Chunks counted down, with another size."""
    b, (i, j) = batches(x), positions(x)
    return ((p[b, j] - j) // 8 == (p[b, i] - i) // 8) & (j <= i)


def of_steps_of_two(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = (torch.diff(p, prepend=p[:, :1] - 2, dim=-1) != 2).cumsum(-1)
    return (sequence[b, i] == sequence[b, j]) & (p[b, j] <= p[b, i])


def of_other_positions(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    other = p + p
    return (sequence[b, i] == sequence[b, j]) & (other[b, j] % 3 <= other[b, i])


def in_no_sequence(x, p):
    b, (i, j) = batches(x), positions(x)
    return (p[b, j] <= p[b, i]) & (j <= i)


def other_sequence(x, p):
    b, (i, j) = batches(x), positions(x)
    sequence = (p == 0).cumsum(-1)
    return (sequence[b, i] == sequence[b, j] + 1) & (j <= i)


def either(x, padding):
    i, j = positions(x)
    return (j <= i) | padding.bool()[batches(x), j]


def valid_queries(x, padding):
    i, j = positions(x)
    return (j <= i) & padding.bool()[batches(x), i]


def window_of_data(x, p):
    i, j = positions(x)
    return (j <= i) & (j > i - p[batches(x), i])


def diagonal_by_heads(x, padding):
    """Three dimensions: the first would be that of heads."""
    i, j = (n[0] for n in positions(x))
    return (j <= i) & padding.bool()[:, None, :]


def from_the_end(x, p):
    n = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
    b, (i, j) = batches(x), positions(x)
    return (n[b, j - 1] <= n[b, i]) & (j <= i)


def backwards(x, p):
    n = torch.arange(x.shape[1], device=x.device).flip(0)[None].expand(x.shape[0], -1)
    b, (i, j) = batches(x), positions(x)
    return n[b, j] <= n[b, i]


def wrapped(x, p):
    """A count that passes 127 in 8 bits starts again."""
    b, (i, j) = batches(x), positions(x)
    sequence = (p >= 0).cumsum(-1).to(torch.int8)
    return (sequence[b, j] == sequence[b, i]) & (j <= i)


def written(x, p):
    i, j = positions(x)
    m = (j <= i).clone()
    m[..., 0] = True
    m[..., 1] = False
    return m


def prefix(x, p):
    i, j = positions(x)
    return (j <= i) | (j < 4)


def one_block(x, p):
    ids, (i, j) = torch.full(x.shape, 0, device=x.device), positions(x)
    of_i, of_j = ids[batches(x), i], ids[batches(x), j]
    return packed(x, p) | ((of_i == of_j) & (of_i >= 0) & (i - j < 3))


def triangle_of_data(x, p):
    i, j = positions(x)
    return (p[batches(x), i] <= j).tril()


def or_a_number(x, p):
    i, j = positions(x)
    return ((j <= i) | (p[batches(x), i] == 3)) | False


NOT = {
    **dict.fromkeys(
        [
            shifted_batch, falling, summed_numbers, summed_along_the_batch, negated, of_steps_of_two, of_other_positions,
            in_no_sequence, other_sequence, window_of_data, from_the_end, backwards, wrapped, written, prefix, one_block,
            or_a_number, triangle_of_data,
        ],
        RESTART,
    ),
    **dict.fromkeys([either, valid_queries, diagonal_by_heads], PADDING),
}  # fmt: skip


@pytest.mark.parametrize("fn", NOT, ids=lambda f: f.__name__)
def test_what_is_nearly_an_interval_is_not(fn):
    assert isinstance(told(fn, NOT[fn]), str)


def bias(x, p):
    i, j = positions(x)
    return (j - i).float()


def four_more(x, p):
    return causal(x)[None]


def chosen_keys(x, p):
    """Of each query the keys that it likes most."""
    likes = x[:, None, :, None] * x[:, None, None, :]
    return causal(x) & torch.zeros_like(likes, dtype=torch.bool).scatter(-1, likes.topk(4).indices, True)


def made_elsewhere(x, p):
    return p[:, None, :, None].expand(-1, -1, -1, 3)


def other_heads(x, p):
    return made_elsewhere(x, p).expand(-1, 4, -1, -1)


WHY = {
    bias: "numbers that are added", four_more: "5 dimensions", written: "written in place", window_of_data: "`gt` in it",
    valid_queries: "`getitem", made_elsewhere: "from outside", other_heads: "from head to head",
    chosen_keys: "numbers that the model computes: `scatter`",
}  # fmt: skip


@pytest.mark.parametrize("fn", WHY, ids=lambda f: f.__name__)
def test_why_not(fn):
    assert WHY[fn] in told(fn, RESTART == 0 if fn in (made_elsewhere, other_heads) else RESTART)
