"""What a construct is by its mathematics alone, however it is written: what no anchor sees is then counted as missed.

Each function is asked of a value of a shadow, and gives the values that make the construct up there, or none. They are looser
than anchors, which are looser than patterns: a root of a clamped variance, a softmax by exponentials, a gate with any function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.value import Value, same_literal, uncast

Values = frozenset[Value]
NONE: Values = frozenset()
PRODUCTS = {"matmul", "matmul_transposed", "baddbmm", "bmm", "einsum"}
SHAPES = VIEWS | {"detach", "clone", "contiguous", "dropout"}
# Functions of each number alone, of one tensor or with a number beside it: all that gated_formula.TERMS has, and more.
EACH = {
    "add", "sub", "mul", "div", "neg", "silu", "gelu", "sigmoid", "tanh", "rsqrt", "sqrt", "exp", "relu", "pow", "clamp",
    "clamp_min", "clamp_max", "maximum", "minimum", "softplus", "mish", "hardswish", "hardsigmoid", "hardtanh", "elu",
    "selu", "leaky_relu", "celu", "abs", "log", "log1p", "expm1", "reciprocal", "square", "erf", "sin", "cos",
    "log_sigmoid", "relu6", "threshold", "where",
}  # fmt: skip
ROOT = {"rsqrt", "sqrt", "reciprocal", "pow", "add", "div", "mul", "clamp", "clamp_min", "maximum", "cast", "view", "expand"}
SCORES = SHAPES | EACH | {"masked_fill", "cat"}
DEEP = 24  # operations that lie between the ends of a construct, at most


def ways(start: Value, ends: Callable[[Value], bool], through: Set[str], users: bool = False) -> Iterator[Values]:
    """From `start` down to values that are an end, or up, by these operations: each end with what lies between."""
    todo: list[tuple[Value, tuple[Value, ...]]] = [(start, ())]
    seen = {start}
    while todo:
        v, way = todo.pop()
        for x in v.users if users else v.inputs:
            if x in seen or x.meta is None:
                continue
            seen.add(x)
            if ends(x):
                yield frozenset((start, *way, x))
            elif x.op in through and len(way) < DEEP:
                todo.append((x, (*way, x)))


def way(start: Value, ends: Callable[[Value], bool], through: Set[str], users: bool = False) -> Values:
    return next(ways(start, ends, through, users), NONE)


def base(v: Value) -> Value:
    """What it is a view or cast of."""
    while v.op in SHAPES:
        v = v.args[0]
    return v


def factors(v: Value) -> Iterator[tuple[Value, Value]]:
    """The two tensors of a product or quotient, either first; of a quotient as it is."""
    if v.op in ("mul", "div") and all(isinstance(a, Value) for a in v.args[:2]):
        yield v.args[0], v.args[1]
        if v.op == "mul":
            yield v.args[1], v.args[0]


# ---------------------------------------------------------------- norms


def of_last(v: Value) -> bool:
    """Is it a sum or mean over the last dimension?"""
    dims = v.args[1] if len(v.args) > 1 else None
    return isinstance(dims, tuple | list) and len(dims) == 1 and dims[0] in (-1, len(v.args[0].meta.shape) - 1)


def _square_of(v: Value) -> Value | None:
    """x of x · x or x²."""
    v = uncast(v)
    if v.op == "mul" and v.args[0] is v.args[1]:
        return v.args[0]
    return v.args[0] if v.op == "square" or v.op == "pow" and same_literal(v.args[1], 2) else None


def _centred(x: Value) -> Value | None:
    """x of x − mean(x)."""
    x = uncast(x)
    if x.op == "sub" and isinstance(x.args[1], Value) and (mean := base(x.args[1])).op == "mean" and of_last(mean):
        return x.args[0]
    return None


def _is_scaled(v: Value) -> bool:
    """Is it multiplied by a vector as long as its last dimension, by way of casts and numbers?"""
    for u in v.users:
        others = [a for a in u.inputs if a is not v]
        if u.op == "mul" and any(_is_vector(base(a), v) for a in others) or (u.op == "cast" or not others) and _is_scaled(u):
            return True
    return False


def _is_vector(w: Value, like: Value) -> bool:
    return w.meta is not None and len(w.meta.shape) == 1 and same_literal(w.meta.shape[0], like.meta.shape[-1])


def _moment(v: Value) -> tuple[str, Value] | None:
    """Of what this is the mean or sum of squares, or the variance, over the last dimension."""
    if v.op in ("var", "std", "var_mean") and of_last(v):
        return "variance", v.args[0]
    if v.op not in ("mean", "sum") or not of_last(v) or (x := _square_of(v.args[0])) is None:
        return None
    centred = _centred(x)
    return (v.op, x) if centred is None else ("variance", centred)


def _scaled_by_root(v: Value, kinds: Set[str]) -> Values:
    """x · f(moment of x), where f has a root in it, or the moment is one."""
    for x, root in factors(v):
        if (
            not root.meta.shape
            or same_literal(x.meta.shape, root.meta.shape)
            or not same_literal(root.meta.shape[-1], 1)
            and root.op != "expand"
        ):
            continue
        for found in ways(root, lambda m: _moment(m) is not None, ROOT) if _moment(root) is None else [frozenset({root})]:
            moment = next(m for m in found if _moment(m) is not None)
            kind, of = _moment(moment)
            rooted = moment.op == "std" or any(m.op in ("rsqrt", "sqrt", "pow") and m is not moment for m in found)
            turned = any(m.op in ("rsqrt", "reciprocal", "div") or m.op == "pow" and m is not moment for m in found)
            rooted = rooted and turned == (v.op == "mul")  # x times a root, as where one length is given to another, is none
            same = base(of) is base(x) or bool(way(x, lambda y, of=base(of): y is of, SHAPES | {"mul", "sub"}))
            if kind in kinds and rooted and same and (kind != "sum" or _is_scaled(v)):
                return found | {v} | ({moment.args[0]} if moment.op in ("mean", "sum") else NONE)
    return NONE


def rms_norm(v: Value) -> Values:
    """x over a root of the mean of its squares; of their sum, where a weight follows."""
    return _scaled_by_root(v, {"mean", "sum"})


def layer_norm(v: Value) -> Values:
    """x, or x less its mean, over a root of its variance."""
    return _scaled_by_root(v, {"variance"})


# ---------------------------------------------------------------- attention


def _normalised(v: Value) -> Value | None:
    """The scores whose softmax this is: by torch, or as exponentials over their sum (and more)."""
    if v.op == "softmax":
        return v.args[0]
    for e, total in factors(v):
        if (e := base(e)).op != "exp":
            continue
        sums = {s for found in ways(total, lambda s: s.op == "sum", ROOT) for s in found if s.op == "sum"} | {total}
        if any(s.op == "sum" and base(s.args[0]) is e for s in sums):
            return e.args[0]
    return None


def _is_product(v: Value) -> bool:
    return v.op in PRODUCTS and v.meta is not None and len(v.meta.shape) > 2


def attention(v: Value) -> Values:
    """A softmax of products, by which something is multiplied."""
    if (scores := _normalised(v)) is None:
        return NONE
    below = frozenset({scores}) if _is_product(scores) else way(scores, _is_product, SCORES)
    above = way(v, _is_product, SHAPES | {"mul", "div", "where", "sub"}, users=True)
    return below | above if below and above else NONE


# ---------------------------------------------------------------- rotations

MOVES = {"cat", "roll", "flip", "stack", "index", "index_select", "gather"}


def _moved(v: Value) -> tuple[Value, Values] | None:
    """x of what holds its channels in another order, some with another sign."""
    seen, todo, moves, leaves = set(), [v], False, set()
    while todo and len(seen) < DEEP:
        x = todo.pop()
        if x in seen:
            continue
        seen.add(x)
        if x.op in MOVES or x.op in ("slice", "neg") or x.op in SHAPES:
            moves = moves or x.op in MOVES
            todo += x.inputs
        else:
            leaves.add(x)
    return (leaves.pop(), frozenset(seen)) if moves and len(leaves) == 1 else None


def _is_table(t: Value) -> bool:
    """Does it differ from position to position, and from channel to channel?"""
    return sum(not same_literal(size, 1) for size in t.meta.shape) > 1


def rotation(v: Value) -> Values:
    """x · c + moved(x) · s, or complex numbers multiplied and taken apart again."""
    if v.op == "view_as_real":
        inner = base(v.args[0])
        complex_ = [base(a) for a in inner.inputs] if inner.op == "mul" else []
        return frozenset({v, inner}) if any(a.op in ("view_as_complex", "complex") for a in complex_) else NONE
    terms = [uncast(a) for a in v.args[:2] if isinstance(a, Value)] if v.op in ("add", "sub") else []
    if len(terms) != 2 or any(t.op != "mul" for t in terms):
        return NONE
    for a, b in (terms, terms[::-1]):
        for y, s in factors(a):
            if (found := _moved(uncast(y))) is None or _moved(uncast(s)) is not None:
                continue
            for x, c in factors(b):
                if base(x) is found[0] and base(c) is not base(s) and _is_table(c) and _is_table(s):
                    return frozenset(m for m in found[1] if m.op not in SHAPES and m is not found[0]) | {v, a, b}
    return NONE


# ---------------------------------------------------------------- layers


def _is_linear(v: Value) -> bool:
    return v.op == "linear"


def weight_sizes(layer: Value) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer; None where its weight is a vector, or one of them a symbol."""
    meta = layer.args[1].meta
    if meta is None or len(meta.shape) != 2 or not all(isinstance(n, int) for n in meta.shape):
        return None
    return meta.shape


