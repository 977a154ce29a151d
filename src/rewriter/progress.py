"""What is being compiled, on a terminal where somebody watches: `compiling 2 of 3 kinds of layer`, with a bar and a clock.

A log has one line before the wait (`backend.py`); the bar is for a terminal alone, and is gone when the graph is compiled. Of
threads that compile at the same time one has it, of the processes of a machine the first. Whatever goes wrong with a terminal
costs the bar, and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import fx

from sloth.rewriter.notices import log

SMALL = 100  # nodes: such a graph is compiled before anybody reads
_shown = threading.Lock()  # held by whom the bar is


class Bar:
    """Of one graph. display, task: rich's."""

    def __init__(self, display: Any, task: Any) -> None:
        self.display, self.task, self.kinds, self.begun = display, task, 1, 0

    def next(self) -> None:
        self.begun = min(self.begun + 1, self.kinds)
        what = f"{self.begun} of {self.kinds} kinds of layer" if self.kinds > 1 else "the model"
        now = {"description": f"compiling {what}", "total": self.kinds, "completed": self.begun - 1}
        with suppress(Exception):
            self.display.start()
            self.display.update(self.task, refresh=True, **now)

    def hide(self) -> None:
        """Until the next call of `next`: its line is free for others."""
        with suppress(Exception):
            self.display.stop()


_bar: ContextVar[Bar | None] = ContextVar("sloth_bar", default=None)  # of the graph that is compiled, where somebody watches


def starting(kinds: int) -> None:
    """So many kinds of layer will be compiled, when a line for the log has been written."""
    if (bar := _bar.get()) is not None:
        bar.kinds = kinds
        bar.hide()


def each(compile_one: Callable[..., Any]) -> Callable[..., Any]:
    """`compile_one`, with every call told."""

    @wraps(compile_one)
    def told(*args: Any) -> Any:
        if (bar := _bar.get()) is not None:
            bar.next()
        return compile_one(*args)

    return told


def watched(backend: Callable[..., Any]) -> Callable[..., Any]:
    """The backend, with a bar while it compiles a graph."""

    @wraps(backend)
    def shown(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        with _watching(gm):
            return backend(gm, *args, **kwargs)

    return shown


@contextmanager
def _watching(gm: fx.GraphModule) -> Iterator[None]:
    mine = _is_watched(gm) and _shown.acquire(blocking=False)
    bar = _begun() if mine else None
    token = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(token)
        if bar is not None:
            bar.hide()
        if mine:
            _shown.release()


def _is_watched(gm: fx.GraphModule) -> bool:
    if sys.stderr is None or not sys.stderr.isatty() or len(gm.graph.nodes) <= SMALL:
        return False
    return os.environ.get("LOCAL_RANK", "0") == "0" and log.isEnabledFor(logging.INFO)


def _begun() -> Bar | None:
    """A bar on the terminal; None if there can be none."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = SpinnerColumn(), TextColumn("sloth: {task.description}"), BarColumn(), TimeElapsedColumn()
        display = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
        task = display.add_task("rewriting the model", total=None)
        display.start()
        return Bar(display, task)
    except Exception:
        log.debug("sloth: no bar can be shown", exc_info=True)
        return None
