"""Random programs of all constructs, in random spellings, and what they must give: that of eager, or as near to fp64 as eager.

    python -m tests.programs 0 5000      programs of these seeds; what fails is made shorter and printed as Python
    python -m tests.programs 17 --show   one program
    --plain                              short ones, of static sizes, whose rewritten graph runs as it is: seven in a second

A program is straight code of one function: norms, rotations, attention, MLPs, adapters and losses written as models write them,
piece by piece, and between the pieces whatever users do: other readers, views, writes in place, casts, copies, blocks of no_grad
and autocast, checkpoints. Each line is tried on real tensors while it is written; one that torch refuses is left out. How the
program is called belongs to it: dtypes, sizes (coinciding and 1, too), shared inputs, which of them need a gradient, in which
grad mode, how often, with which backward passes, with static or dynamic sizes, and what compiles the rewritten graph.
"""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tests.program import Program, called
from tests.program_writer import written

from sloth.rewriter.backend import listening
from sloth.rewriter.match.registry import deferrals, patterns
from sloth.rewriter.report import MATCHED, GraphReport

ALWAYS = sorted({e.name for e in (*patterns(), *deferrals())})
MANY = 2048  # numbers, among which luck averages out
SLACK = 32 * 2.0**-23  # of the norm: for sums in another order

# ---------------------------------------------------------------- runs


Outcome = dict[str, torch.Tensor | str | None]


