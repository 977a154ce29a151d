"""Gated MLPs with any activation that is a formula of one tensor: found by what is computed of two layers' results.

    down(a(gate(x)) · b(up(x)))         a, b: functions element by element, one of them at least not affine

What stands between the layers is read as one formula, whatever it is made of: activations that no operator names, clamps, scales,
shifts of either side. What an entry of sloth.patterns.gated_mlp matches as a whole is left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import torch

from sloth.kernels.formula import FormulaError, formula
from sloth.kernels.gated_formula import gated_formula
from sloth.patterns.gated_mlp import GATED_MLP, is_layer, is_of_norm, is_read_by_layer
from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.value import Value, ValueGraph, same_literal
from sloth.rewriter.match.domain import FLOATS, domain
from sloth.rewriter.match.pattern import Reading
from sloth.rewriter.match.registry import reader

LONGEST = 2000  # characters of a formula
Term = Callable[..., str]  # of an operation's arguments, already read: as a formula's text


class Unreadable(Exception):
    """It is no formula of two layers' results."""


def _call(name: str) -> Term:
    return lambda *args: f"{name}({','.join(args)})"


def _silu(x: str) -> str:
    return f"mul({x},sigmoid({x}))"


def _gelu(x: str, how: str) -> str:
    """½ x (1 + erf(x / √2)); the other x σ(2z), z = √(2/π) (x + 0.044715 x³)."""
    if how == "none":
        return f"mul({x},mul(0.5,add(erf(mul({x},0.7071067811865476)),1.0)))"
    return f"mul({x},sigmoid(mul(1.5957691216057308,add({x},mul(0.044715,mul({x},mul({x},{x})))))))"


def _clamp(x: str, least: str = "None", most: str = "None") -> str:
    bounds = ("-inf" if least == "None" else least, "inf" if most == "None" else most)
    return f"clamp({x},{','.join(bounds)})"


def _pow(x: str, power: str) -> str:
    if power not in ("2.0", "3.0", "4.0"):
        raise Unreadable(f"pow {power}")
    return {"2.0": f"mul({x},{x})", "3.0": f"mul({x},mul({x},{x}))", "4.0": f"mul(mul({x},{x}),mul({x},{x}))"}[power]


def _elu(x: str, alpha: str = "1.0", scale: str = "1.0", slope: str = "1.0") -> str:
    """Its other branch is computed where it is chosen alone: e^x of a large x is no number to multiply 0 by."""
    below = f"mul(expm1(mul(clamp({x},-inf,0.0),{slope})),{float(alpha) * float(scale)!r})"
    return f"select(positive({x}),mul({x},{scale}),{below})"


def _softplus(x: str, beta: str = "1.0", threshold: str = "20.0") -> str:
    if float(threshold) < 15:  # of the numbers above it the function is not itself
        raise Unreadable("a softplus with a low threshold")
    return f"softplus({x})" if beta == "1.0" else f"div(softplus(mul({x},{beta})),{beta})"


def _leaky_relu(x: str, slope: str = "0.01") -> str:
    return f"select(positive({x}),{x},mul({x},{slope}))"


TERMS: dict[str, Term] = {
    **{op: _call(op) for op in ("add", "sub", "mul", "div", "neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt")},
    **{op: _call(op) for op in ("sin", "cos", "erf", "sigmoid", "tanh", "relu", "hardtanh")},
    "reciprocal": lambda x: f"div(1.0,{x})",
    "silu": _silu,
    "gelu": _gelu,
    "mish": lambda x: f"mul({x},tanh(softplus({x})))",
    "softplus": _softplus,
    "log_sigmoid": lambda x: f"neg(softplus(neg({x})))",
    "clamp": _clamp,
    "clamp_min": lambda x, least: _clamp(x, least),
    "clamp_max": lambda x, most: _clamp(x, "None", most),
    "pow": _pow,
    "elu": _elu,
    "selu": lambda x: _elu(x, "1.6732632423543772", "1.0507009873554805"),
    "celu": lambda x, alpha="1.0": _elu(x, alpha, "1.0", repr(1.0 / float(alpha))),
    "relu6": lambda x: f"hardtanh({x},0.0,6.0)",
    "hardswish": lambda x: f"div(mul({x},hardtanh(add({x},3.0),0.0,6.0)),6.0)",
    "hardsigmoid": lambda x: f"div(hardtanh(add({x},3.0),0.0,6.0),6.0)",
    "where": _call("select"),
    "gt": lambda x, y: f"positive(sub({x},{y}))",
    "le": lambda x, y: f"within({x},-inf,{y})",
    "ge": lambda x, y: f"within({x},{y},inf)",
    "lt": lambda x, y: f"positive(sub({y},{x}))",
    "leaky_relu": _leaky_relu,
}
CONDITIONS = {"gt", "ge", "lt", "le"}
AFFINE = {"add", "sub", "mul", "div", "neg", "cast"}


