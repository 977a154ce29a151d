"""sloth.rewriter.compile.passes.in_one_call: what stands in a row is one call, and nothing else changes."""

import pytest
import torch
from torch import fx

from sloth.rewriter.compile import passes

ABS, NEG = torch.ops.aten.abs.default, torch.ops.aten.neg.default
MANY = torch.ops.aten._foreach_abs.default


@pytest.fixture(autouse=True)
def abs_goes_together(monkeypatch):
    monkeypatch.setattr(passes, "_TOGETHER", {})
    passes.called_together(ABS, MANY, 3, lambda calls: ([c[0] for c in calls],) if len(calls) != 2 else None)


def after(*steps: str) -> list[str]:
    """What a graph of these calls becomes: `a`, abs of the input; `c`, abs of what was last; `n`, neg of the input."""
    graph, targets = fx.Graph(), {"a": ABS, "c": ABS, "n": NEG}
    x = last = graph.placeholder("x")
    x.meta["val"] = torch.randn(3)
    made = []
    for step in steps:
        last = graph.call_function(targets[step], (last if step == "c" else x,))
        last.meta["val"] = torch.empty(3)
        made.append(last)
    graph.output(tuple(made))
    before = fx.GraphModule({}, graph)(x.meta["val"])
    passes.in_one_call(graph)
    graph.lint()
    found = fx.GraphModule({}, graph)(x.meta["val"])
    assert all(map(torch.equal, found, before)) and len(found) == len(before)
    assert all("val" in n.meta for n in graph.nodes if n.op == "call_function")
    names = {ABS: "abs", NEG: "neg", MANY: "many"}
    return [names[n.target] for n in graph.nodes if n.target in names]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("aaa", ["many"]),
        ("aaaa", ["many", "abs"]),
        ("aaaaaa", ["many", "many"]),
        ("aaanaaa", ["many", "neg", "many"]),
        ("ana", ["abs", "neg", "abs"]),
        ("acc", ["abs", "abs", "abs"]),
        ("aaac", ["many", "abs"]),
        ("aa", ["abs", "abs"]),
        ("n", ["neg"]),
        ("", []),
    ],
)
def test_rows(steps, expected):
    """A row ends where another call stands, or one that reads what is in it; `aa` is what does not fit together here."""
    assert after(*steps) == expected


def test_not_across_devices():
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = [graph.call_function(ABS, (x,)) for _ in range(3)]
    for n, device in zip(made, ("cpu", "meta", "meta"), strict=True):
        n.meta["val"] = torch.empty(3, device=device)
    graph.output(tuple(made))
    passes.in_one_call(graph)
    assert [n for n in graph.nodes if n.target is ABS] == made
