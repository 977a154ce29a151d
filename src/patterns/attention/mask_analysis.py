"""What an attention mask means, proven from how it is computed: which interval of keys each query sees.

A mask that transformers builds under a compiler is a conjunction of comparisons of positions and of data looked up by position,
broadcast to each other. So it is taken apart into its conjuncts, and each is followed as a sympy expression of the indices d0,
d1, … of the mask's dimensions. Positions are indices themselves; what is not known here is an atom x(d0, …): data there.
Proven are, with i the query's position and j the key's:

    j ≤ i + a, j ≥ i − b        bounds of the interval (causal, windows)
    f(i) = f(j)                 where f never falls: i's run (a count of starts for packed sequences, ⌊(i − left)/c⌋ for chunks)
    anything of j alone         keys that are valid (padding)
    positions in sequences      p(j) ≤ p(i) − w: in one run of a count of the steps of p other than 1, p(j) − p(i) is j − i

Conditions that hold in the whole matrix are left out, and alternatives that hold nowhere; any other, and nothing is proven, and a
line says why. Sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from sloth.patterns.attention.index_expr import MANY, D, Reader, is_one, is_truth, is_wide, source
from sloth.patterns.attention.levels import as_value, truth
from sloth.rewriter.graph.aliasing import root
from sloth.rewriter.graph.value import Value, uncast

AND = ("__and__", "bitwise_and", "logical_and")
OR = ("__or__", "bitwise_or", "logical_or")
FAR = 1 << 30  # no sequence is as long


@dataclass(frozen=True)
class Interval:
    """i sees j where i − behind ≤ j ≤ i + ahead (None: no bound), both lie in one run of each of `documents`, and j is valid.

    documents (integers) and valid (booleans) are values of the graph, one element for each position, in each batch or for all.
    """

    ahead: int | None = None
    behind: int | None = None
    documents: tuple[Value, ...] = ()
    valid: tuple[Value, ...] = ()


def meaning(mask: Value) -> Interval | None:
    """What is proven of the mask: Interval(ahead=0) is causal, Interval() sees everything. None: nothing."""
    return _told(mask)[0]


def why_not(mask: Value) -> str:
    """Why nothing is proven of it."""
    return _told(mask)[1]


def _told(mask: Value) -> tuple[Interval | None, str]:
    mask = source(mask)
    if "meaning" not in mask.analyses:  # all layers ask
        read = mask if mask.meta.dtype != torch.bool else as_value(truth(mask), mask)
        mask.analyses["meaning"] = _proven(read)
    return mask.analyses["meaning"]


def _proven(mask: Value) -> tuple[Interval | None, str]:
    if mask.meta.dtype != torch.bool:
        return None, "its mask is a bias: numbers that are added to the scores, not which keys are seen"
    if not 2 <= len(mask.meta.shape) <= 4:
        return None, f"its mask has {len(mask.meta.shape)} dimensions"
    prover = _Prover(mask)
    if (unproven := prover.unproven()) is None:
        return Interval(prover.ahead, prover.behind, tuple(prover.documents), tuple(prover.valid)), ""
    if prover.rank > 2 and not is_one(mask.meta.shape[-3]):
        return None, "its mask may differ from head to head"
    if root(unproven).op == "input":
        return (
            None,
            "its mask comes into this graph from outside: the caller made it, or a part of the model before a graph break",
        )
    if unproven.mutated_storage:
        return None, "its mask is written in place"
    name = name_of(unproven)
    if _of_numbers(unproven):
        return None, f"its mask depends on numbers that the model computes: {name}"
    return (
        None,
        f"its mask is not proven to be an interval of keys for each query: {name} in it is neither bound, run nor padding",
    )


def name_of(v: Value) -> str:
    return f"`{v.nodes[0].name}`" if v.nodes else v.op


def _of_numbers(v: Value) -> bool:
    """Is there anything in floating point that it is made of?"""
    seen, todo = set(), [v]
    while todo and len(seen) < MANY:
        x = source(todo.pop())
        if x.meta is not None and x.meta.dtype.is_floating_point:
            return True
        todo += [i for i in x.inputs if i not in seen]
        seen.add(x)
    return False


class _Prover:
    """One mask. Conditions on data that are no part of it by themselves are looked at again when its documents are known."""

    def __init__(self, mask: Value):
        self.mask, self.rank, self.reader = mask, len(mask.meta.shape), Reader()
        self.i, self.j = D[self.rank - 2], D[self.rank - 1]
        self.ahead: int | None = None
        self.behind: int | None = None
        self.documents: dict[Value, Any] = {}  # and their expressions for a query
        self.valid: dict[Value, None] = {}

    def unproven(self) -> Value | None:
        """The first conjunct that is no part of an interval."""
        left = [c for c in self.conjuncts(self.mask) if not self.take(c, self.reader.aligned(c, self.mask))]
        steps = self.steps()
        for c in left:
            e = self.reader.aligned(c, self.mask)
            if e is None or not self.take(c, e.xreplace(steps), steps):
                return c
        return None

    def conjuncts(self, v: Value) -> Iterator[Value]:
        v = source(v)
        junction = not v.mutated_storage and v.op in AND + OR and all(isinstance(a, Value) and is_truth(a) for a in v.args)
        if junction and v.op in AND:
            parts = v.args
        elif junction and sympy.false in (told := [self.reader.read(a) for a in v.args]):  # no alternative
            parts = (v.args[1 - told.index(sympy.false)],)
        elif v.op == "expand" and not v.mutated_storage:
            parts = v.args[:1]
        else:
            yield v
            return
        for a in parts:
            yield from self.conjuncts(a)

    def take(self, c: Value, e: Any, steps: dict | None = None) -> bool:
        """Make the conjunct a part of the interval, if it is one."""
        if e == sympy.true:
            return True
        if not c.mutated_storage and self.spans(c, self.rank - 1):
            self.valid[c] = None
            return True
        if c.op == "eq" and not c.mutated_storage and self.run(*c.args, steps or {}):
            return True
        return e is not None and all(map(self.bound, sympy.And.make_args(e)))

    def spans(self, v: Any, position: int) -> bool:
        """Does it hold one element for each index of this dimension of the mask, and at most of the batch besides?"""
        shape, shift = v.meta.shape, self.rank - len(v.meta.shape)
        along = {k + shift for k, n in enumerate(shape) if not is_one(n)}
        batch = {0} if self.rank == 4 else set()
        return position in along and along <= batch | {position} and not v.meta.dtype.is_floating_point

    def bound(self, part: Any) -> bool:
        e = _difference(part)
        if e is None or e.free_symbols - {self.i, self.j}:
            return False
        if _always(e, self.mask, self.i, self.j):
            return True
        ahead, behind = e + self.j - self.i, e - self.j + self.i  # numbers, if it bounds j from above, from below
        if ahead.is_Integer:
            self.ahead = _tighter(self.ahead, ahead)
        elif behind.is_Integer:
            self.behind = _tighter(self.behind, behind)
        return ahead.is_Integer or behind.is_Integer

    def run(self, a: Any, b: Any, steps: dict) -> bool:
        """f(i) = f(j): is f the same function, and does it never fall?"""
        if not (isinstance(a, Value) and isinstance(b, Value)):
            return False
        query, key = (a, b) if self.spans(a, self.rank - 2) else (b, a)
        if not (self.spans(query, self.rank - 2) and self.spans(key, self.rank - 1)):
            return False
        f, g = (self.reader.aligned(v, self.mask) for v in (query, key))
        if f is None or g is None or f.xreplace({self.i: self.j}) != g or not self.rises(f.xreplace(steps)):
            return False
        self.documents[query] = f
        return True

    def rises(self, f: Any) -> bool:
        """f(i) ≤ f(i + 1), in one run of the documents that are known already."""
        if self.i not in f.free_symbols or f == self.i:
            return True
        if f.is_Add or f.func is sympy.floor:
            return all(map(self.rises, f.args))
        if f.is_Mul:
            factor, rest = f.as_coeff_Mul()
            return factor.is_positive is True and not rest.is_Mul and self.rises(rest)
        if not isinstance(f, AppliedUndef) or sum(self.i in a.free_symbols for a in f.args) != 1 or self.i not in f.args:
            return False
        v = self.reader.data[f.func]
        return v.op == "cumsum" and f.args[_dim(v)] == self.i and is_wide(v) and uncast(v.args[0]).meta.dtype == torch.bool

    def steps(self) -> dict[Any, Any]:
        """Data that is i and a constant in each run of a document, which then counts where it does otherwise."""
        found = {}
        for n, f in enumerate(self.documents.values()):
            v = self.reader.data.get(f.func)
            changes = v.args[0] if v is not None and v.op == "cumsum" else None
            if changes is None or changes.op != "ne" or changes.args[1] != 1 or changes.args[0].op != "diff":
                continue
            positions, times, dim, before, behind = changes.args[0].args
            rank = len(positions.meta.shape)
            if times != 1 or dim % rank != _dim(v) or before is None or not is_one(before.meta.shape[dim]) or behind is not None:
                continue
            if not is_wide(positions):
                continue
            e, offset = self.reader.read(positions), sympy.Symbol(f"offset{n}", integer=True)
            if isinstance(e, AppliedUndef):
                of_query = e.xreplace(dict(zip(D, f.args, strict=False)))
                found |= {of_query: self.i + offset, of_query.xreplace({self.i: self.j}): self.j + offset}
        return found


def _tighter(known: int | None, bound: Any) -> int:
    """The tighter of two bounds, in 32 bits."""
    return max(-FAR, min(int(bound), FAR if known is None else known))


def _dim(v: Value) -> int:
    """Of a cumulative sum."""
    return v.args[1] % len(v.meta.shape)


def _difference(r: Any) -> Any:
    """e, where the relation of integers says e ≥ 0: x ≤ y and x < y + 1 are y − x."""
    forms = {
        sympy.Le: lambda: r.rhs - r.lhs, sympy.Lt: lambda: r.rhs - r.lhs - 1,
        sympy.Ge: lambda: r.lhs - r.rhs, sympy.Gt: lambda: r.lhs - r.rhs - 1,
    }  # fmt: skip
    return sympy.expand(forms[type(r)]()) if type(r) in forms else None


def _always(e: Any, mask: Value, i: Any, j: Any) -> bool:
    """Is e ≥ 0 in the whole mask (a window wider than the sequence)? Linear, so its least value is at a corner."""
    rows, columns = mask.meta.shape[-2:]
    if not isinstance(rows, int) or not isinstance(columns, int):
        return False
    if not e.is_polynomial(i, j) or sympy.Poly(e, i, j).total_degree() > 1:
        return False
    return all(e.subs({i: a, j: b}) >= 0 for a in (0, rows - 1) for b in (0, columns - 1))
