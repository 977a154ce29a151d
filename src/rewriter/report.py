"""What was rewritten, what was not, and why: one `Site` for each place in the model, collected in a `Report`."""

from __future__ import annotations

import json
import linecache
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text
from torch import fx

MATCHED = "matched"
LIBRARIES = tuple(f"{Path(torch.__file__).parents[1] / name}{os.sep}" for name in ("torch", "einops"))  # what models call
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Site:
    """One place where a construct occurs. status: "matched", or the rule that refused it; reason: the first thing that
    differed.
    """

    construct: str
    variant: str
    status: str
    file: str = ""
    line: int = 0
    reason: str = ""


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time that this block takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class GraphReport:
    """One compiled graph."""

    sites: list[Site] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # stage → time
    rewrites: int = 0  # made; of bodies that several calls share, once
    untouched: str = ""  # why the graph went through as it was, if it did
    expected: dict[str, int] = field(default_factory=dict)  # by construct, sites that the modules called here have
    opaque: dict[str, str] = field(default_factory=dict)  # node → why the shadow does not look inside
    unread: Counter[str] = field(default_factory=Counter)  # how many layers, by kind, are in such places
    guards: list[str] = field(default_factory=list)  # that rewriting added, of which there should be none
    deferred: list[Any] = field(default_factory=list)  # outputs that are computed when they are read
    plan: Any = field(default=None, repr=False)  # what was applied, until the graph is compiled
    verified: list[Any] = field(default_factory=list)  # by `sloth.verify`: a line for each distinct rewrite
    parts: int = 1  # into which it was cut, and how many of them had to be compiled: equal ones are compiled once
    compiled: int = 1
    runs: int = 0  # while it was listened to

    def line(self, titles: dict[str, str]) -> str:
        """`129/129 RMSNorm, 32/32 RoPE, 0.8 s`"""
        if self.untouched:
            return f"graph left as it was: {self.untouched}"
        parts = [f"{n['matched']}/{n['expected']} {titles.get(c, c)}" for c, n in counts(self.sites, self.expected).items()]
        parts += [f"{n} {kind} not looked into" for kind, n in self.unread.items()]
        return f"{', '.join(parts or ['nothing to rewrite'])}, {sum(self.seconds.values()):.1f} s"


def counts(sites: list[Site], expected: dict[str, int]) -> dict[str, dict[str, int]]:
    """name → {"matched": int, "expected": int}; expected: of those that were seen or, if more, by what is told."""
    seen, matched = Counter(s.construct for s in sites), Counter(s.construct for s in sites if s.status == MATCHED)
    return {c: {"matched": matched[c], "expected": max(seen[c], expected.get(c, 0))} for c in dict.fromkeys([*expected, *seen])}


@dataclass
class Report:
    """All graphs of one call of a model. `expected` may know of more sites than the graphs show (code that was never traced)."""

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    expected: dict[str, int] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        """Those of each graph, as often as it ran: what is compiled for one layer may run for others."""
        return [s for g in self.graphs for s in g.sites * max(g.runs, 1)]

    @property
    def constructs(self) -> dict[str, dict[str, int]]:
        """name → {"matched": int, "expected": int}"""
        return counts(self.sites, dict.fromkeys(self.titles, 0) | self.expected)

    @property
    def unseen(self) -> Counter[str]:
        """By construct, sites that the modules called have, and that no code in the graphs looks like."""
        return Counter({c: n["expected"] for c, n in self.constructs.items()}) - Counter(s.construct for s in self.sites)

    @property
    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for g in self.graphs:
            total.update(g.seconds)
        return dict(total)

    @property
    def unread(self) -> Counter[str]:
        return sum((g.unread for g in self.graphs), Counter())

    def to_dict(self) -> dict[str, Any]:
        """The public format: constructs, sites, graphs (how many, of how many parts, of these compiled), breaks, and seconds by
        stage.
        """
        return {
            "constructs": self.constructs,
            "sites": [asdict(s) for s in self.sites],
            "graphs": len(self.graphs),
            "parts": sum(g.parts for g in self.graphs),
            "compiled": sum(g.compiled for g in self.graphs),
            "breaks": self.breaks,
            "seconds": {k: round(v, 4) for k, v in self.seconds.items()},
            "untouched": [g.untouched for g in self.graphs if g.untouched],
            "unread": dict(self.unread),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.shown()

    def shown(self, misses: bool = True) -> Iterator[RenderableType]:
        """What is printed of it, with the table of what is not rewritten or without."""
        yield self._counts()
        if misses and (missed := [s for s in self.sites if s.status != MATCHED]):
            yield _misses(missed)
        stages = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        parts, compiled = sum(g.parts for g in self.graphs), sum(g.compiled for g in self.graphs)
        cut = f" in {parts} parts, {compiled} of them compiled" if parts > len(self.graphs) else ""
        yield Text(f"{len(self.graphs)} graph(s){cut}, {len(self.breaks)} break(s); {stages}")
        opaque = sorted({why for g in self.graphs for why in g.opaque.values()}) if self.unread else ()
        for kind, n in self.unread.items():
            yield Text(f"{n} {kind} not looked into: {'; '.join(opaque)}", style="yellow")
        for name, n in self.unseen.items():
            what = self.titles.get(name, name)
            yield Text(f"{n} {what} of the modules called: no code in these graphs looks like it", style="yellow")
        for why in (*(g.untouched for g in self.graphs if g.untouched), *self.breaks):
            yield Text(f"  {why}", style="yellow")

    def _counts(self) -> Table:
        table = Table("construct", "matched", *(Column(c, overflow="fold") for c in ("variants", "where")), title="sloth")
        for name, count in self.constructs.items():
            if not count["expected"]:
                continue
            sites = [s for s in self.sites if s.construct == name and s.status == MATCHED]
            variants = Counter(s.variant for s in sites)
            places = sorted({f"{s.file.split('site-packages/')[-1].split('/')[-1]}:{s.line}" for s in sites})
            table.add_row(
                self.titles.get(name, name),
                Text(
                    f"{count['matched']}/{count['expected']}", style="green" if count["matched"] == count["expected"] else "red"
                ),
                Text("\n".join(f"{v} ×{n}" for v, n in variants.items())),
                "\n".join(places[:6]),
            )
        return table

    def __str__(self) -> str:
        console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(self)
        return console.export_text()


def _misses(sites: list[Site]) -> Group:
    table = Table("construct", "status", "where", "first difference", title="not rewritten")
    for s, n in Counter(sites).items():
        code = linecache.getline(s.file, s.line).strip()
        table.add_row(
            s.construct,
            s.status + (f" ×{n}" if n > 1 else ""),
            Text(f"{s.file.split('site-packages/')[-1]}:{s.line}" + f"\n{code}" * bool(code)),
            Text(s.reason),
        )
    return Group(table)


def source(node: fx.Node | None) -> tuple[str, int]:
    """File and line of the innermost frame of the model's code that made this node; of torch's own only if there is no other."""
    frames = _FRAME.findall((node.meta.get("stack_trace") or "") if node is not None else "")
    own = [f for f in frames if not f[0].startswith(LIBRARIES)] or frames
    return (own[-1][0], int(own[-1][1])) if own else ("", 0)