def _of_layers(v: Value) -> Values:
    """The layers that a tensor is computed of number by number, if of nothing else that is as large."""
    through = EACH | SHAPES
    found = [frozenset({v})] if _is_linear(v) else list(ways(v, _is_linear, through)) if v.op in through else []
    return frozenset().union(*found)


def gated_mlp(v: Value) -> Values:
    """A layer of a product of two layers of one input (or of two parts of one layer), one of them by way of a function."""
    if v.op != "linear":
        return NONE
    product = base(v.args[0])
    if product.op != "mul":
        return NONE
    for a, b in factors(product):
        if not same_literal(a.meta.shape, b.meta.shape):
            continue
        one, other = _of_layers(a), _of_layers(b)
        ends = [x for x in one | other if _is_linear(x)]
        if one and other and any(map(_is_bent, one | other)) and len({base(x.args[0]) for x in ends}) == 1:
            return frozenset({product}) | {x for x in one | other if not _is_linear(x)}
    return NONE


def _is_bent(v: Value) -> bool:
    """Is it no straight line of its operand? A branch is none where the layer decides, and not a mask."""
    if v.op == "where":
        condition = v.args[0]
        while condition.op in ("bitwise_not", "logical_not"):
            condition = condition.args[0]
        return condition.op in ("gt", "ge", "lt", "le") and bool(_of_layers(condition.args[0]))
    return v.op in EACH and v.op not in ("add", "sub", "mul", "div", "neg")


