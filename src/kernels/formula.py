"""Formulas of two tensors, element by element: read from text, differentiated, and written as ATen calls or as Triton's source.

    mul(mul(g, sigmoid(mul(1.702, g))), add(u, 1.0))          g and u are the tensors, all else a function of OPS or a number

A formula is made of steps, each a function of steps before it, none twice. The steps are those of the code that it was read from,
in its order, so that it is as exact as that, computed in fp32.

Backward, from dh = ∂L/∂h: the chain rule, step by step from the last to the first, as autograd has it. For y = f(a, b) with
d = ∂L/∂y, each operand gets d · ∂f/∂a, of which SLOPES says the second factor (that of sums and products stands in `_push`). What
is needed of the forward steps is computed again; whatever occurs twice is computed once.

Where f has a kink or a jump its derivative is autograd's choice: relu' = [a > 0], clamp' = [lo ≤ a ≤ hi],
hardtanh' = [lo < a < hi], |a|' = sign(a).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

Operand = int | float  # the place of a step; a float is a number
INF = math.inf
MOST = 96  # steps of a formula


class FormulaError(ValueError):
    """The text is no formula; the message says where."""


class Op(NamedTuple):
    """operands: how many tensors it takes; then come `numbers` numbers. triton: its source, of {0}, {1}, …"""

    operands: int
    aten: Callable[..., torch.Tensor]
    triton: str
    numbers: int = 0


def _sech2(a: torch.Tensor) -> torch.Tensor:
    e = torch.exp(-2 * a.abs())
    return 4 * e / (1 + e).square()


def _one(condition: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return condition.to(like.dtype)


OPS = {
    "add": Op(2, lambda a, b: a + b, "{0} + {1}"),
    "sub": Op(2, lambda a, b: a - b, "{0} - {1}"),
    "mul": Op(2, lambda a, b: a * b, "{0} * {1}"),
    "div": Op(2, lambda a, b: a / b, "{0} / {1}"),
    "neg": Op(1, lambda a: -a, "-{0}"),
    "abs": Op(1, torch.abs, "tl.abs({0})"),
    "exp": Op(1, torch.exp, "tl.exp({0})"),
    "expm1": Op(1, torch.expm1, "expm1({0})"),
    "log": Op(1, torch.log, "tl.log({0})"),
    "log1p": Op(1, torch.log1p, "log1p({0})"),
    "sqrt": Op(1, torch.sqrt, "tl.sqrt({0})"),
    "rsqrt": Op(1, torch.rsqrt, "tl.rsqrt({0})"),
    "sin": Op(1, torch.sin, "tl.sin({0})"),
    "cos": Op(1, torch.cos, "tl.cos({0})"),
    "erf": Op(1, torch.erf, "tl.erf({0})"),
    "sigmoid": Op(1, torch.sigmoid, "tl.sigmoid({0})"),
    "tanh": Op(1, torch.tanh, "tanh({0})"),
    "softplus": Op(1, torch.nn.functional.softplus, "softplus({0})"),
    "relu": Op(1, torch.relu, "tl.where({0} < 0, 0.0, {0})"),
    "clamp": Op(1, lambda a, lo, hi: a.clamp(lo, hi), "tl.where({0} < {1}, {1}, tl.where({0} > {2}, {2}, {0}))", 2),
    "hardtanh": Op(1, lambda a, lo, hi: a.clamp(lo, hi), "tl.where({0} < {1}, {1}, tl.where({0} > {2}, {2}, {0}))", 2),
    "select": Op(3, lambda c, a, b: torch.where(c > 0, a, b), "tl.where({0} > 0, {1}, {2})"),
    # of derivatives
    "sech2": Op(1, _sech2, "sech2({0})"),
    "sign": Op(1, torch.sign, "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))"),
    "positive": Op(1, lambda a: _one(a > 0, a), "tl.where({0} > 0, 1.0, 0.0)"),
    "within": Op(1, lambda a, lo, hi: _one((a >= lo) & (a <= hi), a), "tl.where(({0} >= {1}) & ({0} <= {2}), 1.0, 0.0)", 2),
    "inside": Op(1, lambda a, lo, hi: _one((a > lo) & (a < hi), a), "tl.where(({0} > {1}) & ({0} < {2}), 1.0, 0.0)", 2),
}
# Of y = f(a), ∂f/∂a as a formula of a and y; where it is 0 or 1, what the gradient passes through (see `_push`).
SLOPES = {
    "abs": "sign(a)",
    "exp": "y",
    "expm1": "exp(a)",
    "log": "div(1.0,a)",
    "log1p": "div(1.0,add(a,1.0))",
    "sqrt": "div(0.5,y)",
    "rsqrt": "mul(-0.5,mul(y,mul(y,y)))",
    "sin": "cos(a)",
    "cos": "neg(sin(a))",
    "erf": f"mul({2 / math.sqrt(math.pi)!r},exp(neg(mul(a,a))))",
    "sigmoid": "mul(y,sub(1.0,y))",
    "tanh": "sech2(a)",
    "softplus": "sigmoid(a)",
}
GATES = {"relu": "positive", "clamp": "within", "hardtanh": "inside"}  # by 0 or 1: the condition
CONDITIONS = {"sign", "positive", "within", "inside"}  # constant but where they jump


def _number_in(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return None if math.isnan(number) else number


class Steps:
    """Steps in order, each once; (op, operands). Leaves are ("g",), ("u",), ("dh",)."""

    def __init__(self, steps: tuple = ()):
        self.steps: list[tuple] = [*steps]
        self.known = {s: i for i, s in enumerate(self.steps)}

    def add(self, op: str, *operands: Operand) -> int:
        step = (op, *operands)
        if step not in self.known:
            self.known[step] = len(self.steps)
            self.steps.append(step)
        return self.known[step]

    def read(self, text: str, names: dict[str, int]) -> Operand:
        """The place of a formula's result. names: of what it is made of. Raises FormulaError."""
        tokens = re.findall(r"[a-z]\w*|[-+]?(?:inf|\d[\d.]*(?:e[-+]?\d+)?)|\S", text)
        found, rest = self._term(tokens, names)
        if rest:
            raise FormulaError(f"{' '.join(rest[:3])!r} behind the end of a formula")
        return found

    def _term(self, tokens: list[str], names: dict[str, int]) -> tuple[Operand, list[str]]:
        if not tokens:
            raise FormulaError("a formula ends too early")
        word, *rest = tokens
        if word in names:
            return names[word], rest
        if word not in OPS:
            number = _number_in(word)
            if number is None:
                raise FormulaError(f"{word!r} is neither a function of {', '.join(OPS)}, nor a number")
            return number, rest
        operands: list[Operand] = []
        while rest and rest[0] in ("(" if not operands else ","):
            operand, rest = self._term(rest[1:], names)
            operands.append(operand)
        op = OPS[word]
        if not rest or rest[0] != ")" or len(operands) != op.operands + op.numbers:
            raise FormulaError(f"{word} takes {op.operands + op.numbers} operands in parentheses")
        if any(isinstance(a, int) for a in operands[op.operands :]) or not any(isinstance(a, int) for a in operands):
            raise FormulaError(f"{word} of numbers alone, or a tensor where a number belongs")
        return self.add(word, *operands), rest[1:]


