"""The plan: it edits nothing, says what will be done, and is undone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from toys import Call, Stack, llama_norm, tables, turned

from sloth.lazy import rows as lazy_rows
from sloth.rewriter.graph.lower import lower
from sloth.rewriter.match.registry import deferrals, patterns
from sloth.rewriter.plan.apply import apply
from sloth.rewriter.plan.plan import Plan, plan

V = 30_000


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, V, bias=False)

    def forward(self, x):
        return self.head(llama_norm(x, self.w))


class Layers(Stack):
    """Each in a checkpoint."""

    def forward(self, x):
        cos, sin = tables(x.shape[0], x.shape[1], self.d)
        for layer in self.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False)
        return x.pow(2).mean()


def pair(use: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """q and k, k made of `use` of the turned q where that wants it."""

    def fn(m, q):
        cos, sin = tables(2, 4, 8)
        a = turned(q * m.w, cos, sin)
        early = use(a)
        return early, turned((early if use is PASSED else q) * m.v, cos, sin)

    return Call(fn)


PASSED: Callable[[torch.Tensor], torch.Tensor] = lambda a: a  # noqa: E731
QK = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "layers": (lambda: Stack(2), X),
    "bodies": (lambda: Layers(2), X),
    "lazy logits": (Head, X),
    "in place": (lambda: Call(lambda m, x: llama_norm(x.clone().mul_(2), m.w)), X),
    "pairs": (lambda: pair(PASSED), QK),
}


@pytest.fixture(autouse=True)
def few_logits_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_rows, "CHUNK", V)


def state(gm: fx.GraphModule) -> list[Any]:
    """All of a graph and its bodies: nodes, by identity, their arguments, metadata and users, and text."""
    found: list[Any] = [
        (n, n.op, n.target, n.args, dict(n.kwargs), list(n.users), {k: id(v) for k, v in n.meta.items()}) for n in gm.graph.nodes
    ]
    return [*found, gm.code, *(state(m) for m in gm.children() if isinstance(m, fx.GraphModule))]


def text(gm: fx.GraphModule) -> list[str]:
    """Without names: what is restored is a copy."""
    bodies = [line for m in gm.children() if isinstance(m, fx.GraphModule) for line in text(m)]
    return [re.sub(r"num_users=\d+", "", n.format_node() or "") for n in gm.graph.nodes] + bodies


def with_graph(model: nn.Module, x: torch.Tensor, look: Callable[[fx.GraphModule], None]) -> None:
    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        look(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(x)


def made(gm: fx.GraphModule, limit: int | None = None) -> Plan:
    return plan(lower(gm), [p for p in patterns() if p.variants], deferrals(), limit)


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_edits_nothing_and_what_is_applied_is_undone(name: str) -> None:
    model, x = MODELS[name]

    def look(gm: fx.GraphModule) -> None:
        lowered = lower(gm)
        known = [v for view in lowered for v in view.shadow.values]
        nodes = [(v, list(v.nodes), list(v.users)) for v in known]
        before, listing = state(gm), text(gm)
        found = plan(lowered, patterns(), deferrals())
        printed = str(found)
        assert state(gm) == before and printed
        added = {v for view in lowered for v in view.shadow.values} - {*known}  # operands to be written anew
        assert not any(v.nodes for v in added)
        assert [(v, list(v.nodes), [u for u in v.users if u not in added]) for v in known] == nodes
        planned = [[m.variant for m in p] for g in found.graphs for p in g.placements]
        done = apply(found)
        assert text(gm) != listing and [[m.variant for m in p] for g in found.graphs for p in g.placements] == planned
        assert ("is computed when it is read" in printed) == any(d.deferred for d in done) == (name == "lazy logits")
        found.restore()
        assert text(gm) == listing

    with_graph(model(), x, look)


def test_it_is_printed_with_a_line_for_each_placement() -> None:
    def fn(m, x):
        return F.silu(llama_norm(x, m.w)) * llama_norm(x.exp(), m.v)

    def look(gm: fx.GraphModule) -> None:
        lines = str(made(gm)).split("\n")
        assert [re.sub(r"\(\S+py:\d+\)", "(…)", line).strip() for line in lines] == [
            "1  rms_norm[llama] in place of 6 operations (…)",
            "2  rms_norm[llama] in place of 6 operations (…)",
            "3  gated_mlp[silu] in place of 2 operations (…)",
        ]

    with_graph(Call(fn), X, look)
    printed: list[str] = []
    with_graph(Call(lambda m, x: x.exp()), X, lambda gm: printed.append(str(made(gm))))
    assert printed == ["nothing to rewrite"]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_the_limit_acts_on_the_plan(limit: int) -> None:
    """The first ones, in the order of the graph; the others are noted as refused, and nothing takes their place."""

    def look(gm: fx.GraphModule) -> None:
        everything, found = made(gm), made(gm, limit)
        first = [str(m.variant) for m in everything.graphs[0].matches]
        (graph,) = found.graphs
        assert [str(m.variant) for m in graph.matches] == first[:limit]
        beyond = [str(m.variant) for m, why in graph.refused if why.status == "limit"]
        assert beyond == first[limit:] and len(first) > 3
        apply(found)
        assert len([n for n in gm.graph.nodes if "sloth" in n.meta and "getitem" not in n.name]) == limit

    with_graph(Stack(2), X, look)


def test_logits_that_are_computed_at_once_are_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_rows, "CHUNK", 1 << 30)

    def look(gm: fx.GraphModule) -> None:
        assert f"head refused, unprofitable: {2 * 4 * V * 4} bytes of logits are computed at once" in str(made(gm))

    with_graph(Head(), X, look)


def test_an_operand_that_depends_on_a_result_is_seen_in_the_plan() -> None:
    """What the pair took the place of has it back before anything is edited."""

    def look(gm: fx.GraphModule) -> None:
        (graph,) = made(gm).graphs
        assert [m.pattern.name for m in graph.matches] == ["rope_single"] * 2
        assert {(m.pattern.name, why.status) for m, why in graph.refused} == {("rope", "convexity")}

    with_graph(pair(PASSED), QK, look)


def test_a_reader_that_cannot_move_is_seen_when_the_plan_is_applied() -> None:
    """The plan says afterwards what was done."""

    def look(gm: fx.GraphModule) -> None:
        found = made(gm)
        (graph,) = found.graphs
        assert [m.pattern.name for m in graph.matches] == ["rope"] and not graph.refused
        apply(found)
        assert [m.pattern.name for m in graph.matches] == ["rope_single"] * 2
        assert {(m.pattern.name, why.status) for m, why in graph.refused} == {("rope", "convexity")}

    def fn(m, q, k):
        cos, sin = tables(2, 4, 8)
        a = turned(q * m.w, cos, sin)
        early = F.dropout(a, 0.5)
        return early, turned(k * m.v, cos, sin)

    with_graph(Call(lambda m, x: fn(m, x, x + 1)), QK, look)


def test_what_comes_back_in_place_of_a_refused_match_counts_for_the_limit() -> None:
    """Two for one: no more than the limit allows."""

    def look(gm: fx.GraphModule) -> None:
        found = made(gm, 1)
        (graph,) = found.graphs
        assert [m.pattern.name for m in graph.matches] == ["rope_single"]
        assert {why.status for m, why in graph.refused} == {"convexity", "limit"}

    with_graph(pair(PASSED), QK, look)