def lora(v: Value) -> Values:
    """layer(x) + wide(thin(x)), with anything between the two and behind them that acts on each number alone."""
    if v.op != "add" or not all(isinstance(a, Value) for a in v.args[:2]):
        return NONE
    for whole, delta in (v.args[:2], v.args[1::-1]):
        if not _is_linear(whole := base(whole)):
            continue
        for wide in _ends(delta):
            for down in _ends(wide.args[0]):
                a, b = weight_sizes(down), weight_sizes(wide)
                if a is None or b is None or b[1] != a[0] or a[0] >= min(a[1], b[0]):  # it is thin between them
                    continue
                if base(down.args[0]) is base(whole.args[0]):
                    return frozenset({wide, down})
    return NONE


def _ends(v: Value) -> Iterable[Value]:
    if _is_linear(base(v)):
        return [base(v)]
    return [x for found in ways(v, _is_linear, EACH | SHAPES) for x in found if _is_linear(x)] if v.op in EACH | SHAPES else []


# ---------------------------------------------------------------- losses

BEFORE_LOSS = SHAPES | {"mul", "div", "add", "sub", "tanh", "where"}
BEHIND_LOSS = EACH | SHAPES | {"gather", "sum", "mean", "index", "nll_loss_nd", "nll_loss", "logsumexp", "ne", "nansum"}
LOG = {"log_softmax", "logsumexp", "softmax", "exp"}


def loss(v: Value) -> Values:
    """One number made of the softmax of a layer that widens its input: of logits."""
    if v.op not in LOG or v.meta is None:
        return NONE
    for found in ways(v, _is_linear, BEFORE_LOSS):
        layer = next(x for x in found if _is_linear(x))
        sizes = weight_sizes(layer)  # classes, and the width that they are computed from
        if sizes and sizes[0] > sizes[1] and same_literal(v.args[0].meta.shape[-1], sizes[0]):
            return way(v, lambda x: not x.meta.shape, BEHIND_LOSS, users=True)
    return NONE
