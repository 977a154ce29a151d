"""Rewriting: only the match changes, metadata stay, failures leave the graph as it was, and training equals eager."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from toys import Call, Layer, Norm, Stack, checked, compiled, counts, llama_norm, matched, rewritten_graph, same, tables, turned

from sloth.rewriter import pipeline
from sloth.rewriter.backend import listening
from sloth.rewriter.match.matcher import Refused
from sloth.rewriter.match.registry import constructs, patterns
from sloth.rewriter.plan import apply as applying
from sloth.rewriter.plan import plan as planning
from sloth.rewriter.report import GraphReport, Report


def x_like(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


class Rewritten:
    """A graph before and after."""

    def __init__(self, gm: fx.GraphModule):
        self.gm = gm
        self.before, self.nodes = listed(gm), list(gm.graph.nodes)
        meta = {n: dict(n.meta) for n in self.nodes}
        self.report: GraphReport = pipeline.rewrite(gm, patterns(), constructs())
        self.after = listed(gm)
        self.kept_meta = all(n.meta.keys() == m.keys() and all(n.meta[k] is v for k, v in m.items()) for n, m in meta.items())

    @property
    def calls(self) -> list[fx.Node]:
        """What was put in, in graph order."""
        return [n for n in self.gm.graph.nodes if n not in self.nodes]

    @property
    def gone(self) -> set[str]:
        return {n.name for n in self.nodes} - {n.name for n in self.gm.graph.nodes}


def listed(gm: fx.GraphModule) -> str:
    """Nodes, code and bodies as text, without how often a node is read."""
    bodies = [listed(m) for m in gm.children() if isinstance(m, fx.GraphModule)]
    return "\n".join([*(shown(n) for n in gm.graph.nodes), gm.code, *bodies])


def shown(n: fx.Node) -> str:
    return re.sub(r"num_users=\d+", "", n.format_node() or "")


def rewritten(fn: Callable[..., Any], *args: Any) -> Rewritten:
    found: list[Rewritten] = []

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(Rewritten(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=look, fullgraph=True)(*args)
    return found[0]


# ---------------------------------------------------------------- what is not matched


def nothing_here(m, x):
    h = (x * m.w).transpose(0, 1).contiguous() + 0
    h = F.dropout(h, 0.0).float() * 1.0
    h[0] = 1.0
    return checkpoint(torch.sin, h, use_reentrant=False).chunk(2, -1)


def test_a_graph_without_matches_is_not_touched() -> None:
    found = rewritten(Call(nothing_here), x_like(2, 3, 8))
    assert found.after == found.before and list(found.gm.graph.nodes) == found.nodes
    assert found.kept_meta
    assert not found.report.sites and not found.report.untouched


def test_code_around_a_match_is_not_touched() -> None:
    """Spellings that the normal form has names of its own for stay as Dynamo wrote them."""

    def fn(m, x):
        h = (x * 1.0 + 0).contiguous().view(2, -1).unflatten(1, (3, 8))
        n = llama_norm(h, m.w)
        return F.dropout(n.transpose(0, 1), 0.0).chunk(2, -1)[1] ** 2

    found = rewritten(Call(fn), x_like(2, 3, 8))
    kept = [n for n in found.nodes if n.name not in found.gone]
    assert [str(n.target) for n in found.calls] == ["sloth.rms_norm.default"]
    lines = dict(zip((n.name for n in found.nodes), found.before.split("\n"), strict=False))
    (call,) = found.calls
    old = [n for n in kept if call not in n.all_input_nodes]
    assert [shown(n) for n in old if n.op != "placeholder"] == [lines[n.name] for n in old if n.op != "placeholder"]
    assert [n for n in found.gm.graph.nodes if n is not call] == kept, "order"


# ---------------------------------------------------------------- what is


def test_only_the_dead_nodes_of_the_match_go() -> None:
    def fn(m, x):
        h = x.float().pow(2)
        x.exp()  # dead, but none of ours
        r = torch.rsqrt(h.mean(-1, keepdim=True) + 1e-6)
        return m.w * (x * r), h

    found = rewritten(Call(fn), x_like(2, 3, 8))
    ops = [str(n.target) for n in found.gm.graph.nodes if n.op.startswith("call")]
    assert sorted(ops) == ["exp", "float", "pow", "sloth.rms_norm.default"]


def test_metadata_moves_to_the_call() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, x):
            return self.norm(x * 2)

    found = rewritten(Model(), x_like(2, 3, 8))
    (call,) = found.calls
    assert "toys.py" in call.meta["stack_trace"] and "llama_norm" in call.meta["stack_trace"]
    assert any("norm" in str(where) for where in call.meta["nn_module_stack"].values())
    assert call.meta["example_value"].shape == (2, 3, 8) and call.meta["sloth"] == "rms_norm"


def test_several_results_are_taken_apart() -> None:
    def fn(m, x, r):
        h = x + r
        return llama_norm(h, m.w), h * 2

    found = rewritten(Call(fn), x_like(2, 3, 8), x_like(2, 3, 8))
    call, *items = found.calls
    assert str(call.target) == "sloth.add_rms_norm.default" and "example_value" not in call.meta
    assert [(n.target, n.args) for n in items] == [(operator.getitem, (call, 0)), (operator.getitem, (call, 1))]
    assert all(n.meta["example_value"].shape == (2, 3, 8) for n in items)
    assert found.gone == {n.name for n in found.nodes if n.op.startswith("call") and n.name not in ("mul_2",)} - {
        n.name for n in found.gm.graph.nodes
    }


def test_the_call_stands_as_early_as_its_operands_allow() -> None:
    def fn(m, x):
        a = x * 2
        b = a.exp()
        return llama_norm(a, m.w), b

    found = rewritten(Call(fn), x_like(2, 3, 8))
    (call,) = found.calls
    assert call.prev.target is operator.mul and call.prev.args[1] == 2


def test_operands_that_are_no_nodes_are_written_out() -> None:
    """Under autocast the gate of the MLP is a cast that no node stands for."""

    def fn(m, x):
        g, u = (x * m.w).chunk(2, -1)
        return F.silu(g) * u

    found = rewritten(Call(fn), x_like(2, 3, 8))
    assert [str(n.target) for n in found.calls] == ["sloth.gated_act_packed.default"]
    assert checked(Call(fn), x_like(2, 3, 8)).sites[0].status == "matched"


def test_copies_of_a_result_keep_their_layout() -> None:
    """contiguous() is no mathematics, but .view behind it needs it."""

    def fn(m, q, k):
        cos, sin = tables(2, 4, 8)
        a, b = turned(q.transpose(1, 2), cos, sin), turned(k.transpose(1, 2), cos, sin)
        return a.transpose(1, 2).contiguous().view(2, 4, -1), b.contiguous().view(-1)

    assert matched(checked(Call(fn), x_like(2, 4, 2, 8), x_like(2, 4, 2, 8))) == {"rope": 1}


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("stage", ["lower", "Matcher", "legality.check", "Rewriter.apply", "second apply"])
def test_an_exception_leaves_every_graph_as_it_was(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is raised, also when part of the matches is in the graph already."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a bug\nwith more to say")

    apply, done = applying.Rewriter.apply, []

    def second(self: Any, match: Any) -> Any:
        return fail() if done else done.append(1) or apply(self, match)

    if stage in ("Rewriter.apply", "second apply"):
        monkeypatch.setattr(applying.Rewriter, "apply", fail if stage == "Rewriter.apply" else second)
    elif stage == "legality.check":
        monkeypatch.setattr(planning.legality, "check", fail)
    elif stage == "Matcher":
        monkeypatch.setattr(planning, "Matcher", fail)
    else:
        monkeypatch.setattr(pipeline, stage, fail)

    def fn(m, x):
        return checkpoint(lambda x: llama_norm(llama_norm(x, m.w), m.v), llama_norm(x * 2, m.w), use_reentrant=False)

    found = rewritten(Call(fn), x_like(2, 3, 8))
    assert found.after == found.before
    if "apply" in stage:  # costs the entry, and there is no other
        assert not found.report.untouched and not found.report.rewrites
        return
    assert found.report.untouched == "RuntimeError: a bug" and not found.report.sites
    assert found.report.line({}) == "graph left as it was: RuntimeError: a bug"
    done.clear()
    report = checked(Call(fn), x_like(2, 3, 8))
    assert report.to_dict()["untouched"] == ["RuntimeError: a bug"] and "a bug" in str(report)


NOT_HERE = ("rms_norm[llama]", "convexity", "not here")
OTHER = ("rms_norm[llama]", "matched", "")


@pytest.mark.parametrize("refused, sites", [(1, [OTHER, ("rms_norm[no_weight]", "matched", "")]), (2, [NOT_HERE, OTHER])])
def test_a_match_that_cannot_be_placed_leaves_the_others(monkeypatch: pytest.MonkeyPatch, refused: int, sites: list) -> None:
    """What it took the place of, the norm without its weight, may have it; where that cannot be placed either, nothing."""
    apply, seen = applying.Rewriter.apply, []

    def refusing(self: Any, match: Any) -> Any:
        seen.append(match)
        if len(seen) <= refused:
            raise Refused("convexity", "not here")
        return apply(self, match)

    monkeypatch.setattr(applying.Rewriter, "apply", refusing)
    report = checked(Call(lambda m, x: llama_norm(llama_norm(x, m.w), m.v)), x_like(2, 3, 8))
    assert sorted((s.variant, s.status, s.reason) for s in report.sites) == sites


# ---------------------------------------------------------------- whole models


def test_graph_breaks_make_several_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Layer(), Layer()

        def forward(self, x):
            t = tables(*x.shape[:2], 4)
            x = self.first(x, *t)
            torch._dynamo.graph_break()
            return self.second(x, *t)

    report = checked(Broken(), x_like(2, 4, 8))
    assert len(report.graphs) == 2
    assert counts(report) == {"rms_norm": "4/4", "rope": "2/2", "gated_mlp": "2/2"}


def test_a_graph_that_serves_several_layers_counts_for_each() -> None:
    """A break in a loop: Dynamo skips its frame, and compiles what is called there by itself, once for equal layers."""

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Call(lambda m, x: llama_norm(x, m.w)) for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x) + 1
                torch._dynamo.graph_break()
            return x

    report = checked(Loop(), x_like(2, 4, 8))
    assert len(report.graphs) == 1 and counts(report) == {"rms_norm": "3/3"}


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
def test_five_steps_of_training_equal_eager(optimiser: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = Stack(1)
    theirs = copy.deepcopy(model)

    def train(module: nn.Module, run: Callable[..., Tensor]) -> dict[str, Tensor]:
        optim = optimiser(module.parameters(), lr=0.05)
        losses = []
        for step in range(5):
            loss = run(x_like(2, 4, 8, grad=False) + step)
            loss.backward()
            optim.step()
            optim.zero_grad()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses)} | {n: p.detach() for n, p in module.named_parameters()}

    with listening() as graphs:
        ours = train(model, compiled(model))
    eager = train(theirs, theirs)
    assert len(graphs) == 1 and matched(Report(graphs)), "one graph for all steps"
    same(ours, eager, 2e-4)
    assert eager["losses"].std() > 1e-3, "the weights moved"


def test_gradients_accumulate_over_two_calls() -> None:
    model = Call(lambda m, x: llama_norm(x, m.w).pow(3).sum())
    theirs = copy.deepcopy(model)
    run, x = compiled(model), x_like(2, 3, 8, grad=False)
    for f in (run, theirs):
        f(x).backward()
        (f(x + 1) * 2).backward()
    assert model.w.grad is not None and theirs.w.grad is not None
    torch.testing.assert_close(model.w.grad, theirs.w.grad, rtol=1e-4, atol=1e-4)


def test_a_graph_kept_for_a_second_backward() -> None:
    model = Call(lambda m, x: llama_norm(x, m.w).pow(3).sum())
    loss = compiled(model)(x_like(2, 3, 8))
    first = torch.autograd.grad(loss, model.w, retain_graph=True)
    second = torch.autograd.grad(loss, model.w)
    torch.testing.assert_close(first, second)


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "result used twice": lambda n, x: (n * n.exp(), n + x),
    "result returned twice": lambda n, x: (n, n),
    "result returned and used": lambda n, x: (n, n.sum()),
    "result only detached": lambda n, x: (n.detach(), x * 2),
    "result only for its shape": lambda n, x: x.new_ones(n.shape) * x,
    "result unused": lambda n, x: x * 2,
    "result viewed": lambda n, x: (n.view(-1)[::2], n.transpose(0, 1)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_uses_of_a_result(use: Callable[[Tensor, Tensor], Any]) -> None:
    report = checked(Call(lambda m, x: use(llama_norm(x, m.w), x)), x_like(2, 3, 8))
    assert not [s for s in report.sites if s.status != "matched"] and not report.graphs[0].untouched


@pytest.mark.parametrize("returned", ["h", "norm", "both", "neither"])
def test_results_of_which_one_is_unused(returned: str) -> None:
    """The residual sum or the norm may be all that is wanted, or all that gets a gradient."""

    def fn(m, x, r):
        h = x + r
        n = llama_norm(h, m.w)
        return {"h": (h, n.detach()), "norm": (n,), "both": (h, n), "neither": (h.detach() * m.w, n.detach() * m.v)}[returned]

    report = checked(Call(fn), x_like(2, 3, 8), x_like(2, 3, 8))
    assert matched(report) == {"add_rms_norm": 1}


def test_shared_modules_are_called_twice() -> None:
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm()

        def forward(self, x):
            return self.norm(self.norm(x).exp())

    assert counts(checked(Shared(), x_like(2, 3, 8))) == {"rms_norm": "2/2"}


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    def fn(m, x):
        return llama_norm(x, m.w) * m.w + llama_norm(x.exp(), m.w)

    assert counts(checked(Call(fn), x_like(2, 3, 8))) == {"rms_norm": "2/2"}


def test_odd_layouts_of_inputs() -> None:
    """Strides are no part of the match: expanded, transposed and sliced inputs."""
    model = Call(lambda m, x: llama_norm(x, m.w))
    base = torch.randn(3, 2, 16)
    for x in (
        base.transpose(0, 1)[..., ::2],
        torch.randn(1, 1, 8).expand(2, 3, 8),
        base[:, :, 8:],
        torch.randn(8),
    ):
        assert matched(checked(model, x.detach().requires_grad_())) == {"rms_norm": 1}


def test_misses_that_cannot_be_told_cost_no_rewrite(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("of a message")

    monkeypatch.setattr("sloth.rewriter.pipeline.missed_sites", fails)
    gm = rewritten_graph(Norm(8), torch.randn(2, 3, 8))
    assert [n for n in gm.graph.nodes if "rms_norm" in str(n.target)]
    assert "is not told: KeyError" in caplog.text


def test_symbols_are_written_as_nodes() -> None:
    """A graph holds no symbols, though its inputs may have their names: sizes of a view are inputs, or sizes of one."""
    seen = []

    def sloth(gm: fx.GraphModule, _: Any) -> Callable:
        rewriter = object.__new__(applying.Rewriter)
        rewriter.graph = gm.graph
        (x,) = (n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), Tensor) and n.op == "placeholder")
        rows, columns = x.meta["example_value"].shape
        seen.append([rewriter.number(a) for a in (rows, (columns, 3), rows * columns + 1)])
        gm.graph.lint()
        return gm.forward

    torch.compile(lambda x: x.sin(), backend=sloth, dynamic=True)(torch.randn(4, 6))
    ((rows, (columns, three), other),) = seen
    assert isinstance(rows, fx.Node) and isinstance(columns, fx.Node) and rows is not columns and three == 3
    assert isinstance(other, torch.SymInt), "that is no size of an input"