def outcome(p: Program, run: Callable[..., tuple], sizes: dict, salt: int, exact: bool = False) -> Outcome:
    """Results, gradients and inputs afterwards of one step."""
    how, found = p.how, {}
    leaves, given = called(list(p.inputs), p.inputs, sizes, salt, exact, shared=how.shared)
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "train": nullcontext}
    with ExitStack() as stack:
        stack.enter_context(modes[how.mode]())
        if how.mode == "inference":
            given = [t.clone() if t.is_floating_point() else t for t in given]
        if how.autocast and not exact:
            stack.enter_context(torch.autocast("cpu", how.autocast))
        results = list(run(*given))
        again = list(run(*given)) if how.backward == "twice" else []
    for i, t in enumerate([*results, *again]):
        found[f"result {i}"] = t.detach().clone()
        found[f"result {i} needs a gradient"] = str(t.requires_grad)
        if not exact:
            found[f"result {i} is"] = f"{t.dtype} {tuple(t.shape)}"
    for name, t in zip(p.inputs, given, strict=True):
        if t.is_floating_point():
            found[f"{name} afterwards"] = t.detach().clone()
    wanting = [t for t in [*results, *again] if t.requires_grad]
    wanting = wanting[:1] if how.backward == "some" else wanting
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    if how.backward == "partial":
        wanted = dict(list(wanted.items())[::2])
    if wanting and wanted and how.mode == "train":
        for turn in range(2 if how.backward == "retained" else 1):
            loss = sum((t.double() * weights(t, 2 * salt + turn)).sum() for t in wanting)
            grads = torch.autograd.grad(loss, list(wanted.values()), retain_graph=how.backward == "retained", allow_unused=True)
            found |= {f"gradient {turn} of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return found


def weights(t: torch.Tensor, salt: int) -> torch.Tensor:
    """Of the elements in the loss. Not all alike, so that a sum over a normalised axis keeps its gradient."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(salt + 7), dtype=torch.float64)


class Wrong(AssertionError):
    """What differs from eager."""


@dataclass
class Errors:
    """Of one tensor, over all draws: squares of the distances from fp64."""

    ours: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    rounding: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        at = [t.double().nan_to_num(0, 0, 0) for t in (ours, eager, exact.to(eager.dtype))]
        good = exact.isfinite() & eager.isfinite()
        exact = exact.where(good, 0)
        for to, t in zip((self.ours, self.eager, self.rounding), at, strict=True):
            to.append((t.where(good, 0) - exact).square().sum().item())
        self.size.append(exact.square().sum().item())
        self.count += exact.numel()

    def ratio(self) -> float:
        """Ours beside eager's: of all together, or of most draws, whichever says less."""
        few = torch.tensor([self.ours, self.eager, self.rounding, self.size]).double()
        below = torch.maximum(few[1], few[2]).sqrt() + SLACK * few[3].sqrt() + 1e-30
        total = few.sum(1)
        all_of_them = total[0].sqrt() / (torch.maximum(total[1], total[2]).sqrt() + SLACK * total[3].sqrt() + 1e-30)
        return min(all_of_them.item(), (few[0].sqrt() / below).median().item())

    def cancel(self) -> bool:
        """Is what eager gives half rounding errors? It is a sum of large terms that ends near 0, and says little."""
        return sum(self.eager) > 0.25 * sum(self.size)


def told_apart(ours: Outcome, eager: Outcome) -> None:
    """Raises Wrong where more than rounding differs."""
    if ours.keys() != eager.keys():
        raise Wrong(f"only one has {sorted(ours.keys() ^ eager.keys())}")
    for name, theirs in eager.items():
        found = ours[name]
        if (theirs is None) != (found is None) and name.startswith("gradient"):
            if (found if theirs is None else theirs).any():  # what compiles the graph gives zeros to what no result depends on
                raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
            continue
        if isinstance(theirs, str) or theirs is None:
            if theirs is not found and theirs != found:
                raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
            continue
        if (found.shape, found.dtype) != (theirs.shape, theirs.dtype):
            raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
        if not torch.equal(found.isfinite(), theirs.isfinite()):
            raise Wrong(f"{name} is not finite where eager is, or the contrary")


def _said(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else str(t)


LIMIT, CANCELLED = 1.05, 4.0
# A loss, and logits that are read beside it and hand back a gradient too: each rounds its own, and eager rounds the sum.
BESIDE_A_LOSS = 1.75


def compare(p: Program, sloth: bool = True) -> list[GraphReport] | None:
    """Raises Wrong where sloth does not give what eager gives, or is further from fp64 than 1.05 times eager. None: torch itself
    cannot run the program; else the reports of its graphs. Without sloth: what compiles the rewritten graph, by itself.
    """
    try:
        for sizes in p.how.sizes:
            outcome(p, p.function(), sizes, 1)
    except Exception:
        return None  # a write to what a gradient needs, …
    options = {"sloth.inner_backend": p.how.inner} | ({"sloth.always": ALWAYS} if p.how.always else {})
    with listening() as reports:
        how = {"backend": "sloth", "options": options} if sloth else {"backend": p.how.inner}
        run = torch.compile(p.function(), dynamic=p.how.dynamic, **how)
        for sizes in p.how.sizes:
            _compare(p, run, sizes, lambda: BESIDE_A_LOSS if any(r.deferred for r in reports) else LIMIT)
    for report in reports:
        if report.untouched or report.guards or any(s.status == "error" for s in report.sites):
            raise Wrong(report.untouched or f"guards {report.guards}" if report.untouched or report.guards else str(report.sites))
    return reports


def _compare(p: Program, run: Callable[..., tuple], sizes: dict, limit: Callable[[], float]) -> None:
    errors: dict[str, Errors] = {}
    for draw in range(40):
        salt = draw + 1
        eager, exact = outcome(p, p.function(), sizes, salt), outcome(p, p.function(exact=True), sizes, salt, exact=True)
        ours = outcome(p, run, sizes, salt)
        told_apart(ours, eager)
        for name, theirs in eager.items():
            truth = exact.get(name)
            if isinstance(theirs, torch.Tensor) and isinstance(truth, torch.Tensor) and ours[name] is not None:
                errors.setdefault(name, Errors()).add(ours[name], theirs, truth)
        far = {n: e for n, e in errors.items() if e.ratio() > (CANCELLED if e.cancel() else limit())}
        if not far:
            return
        if draw > 7 and all(e.count >= MANY for e in far.values()):
            break
    raise Wrong("; ".join(f"{n}: {e.ratio():.3f} times eager's error" for n, e in far.items()))


# ---------------------------------------------------------------- what fails


def failure(p: Program, sloth: bool = True) -> str:
    """What is wrong, in a line; empty if nothing is."""
    torch._dynamo.reset()
    try:
        compare(p, sloth)
    except Wrong as e:
        return f"wrong: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def by_torch(p: Program) -> bool:
    """Does it fail without sloth, too?"""
    return bool(failure(p, sloth=False))


def shorter(p: Program, kind: str) -> Program:
    """The same failure in fewer statements, results and conditions."""

    def fails(q: Program) -> bool:
        with suppress(Exception):
            return failure(q)[:6] == kind[:6]
        return False

    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(p.statements))):
            q = replace(p, statements=[s for j, s in enumerate(p.statements) if j != i])
            if fails(q):
                p, changed = q, True
        for r in p.results if len(p.results) > 1 else ():
            q = replace(p, results=[x for x in p.results if x != r])
            if len(p.results) > 1 and fails(q):
                p, changed = q, True
    for simple in (
        {"shared": ()},
        {"backward": "once"},
        {"mode": "train"},
        {"autocast": None},
        {"dynamic": False, "sizes": p.how.sizes[:1]},
        {"dynamic": False, "sizes": p.how.sizes[1:2]},
        {"inner": "eager"},
        {"always": False},
    ):
        if not (simple.get("sizes") == () or all(getattr(p.how, k) == v for k, v in simple.items())):
            q = replace(p, how=replace(p.how, **simple))
            p = q if fails(q) else p
    text = p.source()
    return replace(p, inputs={n: i for n, i in p.inputs.items() if re.search(rf"\b{n}\b", text.split("\n", 1)[1])} or p.inputs)


def matches(reports: list[GraphReport]) -> Iterator[str]:
    for r in reports:
        yield from (s.variant.split("[")[0] for s in r.sites if s.status == MATCHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--show", action="store_true", help="print the programs alone")
    parser.add_argument("--long", action="store_true", help="print what fails as it is, not made shorter")
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    ends, found = Counter(), Counter()
    for seed in range(given.first, given.last or given.first + 1):
        p = written(seed, given.plain)
        if given.show:
            print(p)
            continue
        torch._dynamo.reset()
        try:
            reports = compare(p)
        except Exception as e:
            kind = f"wrong: {e}" if isinstance(e, Wrong) else f"{type(e).__name__}: {e}"
            theirs = by_torch(p)
            ends["torch's" if theirs else "failed"] += 1
            if not theirs:
                if not isinstance(e, Wrong):
                    traceback.print_exc(limit=-4)
                p = p if given.long else shorter(p, kind)
                print(f"{'=' * 40}\n{kind[:600]}\n{failure(p)[:600]}\n{p}", flush=True)
            continue
        ends["not a program" if reports is None else "fine"] += 1
        found.update(matches(reports or []))
        if seed % 100 == 99:
            print(f"-- {seed + 1}: {dict(ends)}, {dict(found)}", file=sys.stderr, flush=True)
    print(dict(ends), dict(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