class Formula(NamedTuple):
    """steps, and the places of the results: h; or those of dg and du."""

    steps: tuple[tuple, ...]
    results: tuple[Operand, ...]


@cache
def formula(text: str) -> Formula:
    """h, of g and u. Raises FormulaError."""
    steps = Steps()
    names = {name: steps.add(name) for name in ("g", "u")}
    h = steps.read(text, names)
    if len(steps.steps) > MOST:
        raise FormulaError(f"a formula of {len(steps.steps)} steps: at most {MOST}")
    if h in names.values() or isinstance(h, float):
        raise FormulaError("a formula that computes nothing")
    return Formula(tuple(steps.steps), (h,))


@cache
def backward(text: str, need_g: bool, need_u: bool) -> Formula:
    """dg and du, those that are needed, of dh, g and u."""
    forward = formula(text)
    steps = Steps(forward.steps)
    gradients: dict[int, Operand] = {forward.results[0]: steps.add("dh")}
    wanted = {place for place, need in ((0, need_g), (1, need_u)) if need}
    depends = [False] * len(forward.steps)
    for i, (_, *operands) in enumerate(forward.steps):
        depends[i] = i in wanted or any(isinstance(a, int) and depends[a] for a in operands)
    for y in reversed(range(2, len(forward.steps))):
        if y in gradients and depends[y]:
            for a, d in _push(steps, forward.steps[y], y, gradients[y]):
                if isinstance(a, int) and depends[a]:
                    gradients[a] = steps.add("add", gradients[a], d) if a in gradients else d
    return _pruned(steps.steps, tuple(gradients.get(place, 0.0) for place in sorted(wanted)))


