"""However a mask is spelled, it is read: what truths it is made of, how they become numbers, and what is done to these."""

import itertools

import pytest
import torch

from sloth.patterns.attention.additive_mask import added, why_not
from sloth.patterns.attention.mask_analysis import Interval, meaning
from sloth.rewriter.graph.lower import lower

S = 10
LEAST, INF = torch.finfo(torch.float32).min, float("inf")


def at():
    return torch.arange(S), torch.arange(S)[:, None]


TRUTHS = {  # of which key a query sees
    "compared": lambda: at()[0] <= at()[1],
    "not above": lambda: ~(at()[0] > at()[1]),
    "less one": lambda: torch.arange(S) < (torch.arange(S) + 1).view(S, 1),
    "triangle": lambda: torch.ones(S, S, dtype=torch.bool).tril(),
    "triangle of numbers": lambda: torch.ones(S, S).tril() == 1,
    "triangle of integers": lambda: torch.ones(S, S, dtype=torch.int64).tril().bool(),
    "no upper triangle": lambda: torch.ones(S, S).triu(1) == 0,
    "not the upper": lambda: torch.logical_not(torch.triu(torch.ones(S, S, dtype=torch.uint8), diagonal=1)),
    "product": lambda: (at()[0] <= at()[1]) * torch.ones(S, 1, dtype=torch.bool),
    "filled": lambda: torch.ones(S, S, dtype=torch.bool).masked_fill(at()[0] > at()[1], False),
    "of a longer one": lambda: torch.ones(S + 5, S + 5).tril()[:S, :S] > 0.5,
}
NUMBERS = {
    "where": lambda m: torch.where(m, 0.0, LEAST),
    "filled": lambda m: torch.zeros(S, S).masked_fill(~m, -INF),
    "zeros filled": lambda m: torch.full((S, S), -1e9).masked_fill(m, 0),
    "one less": lambda m: (1.0 - m.float()) * LEAST,
    "one less, 10000": lambda m: (1 - m.to(torch.float32)) * -10000.0,
    "logarithm": lambda m: m.float().log(),
    "least": lambda m: torch.maximum(torch.where(m, 0.0, -INF), torch.tensor(LEAST)),
    "in place": lambda m: torch.full((S, S), LEAST).masked_fill_(m, 0.0),
    "sum": lambda m: torch.where(m, 0.0, LEAST) + torch.zeros(S, S).masked_fill(at()[0] > at()[1] + 3, LEAST),
    "twice": lambda m: torch.where(m, 0.0, torch.where(at()[0] > at()[1] + 3, -1e9, -INF)),
}
BEHIND = {
    "as it is": lambda x: x,
    "unsqueezed": lambda x: x[None, None],
    "expanded": lambda x: x.view(1, 1, S, S).expand(2, 1, S, S),
    "cast": lambda x: x.double().to(torch.float32).unsqueeze(0),
    "with nothing": lambda x: torch.cat((torch.zeros(S, 0), x), -1),
    "sliced": lambda x: x[:, :][None, None, :S, :S],
}


def in_place():
    """BART's: memory that is written before it is read."""
    m = torch.full((S, S), torch.tensor(LEAST))
    m.masked_fill_(torch.arange(S) < (torch.arange(S) + 1).view(S, 1), 0)
    return m


def written_of_itself():
    """OLMo's first."""
    m = torch.triu(torch.ones(S, S), 1)
    m.masked_fill_(m == 1, LEAST)
    return m


SPELLED = [(f"{a}, {b}", lambda x, y: lambda: y(x()), TRUTHS[a], NUMBERS[b]) for a, b in itertools.product(TRUTHS, NUMBERS)]
MASKS = {
    **{name: make(x, y) for name, make, x, y in SPELLED},
    "in place": in_place,
    "written of itself": written_of_itself,
    "triu of a full": lambda: torch.full((S, S), -INF).triu(1),
    "triu of least": lambda: torch.triu(torch.full((S, S), LEAST), diagonal=1),
}


def read(masks):
    """The value of each of them in one graph."""
    found = []

    def look(gm, _):
        (view,) = lower(gm)
        found.extend(view.env[n] for n in gm.graph.output_node().args[0])
        return gm.forward

    torch._dynamo.reset()
    eager = torch.compile(lambda: tuple(mask() for mask in masks), backend=look)()
    return list(zip(found, eager, strict=True))


@pytest.mark.parametrize("behind", BEHIND)
def test_causal(behind):
    step = 3 if behind == "as it is" else 9  # no divisor of how many truths, or numbers, there are
    masks = {n: MASKS[n] for i, n in enumerate(MASKS) if i % step == 0 or i >= len(SPELLED)}
    for (name, _), (value, mask) in zip(
        masks.items(), read([lambda m=m: BEHIND[behind](m()) for m in masks.values()]), strict=True
    ):
        told = added(value)
        assert told is not None and told.bias is None, f"{name}: {why_not(value)}"
        assert meaning(told.seen) == Interval(ahead=0), name
        assert torch.all((mask == 0) == (torch.ones(S, S).tril() == 1)), name
        assert torch.all((mask == 0) | (mask <= told.least)), name


NOT = {
    "one": lambda m: torch.where(m, 1.0, LEAST),
    "little": lambda m: torch.where(m, 0.0, -100.0),
    "two less": lambda m: (2.0 - m.float()) * LEAST,
    "nan": lambda m: (1.0 - m.float()) * -INF,
    "of three": lambda m: torch.where(m, 0.0, LEAST) + torch.eye(S),
    "of distance": lambda m: torch.where(m, (at()[0] - at()[1]).float(), LEAST) * 2,
    "written later": lambda m: _written_later(),
}


def _written_later():
    """Somebody has a view of it before it is written."""
    m = torch.full((S, S), LEAST)
    row = m[0]
    m.masked_fill_(at()[0] <= at()[1], 0.0)
    return m + row


@pytest.mark.parametrize("mask", NOT)
def test_what_is_no_mask(mask):
    ((value, _),) = read([lambda: NOT[mask](at()[0] <= at()[1])])
    told = added(value)
    assert told.bias is not None if mask in ("of three", "of distance") else told is None and why_not(value)


def test_reading_names_where_it_stopped():
    ((value, _),) = read([lambda: torch.where(at()[0] <= at()[1], 0.0, LEAST).cos()[None, None] * 2])
    assert "`cos`" in why_not(value)
