"""What was verified: a line for each distinct rewrite, and for the whole step."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from sloth.rewriter.verify.tally import Ratio

GOOD, WRONG, NOT_CHECKED = "good", "wrong", "not checked"


@dataclass(frozen=True)
class Result:
    """One tensor, over all draws. what: "result", "gradient of x", "loss", "gradient of PARAMETER"; inputs: "real", "random"."""

    what: str
    inputs: str
    ratio: Ratio


@dataclass
class Checked:
    """A distinct rewrite, or the whole step. status: good, wrong or not checked, and why; sites: places that it stands for."""

    rewrite: str
    operator: str
    file: str
    line: int
    sites: int
    status: str
    reason: str = ""
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "results"}
        return own | {"results": [{"what": r.what, "inputs": r.inputs, **asdict(r.ratio)} for r in self.results]}


@dataclass
class Verification:
    """What `sloth.verify` found: each distinct rewrite, and the whole step. `ok`: nothing is wrong."""

    rewrites: list[Checked] = field(default_factory=list)
    step: Checked | None = None

    @property
    def checked(self) -> list[Checked]:
        return [*self.rewrites, *([self.step] if self.step else [])]

    @property
    def ok(self) -> bool:
        """No ratio exceeds 1.05 beyond its interval, and no gradient is lost. What was not checked is listed in `not_checked`."""
        return all(c.status != WRONG for c in self.checked)

    @property
    def not_checked(self) -> list[Checked]:
        return [c for c in self.checked if c.status == NOT_CHECKED]

    def to_dict(self) -> dict[str, Any]:
        """The public format: ok, rewrites, step."""
        return {"ok": self.ok, "rewrites": [c.to_dict() for c in self.rewrites], "step": self.step and self.step.to_dict()}

    def to_json(self) -> str:
        return json.dumps(_finite(self.to_dict()), indent=1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        numbers = (Column(name, justify="right") for name in ("error", "eager's", "ratio"))
        table = Table("rewrite", Column("sites", justify="right"), "of", *numbers, "", title="sloth verify")
        for c in self.checked:
            for i, r in enumerate(_shown(c)):
                first = (Text(c.rewrite), str(c.sites) if c.sites else "") if i == 0 else ("", "")
                table.add_row(*first, *(_cells(r) if r else ("",) * 4), _verdict(c) if i == 0 else "")
        yield table
        for c in self.checked:
            where = f" ({c.file.split('/')[-1]}:{c.line})" if c.file else ""
            if c.reason:
                yield Text(f"{c.rewrite}{where} {c.status}: {c.reason}", style="red" if c.status == WRONG else "yellow")
            for note in c.notes:
                yield Text(f"{c.rewrite}{where}: {note}")
        counts = Counter(c.status for c in self.checked)
        yield Text(", ".join(f"{n} {status}" for status, n in counts.items()) or "nothing is rewritten")

    def __str__(self) -> str:
        console = Console(width=130, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(self)
        return console.export_text()


def _shown(c: Checked) -> list[Result | None]:
    """The result and the gradient that are furthest off, and all that are too far."""
    kinds = [[r for r in c.results if r.what.startswith("gradient") is g] for g in (False, True)]
    worst = [max(kind, key=lambda r: r.ratio.ratio / r.ratio.limit) for kind in kinds if kind]
    return [*worst, *(r for r in c.results if r.ratio.worse and r not in worst)] or [None]


def _cells(r: Result) -> tuple[str, str, str, str]:
    ratio = r.ratio
    interval = f" ({ratio.low:.3g} to {ratio.high:.3g})" if ratio.low else ""
    ours, eager = (f"{e / ratio.norm:.1e}" if ratio.norm else f"{e:.1e}" for e in (ratio.ours, ratio.eager))
    return f"{r.what}, {r.inputs}", ours, eager, f"{ratio.ratio:.3g}{interval}"


def _verdict(c: Checked) -> Text:
    return Text(c.status, style={GOOD: "green", WRONG: "red"}.get(c.status, "yellow"))


def _finite(a: Any) -> Any:
    """JSON knows no infinity."""
    if isinstance(a, float) and not math.isfinite(a):
        return str(a)
    if isinstance(a, dict):
        return {k: _finite(v) for k, v in a.items()}
    return [_finite(x) for x in a] if isinstance(a, list) else a