def _push(steps: Steps, step: tuple, y: int, d: Operand) -> list[tuple[Operand, Operand]]:
    """What each operand of a step y gets of its gradient d."""
    op, a, *more = step
    if op == "add":
        return [(a, d), (more[0], d)]
    if op == "sub":
        return [(a, d), (more[0], steps.add("neg", d))]
    if op == "neg":
        return [(a, steps.add("neg", d))]
    if op == "mul":
        b = more[0]
        return [(a, steps.add("mul", d, b)), (b, steps.add("mul", d, a))]
    if op == "div":
        b = more[0]
        of_b = [(b, steps.add("mul", steps.add("neg", d), steps.add("div", y, b)))] if isinstance(b, int) else []
        return [(a, steps.add("div", d, b)), *of_b]
    if op == "select":
        b, c = more
        return [(b, steps.add("select", a, d, 0.0)), (c, steps.add("select", a, 0.0, d))]
    if op in GATES:
        return [(a, steps.add("select", steps.add(GATES[op], a, *more), d, 0.0))]
    if op in SLOPES:
        slope = steps.read(SLOPES[op], {"a": a, "y": y})
        return [(a, steps.add("mul", d, slope))]
    if op not in CONDITIONS:
        raise FormulaError(f"{op} has no derivative here")
    return []


def _pruned(steps: list[tuple], results: tuple[Operand, ...]) -> Formula:
    """Only the steps that the results are made of, in order; leaves first, all of them."""
    used: set[int] = {i for i, s in enumerate(steps) if len(s) == 1}
    todo = [r for r in results if isinstance(r, int)]
    while todo:
        i = todo.pop()
        if i not in used:
            used.add(i)
            todo += [a for a in steps[i][1:] if isinstance(a, int)]
    places = {old: new for new, old in enumerate(sorted(used))}
    move = lambda a: places[a] if isinstance(a, int) else a  # noqa: E731
    return Formula(tuple((steps[i][0], *map(move, steps[i][1:])) for i in sorted(used)), tuple(map(move, results)))


def evaluate(f: Formula, **leaves: torch.Tensor) -> list[torch.Tensor]:
    """The results, by ATen, in the dtype of the leaves."""
    like = next(iter(leaves.values()))
    values: list[torch.Tensor] = []
    scalar = lambda x: torch.full((), x, dtype=like.dtype, device=like.device)  # noqa: E731
    for op, *operands in f.steps:
        if not operands:
            values.append(leaves[op])
            continue
        given = [values[a] if isinstance(a, int) else a for a in operands]
        if op == "select":
            given[1:] = [x if isinstance(x, torch.Tensor) else scalar(x) for x in given[1:]]
        values.append(OPS[op].aten(*given))
    return [values[r] if isinstance(r, int) else torch.full_like(like, r) for r in f.results]


def triton_lines(f: Formula) -> tuple[list[str], list[str]]:
    """Statements of Triton that compute the steps from the leaves' names, and the expressions of the results."""
    name = lambda a: _number(a) if isinstance(a, float) else f.steps[a][0] if len(f.steps[a]) == 1 else f"v{a}"  # noqa: E731
    lines = []
    for i, (op, *operands) in enumerate(f.steps):
        if operands:
            lines.append(f"v{i} = {OPS[op].triton.format(*map(name, operands))}")
    return lines, [name(r) if isinstance(r, int) else f"g * 0.0 + {_number(r)}" for r in f.results]


def _number(x: float) -> str:
    return f'float("{x}")' if math.isinf(x) else f"({x!r})"
