"""The bar on a terminal: it says what is compiled, is nobody else's business, and breaks nothing."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sloth.rewriter.backend  # noqa: F401
from sloth.rewriter import progress
from sloth.rewriter.compile import regions


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Layer(nn.Module):
    """Enough calls to be worth a part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(regions.CALLS // 2):
            y = torch.tanh(y @ self.w)
        return x + y


def watch(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal from now on; no fixture, since pytest puts its own stderr in place behind those."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", made := Terminal())
    return made


def test_a_terminal_is_told_which_kind_of_layer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    torch._dynamo.reset()
    model, x = nn.Sequential(*(Layer() for _ in range(6)), nn.Tanh()), torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(model, backend="sloth", options={"sloth.inner_backend": "eager"})(x), model(x))
    told = re.findall(r"sloth: compiling (\d) of (\d) kinds of layer", terminal.getvalue())
    assert [*dict.fromkeys(told)] == [("1", "3"), ("2", "3"), ("3", "3")]


def compile_two(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
    """A backend."""
    progress.starting(2)
    print("a line", file=sys.stderr)
    one = progress.each(lambda gm, _: gm.forward)
    return one(gm, ()) and one(gm, ())


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    monkeypatch.setattr(progress, "SMALL", 0)
    return fx.symbolic_trace(Layer())


def test_nobody_else_is_told(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    assert progress.watched(compile_two)(graph, ()) == graph.forward
    assert "2 of 2 kinds of layer" in terminal.getvalue() and not progress._shown.locked()
    assert "\x1b[2Ka line\n" in terminal.getvalue()  # on a line of its own
    for silent in (lambda: monkeypatch.setenv("LOCAL_RANK", "1"), lambda: monkeypatch.setattr(sys, "stderr", io.StringIO())):
        with monkeypatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "stderr", Terminal())
            silent()
            progress.watched(compile_two)(graph, ())
            assert sys.stderr.getvalue() == "a line\n"
    with progress._shown:  # another thread's
        monkeypatch.setattr(sys, "stderr", other := Terminal())
        progress.watched(compile_two)(graph, ())
    assert other.getvalue() == "a line\n"


@pytest.mark.parametrize("method", ["start", "update", "stop", "add_task"])
def test_what_goes_wrong_costs_the_bar(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    from rich.progress import Progress

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the terminal is gone")

    watch(monkeypatch)
    monkeypatch.setattr(Progress, method, fail)
    assert progress.watched(compile_two)(graph, ()) == graph.forward
    assert not progress._shown.locked()


def test_an_error_ends_it(graph: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gm: Any, _: Any) -> Callable[..., Any]:
        raise RuntimeError("no")

    terminal = watch(monkeypatch)
    with pytest.raises(RuntimeError, match="no"):
        progress.watched(fail)(graph, ())
    assert not progress._shown.locked() and terminal.getvalue().endswith("\x1b[2K")  # the line is empty again
