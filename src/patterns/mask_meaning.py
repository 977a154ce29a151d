"""What an attention mask means, proven from how it is computed: which interval of keys each query sees.

A mask that transformers builds under a compiler is a conjunction of comparisons of positions and of data looked up by position,
broadcast to each other. So it is taken apart into its conjuncts, and each is followed as a sympy expression of the indices d0,
d1, … of the mask's dimensions. Positions are indices themselves; what is not known here is an atom x(d0, …): data there.
Proven are, with i the query's position and j the key's:

    j ≤ i + a, j ≥ i − b        bounds of the interval (causal, windows)
    f(i) = f(j)                 where f never falls: i's run (a count of starts for packed sequences, ⌊(i − left)/c⌋ for chunks)
    anything of j alone         keys that are valid (padding)
    positions in sequences      p(j) ≤ p(i) − w: in one run of a count of the steps of p other than 1, p(j) − p(i) is j − i

Conditions that hold in the whole matrix are left out; any other, and nothing is proven. Sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from sloth.rewriter.ir import Value, same_literal, uncast

D = sympy.symbols("d0:8", integer=True, nonnegative=True)
RULES: dict[str, Callable[..., Any]] = {}
AND = ("__and__", "bitwise_and", "logical_and")
FAR = 1 << 30  # no sequence is as long
MANY = 200  # operations in a mask's subgraph, beyond which it is not looked at


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
    mask = _source(mask)
    if "meaning" not in mask.facts:  # all layers ask
        known = mask.meta.dtype == torch.bool and 2 <= len(mask.meta.shape) <= 4
        mask.facts["meaning"] = _Prover(mask).interval() if known else None
    return mask.facts["meaning"]


def _source(v: Value) -> Value:
    """What is passed into the body of a checkpoint."""
    while v.op == "input" and v.outer is not None:
        v = v.outer
    return v


class _Prover:
    """One mask. Conditions on data that are no part of it by themselves are looked at again when its documents are known."""

    def __init__(self, mask: Value):
        self.mask, self.rank, self.reader = mask, len(mask.meta.shape), _Reader()
        self.i, self.j = D[self.rank - 2], D[self.rank - 1]
        self.ahead: int | None = None
        self.behind: int | None = None
        self.documents: dict[Value, Any] = {}  # and their expressions for a query
        self.valid: dict[Value, None] = {}

    def interval(self) -> Interval | None:
        left = [c for c in _conjuncts(self.mask) if not self.take(c, self.reader.aligned(c, self.mask))]
        steps = self.steps()
        for c in left:
            e = self.reader.aligned(c, self.mask)
            if e is None or not self.take(c, e.xreplace(steps), steps):
                return None
        return Interval(self.ahead, self.behind, tuple(self.documents), tuple(self.valid))

    def take(self, c: Value, e: Any, steps: dict | None = None) -> bool:
        """Make the conjunct a part of the interval, if it is one."""
        if e == sympy.true:
            return True
        if not c.pinned and self.spans(c, self.rank - 1):
            self.valid[c] = None
            return True
        if c.op == "eq" and not c.pinned and self.run(*c.args, steps or {}):
            return True
        return e is not None and all(map(self.bound, sympy.And.make_args(e)))

    def spans(self, v: Any, position: int) -> bool:
        """Does it hold one element for each index of this dimension of the mask, and at most of the batch besides?"""
        shape, shift = v.meta.shape, self.rank - len(v.meta.shape)
        along = {k + shift for k, n in enumerate(shape) if not _is_one(n)}
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
        return v.op == "cumsum" and f.args[_dim(v)] == self.i and _wide(v) and uncast(v.args[0]).meta.dtype == torch.bool

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
            if times != 1 or dim % rank != _dim(v) or before is None or not _is_one(before.meta.shape[dim]) or behind is not None:
                continue
            if not _wide(positions):
                continue
            e, offset = self.reader.read(positions), sympy.Symbol(f"offset{n}", integer=True)
            if isinstance(e, AppliedUndef):
                of_query = e.xreplace(dict(zip(D, f.args, strict=False)))
                found |= {of_query: self.i + offset, of_query.xreplace({self.i: self.j}): self.j + offset}
        return found


def _conjuncts(v: Value) -> Iterator[Value]:
    v = _source(v)
    if v.op in AND and not v.pinned and all(map(_is_truth, v.args)) and all(isinstance(a, Value) for a in v.args):
        for a in v.args:
            yield from _conjuncts(a)
    elif v.op == "expand" and not v.pinned:
        yield from _conjuncts(v.args[0])
    else:
        yield v


def _tighter(known: int | None, bound: Any) -> int:
    """The tighter of two bounds, in 32 bits."""
    return max(-FAR, min(int(bound), FAR if known is None else known))


def _dim(v: Value) -> int:
    """Of a cumulative sum."""
    return v.args[1] % len(v.meta.shape)


def _wide(v: Value) -> bool:
    """Integers that do not wrap around."""
    return v.meta.dtype in (torch.int32, torch.int64)


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


def follow(*ops: str) -> Callable[[Callable], Callable]:
    def enter(fn: Callable) -> Callable:
        RULES.update(dict.fromkeys(ops, fn))
        return fn

    return enter


class _Reader:
    """Expressions of values, each computed once. None for memory that somebody writes, and for floating-point numbers."""

    def __init__(self) -> None:
        self.known: dict[Value, Any] = {}
        self.data: dict[Any, Value] = {}  # what each atom stands for

    def read(self, v: Value) -> Any:
        v = _source(v)
        if v not in self.known:
            self.known[v] = None
            if not v.pinned and v.meta is not None and not (v.meta.dtype.is_floating_point or v.meta.dtype.is_complex):
                e = RULES[v.op](self, v, *v.args) if v.op in RULES and len(self.known) < MANY else None
                e = self.atom(v) if e is None else e
                alone = {D[k]: sympy.Integer(0) for k, n in enumerate(v.meta.shape) if _is_one(n)}  # the only index there is
                self.known[v] = None if e is None else e.xreplace(alone)
        return self.known[v]

    def atom(self, v: Value) -> Any:
        rank = len(v.meta.shape)
        if rank > len(D):
            return None
        function = sympy.Function(f"x{len(self.data)}", integer=True)
        self.data[function] = v
        e = function(*D[:rank])
        return sympy.Ne(e, 0) if v.meta.dtype == torch.bool else e

    def aligned(self, x: Any, v: Value) -> Any:
        """The expression of an operand in the indices of the result it is broadcast to."""
        if not isinstance(x, Value):
            return sympy.sympify(x) if isinstance(x, bool | int) else None
        e, shift = self.read(x), len(v.meta.shape) - len(x.meta.shape)
        if e is None:
            return None
        one = {D[k]: sympy.Integer(0) if _is_one(n) else D[k + shift] for k, n in enumerate(x.meta.shape)}
        return e.xreplace(one)


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1


@follow("arange")
def _arange(r: _Reader, v: Value, *args: Any) -> Any:
    numbers = args[:-4]  # behind them dtype, layout, device, pin_memory
    start, step = (0, 1) if len(numbers) == 1 else (numbers[0], 1 if len(numbers) == 2 else numbers[2])
    return start + step * D[0] if isinstance(start, int) and isinstance(step, int) else None


@follow("new_ones", "ones", "ones_like", "new_zeros", "zeros", "zeros_like")
def _constant(r: _Reader, v: Value, *_: Any) -> Any:
    one = v.op in ("new_ones", "ones", "ones_like")
    return sympy.sympify(one if v.meta.dtype == torch.bool else int(one))


@follow("cast")
def _cast(r: _Reader, v: Value, x: Value, dtype: torch.dtype) -> Any:
    """Between integers, data only to wider ones."""
    e = r.read(x)
    if e is None or x.meta.dtype == torch.bool or not _wide(v):
        return None
    narrower = dtype.itemsize < x.meta.dtype.itemsize
    return None if narrower and e.atoms(AppliedUndef) else e


@follow("view")
def _view(r: _Reader, v: Value, x: Value, shape: tuple) -> Any:
    """Dimensions of size 1 come and go."""
    e = r.read(x)
    old = [k for k, n in enumerate(x.meta.shape) if not _is_one(n)]
    new = [k for k, n in enumerate(v.meta.shape) if not _is_one(n)]
    if e is None or len(old) != len(new) or len(v.meta.shape) > len(D):
        return None
    if not all(same_literal(x.meta.shape[a], v.meta.shape[b]) for a, b in zip(old, new, strict=True)):
        return None
    moved = {D[a]: D[b] for a, b in zip(old, new, strict=True)}
    return e.xreplace({D[k]: moved.get(D[k], sympy.Integer(0)) for k in range(len(x.meta.shape))})


@follow("expand")
def _expand(r: _Reader, v: Value, x: Value, shape: tuple) -> Any:
    return r.aligned(x, v)


@follow("slice")
def _slice(r: _Reader, v: Value, x: Value, dim: int, start: Any, end: Any, step: Any) -> Any:
    e = r.read(x)
    return (
        e.xreplace({D[dim]: start + step * D[dim]})
        if e is not None and isinstance(start, int) and isinstance(step, int)
        else None
    )


@follow("add", "sub", "mul")
def _arithmetic(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or not _wide(v):
        return None
    return sympy.expand({"add": x + y, "sub": x - y, "mul": x * y}[v.op])


@follow("floor_divide")
def _floor(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x = r.aligned(a, v)
    if x is None or not isinstance(b, int) or b <= 0 or _is_truth(a):
        return None
    size = v.meta.shape[D.index(x)] if x in D else None
    return sympy.Integer(0) if isinstance(size, int) and size <= b else sympy.floor(x / b)


@follow("abs")
def _absolute(r: _Reader, v: Value, a: Value) -> Any:
    x = r.read(a)
    return None if x is None else sympy.Abs(x)


@follow("eq", "ne", "le", "lt", "ge", "gt")
def _relation(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or _is_truth(a) or _is_truth(b):
        return None
    if isinstance(x, sympy.Abs) and v.op in ("le", "lt"):
        kind = {"le": sympy.Le, "lt": sympy.Lt}[v.op]
        return sympy.And(kind(x.args[0], y), kind(-x.args[0], y))
    kind = {"eq": sympy.Eq, "ne": sympy.Ne, "le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt}[v.op]
    return kind(x, y)


@follow("__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or", "logical_or")
def _junction(r: _Reader, v: Value, a: Any, b: Any) -> Any:
    x, y = r.aligned(a, v), r.aligned(b, v)
    if x is None or y is None or not (_is_truth(a) and _is_truth(b)):
        return None
    return (sympy.And if "and" in v.op else sympy.Or)(x, y)


@follow("bitwise_not", "logical_not")
def _negation(r: _Reader, v: Value, a: Any) -> Any:
    x = r.aligned(a, v)
    return sympy.Not(x) if x is not None and _is_truth(a) else None


def _is_truth(x: Any) -> bool:
    return x.meta.dtype == torch.bool if isinstance(x, Value) else isinstance(x, bool)


@follow("diff")
def _diff(r: _Reader, v: Value, x: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """x[k] − x[k − 1], and x[0] − prepend in front: known where both are one constant."""
    e, first = r.read(x), r.read(prepend) if isinstance(prepend, Value) else None
    axis = D[dim % len(x.meta.shape)]
    if e is None or first is None or n != 1 or append is not None or not _is_one(prepend.meta.shape[dim]):
        return None
    rest = sympy.expand(e - e.xreplace({axis: axis - 1}))
    return rest if rest == sympy.expand(e.xreplace({axis: sympy.Integer(0)}) - first.xreplace({axis: sympy.Integer(0)})) else None


@follow("cumsum")
def _cumsum(r: _Reader, v: Value, x: Value, dim: int, dtype: Any = None) -> Any:
    """Of zeros."""
    e = r.read(x)
    return sympy.Integer(0) if e in (sympy.false, sympy.Integer(0)) and not v.meta.dtype.is_floating_point else None


@follow("index")
def _index(r: _Reader, v: Value, x: Value, indices: tuple) -> Any:
    """x[i, j, …] with an index for each dimension, each a position or a number counted from the front."""
    e = r.read(x)
    if e is None or len(indices) != len(x.meta.shape) or not all(isinstance(i, Value) for i in indices):
        return None
    at = [r.aligned(i, v) for i in indices]
    if any(map(_is_truth, indices)) or any(a is None or not (a in D or a.is_Integer and a >= 0) for a in at):
        return None
    return e.xreplace(dict(zip(D, at, strict=False)))
