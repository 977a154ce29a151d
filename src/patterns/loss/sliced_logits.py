"""Logits of which a loss reads rows (the tokens that have a next one, all in one matrix) or the words of a padded vocabulary.

    f(x Wᵀ + b)[tokens] = f(x[tokens] Wᵀ + b)        f(x Wᵀ + b)[…, words] = f(x W[words]ᵀ + b[words])

where f casts, scales or caps each number, or adds two such (a layer and its adapter). So every loss of a head's logits is the
loss of a matrix h Wᵀ + b to the patterns, in whatever order it is sliced, flattened and cast. The logits themselves, which a
graph may give out, stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable

from sloth.rewriter.graph.canonical import POINTWISE
from sloth.rewriter.graph.normal_form import Normal, rule
from sloth.rewriter.graph.value import Value, same_literal

Part = Callable[[Value], Value]


@rule("cross_entropy_loss")
def loss_of_rows(n: Normal, c, logits: Value, *how):
    """loss(f(linear(x, W, b))[i]) = loss(f(linear(x[i], W, b))), a view for [i] too; of the last dimension: W[i], b[i]."""
    # At most the loss lies in memory that somebody writes, not what is made of the logits.
    mutated, n.mutated_storage = n.mutated_storage, False
    autocast = logits.op == "cast" and logits.mutated_storage and logits.origin is n.origin
    below = _below(n, n.cast(*logits.args) if autocast else logits)
    n.mutated_storage = mutated
    return None if below is logits else n.add(c.op, (below, *how), c.meta)


def _below(n: Normal, v: Value) -> Value:
    """`v` with the slices and views in it moved below the linear layer, as far as what is between is known."""
    if v.op not in ("slice", "view") and not _pointwise(v) or not _known(n, v):
        return v
    inner = _below(n, v.args[0])
    last = len(v.meta.shape) - 1
    if v.op == "view":
        found = _moved(n, inner, _rows(n, v)) if _keeps_rows(v) else None
    elif v.op == "slice" and v.args[1] < last:
        found = _moved(n, inner, lambda x: n.slice(x, *v.args[1:]))
    elif v.op == "slice":
        found = _moved(n, inner, lambda x: n.slice(x, *v.args[1:]), lambda w: n.slice(w, 0, *v.args[2:]))
    else:
        found = None if inner is v.args[0] else _of(n, v, inner)
    return _in_place_of(found, v) if found else v


def _moved(n: Normal, v: Value, part: Part, words: Part | None = None) -> Value | None:
    """`part(v)`, taken of what a linear layer in `v` reads, or with `words` of its weight and bias; None where there is none."""
    found = None
    if not _known(n, v):
        return None
    if v.op == "linear":
        x, *weights = v.args
        operands = (part(x), *weights) if words is None else (x, *(w and words(w) for w in weights))
        found = n.add("linear", operands, part(v).meta)
    elif _pointwise(v):
        inner = _moved(n, v.args[0], part, words)
        found = inner and _of(n, v, inner)
    elif v.op == "add" and all(isinstance(a, Value) and same_literal(a.meta.shape, v.meta.shape) for a in v.args):
        terms = [_moved(n, a, part, words) for a in v.args]
        found = n.add("add", tuple(terms), part(v).meta) if all(terms) else None
    return found and _in_place_of(found, part(v), v)


def _known(n: Normal, v: Value) -> bool:
    return v.region == n.region and not v.mutated_storage


def _pointwise(v: Value) -> bool:
    """Does it act on each number by itself, and on nothing else?"""
    return v.op in POINTWISE | {"cast"} and isinstance(v.args[0], Value) and not any(isinstance(a, Value) for a in v.args[1:])


def _keeps_rows(v: Value) -> bool:
    """Does this view leave the last dimension as it was?"""
    return same_literal(v.meta.shape[-1:], v.args[0].meta.shape[-1:])


def _rows(n: Normal, v: Value) -> Part:
    return lambda x: n.view(x, (*v.meta.shape[:-1], x.meta.shape[-1]))


def _of(n: Normal, v: Value, x: Value) -> Value:
    """The operation `v`, on each number of x."""
    return n.add(v.op, (x, *v.args[1:]), v.meta._replace(shape=x.meta.shape))


def _in_place_of(new: Value, *old: Value) -> Value:
    """`new` stands for the first of `old`: the nodes that hold that hold it, and whoever computes `new` computes all of `old`."""
    new.replaces[:] = dict.fromkeys((*old, *new.replaces))
    return new