class _Reader:
    """Reads downwards from a root until it comes to layers' results."""

    def __init__(self, root: Value):
        self.root = root
        self.leaves: dict[Value, str] = {}
        self.values: set[Value] = set()
        self.known: dict[Value, tuple[str, frozenset[Value], bool]] = {}

    def read(self, v: Value) -> tuple[str, frozenset[Value], bool]:
        """Its text, with the leaves in it by their ids; these; and whether it is affine in them."""
        if v not in self.known:
            self.known[v] = self._read(v)
        return self.known[v]

    def _read(self, v: Value) -> tuple[str, frozenset[Value], bool]:
        if v.region != self.root.region or v.mutated_storage or not (v.meta.dtype.is_floating_point or v.op in CONDITIONS):
            raise Unreadable("another region, written memory, or integers")
        if is_layer(v):
            if not same_literal(v.meta.shape, self.root.meta.shape) or len(self.leaves) == 2 and v not in self.leaves:
                raise Unreadable("of other tensors")
            self.leaves.setdefault(v, "")
            return f"%{v.id}%", frozenset({v}), True
        found = self.read(v.args[0]) if v.op == "cast" else self._operation(v)
        self.values.add(v)
        return found

    def _operation(self, v: Value) -> tuple[str, frozenset[Value], bool]:
        if v.op not in TERMS:
            raise Unreadable(v.op)
        texts, leaves, affine = [], [], v.op in AFFINE
        for a in v.args:
            if isinstance(a, Value):
                text, below, straight = self.read(a)
                affine = affine and straight and not (v.op in ("mul", "div") and leaves)
                leaves.append(below)
            elif isinstance(a, bool) or not isinstance(a, int | float | str) and a is not None:
                raise Unreadable(f"{v.op} of {a!r}")
            else:
                text = repr(float(a)) if isinstance(a, int | float) else str(a)
            texts.append(text)
        text = TERMS[v.op](*texts)
        if len(text) > LONGEST:
            raise Unreadable("too long")
        return text, frozenset().union(*leaves), affine and v.op != "div" or affine and not isinstance(v.args[1], Value)


def _factors(v: Value) -> list[Value]:
    """Of a product, through casts and scales."""
    if is_layer(v) or v.op not in ("cast", "mul", "div"):
        return [v]
    return [f for a in v.inputs for f in _factors(a)]


def _results(product: Value) -> Iterator[Value]:
    """The product, and what it is cast to, where a layer reads it."""
    if is_read_by_layer(product):
        yield product
    for u in product.users:
        if u.op == "cast":
            yield from _results(u)


def _reading(root: Value, taken: Set[Value]) -> Reading | None:
    found = _Reader(root)
    try:
        text, leaves, _ = found.read(root)
        factors = [found.read(f)[1:] for f in _factors(root) if isinstance(f, Value)]
    except Unreadable:
        return None
    if len(leaves) != 2 or any(len(below) != 1 for below, _ in factors) or all(affine for _, affine in factors):
        return None
    if all(v in taken or v.op in VIEWS for v in found.values):
        return None
    gate = next(leaf for below, affine in factors if not affine for leaf in below)
    (up,) = leaves - {gate}
    wide = torch.promote_types(gate.meta.dtype, up.meta.dtype)
    computed = torch.promote_types(wide, torch.float32)
    if root.meta.dtype != wide or any(torch.promote_types(v.meta.dtype, computed) != computed for v in found.values):
        return None
    text = text.replace(f"%{gate.id}%", "g").replace(f"%{up.id}%", "u")
    try:
        formula(text)
    except FormulaError:
        return None
    values, todo = set(found.values), [*found.values]
    while todo:  # what a rule put these in place of is computed by the match too
        new = set(todo.pop().replaces) - values - leaves
        values |= new
        todo += new
    return Reading("read", {"gate": gate, "up": up}, {"formula": text}, (root,), frozenset(values))


@reader(GATED_MLP, op=gated_formula, recompute=True, name="gated_formula")
def formulas(shadow: ValueGraph, taken: Set[Value]) -> Iterator[Reading]:
    """Products of functions of two layers' results that a layer reads."""
    for v in shadow.values:
        if v.op in ("mul", "div") and not any(u.op in TERMS and not is_of_norm(u, v) for u in v.users):
            for root in _results(v):
                if (found := _reading(root, taken)) is not None:
                    yield found
                    break


domain(gated_formula, gate=FLOATS, up=FLOATS)
