"""Losses of labels: the negative log-likelihood in its spellings is cross-entropy of logits."""

from __future__ import annotations

from math import prod

from sloth.rewriter.graph.canonical import Call, Normal, rule
from sloth.rewriter.graph.value import Value, same_literal

MEAN, SUM, NONE = 1, 2, 0  # reductions, as ATen counts them
NO_LABEL = -(2**31 - 1)  # ignored where nothing is: `gather` takes no label that is none


@rule("nll_loss_nd", "nll_loss")
def loss_of_log_softmax(n: Normal, c: Call, log_p: Value, target: Value, weight, reduction, ignore_index):
    """nll_loss(log_softmax(z), t) = cross_entropy_loss(z, t), whose classes stand in the dimension that both take; of a view or
    permutation that keeps them together, too.
    """
    inner = log_p.args[0] if n.near(log_p, "view") or n.near(log_p, "permute") else log_p
    if not n.near(inner, "log_softmax"):
        return None
    (z, dim), rank, classes = inner.args, len(log_p.meta.shape), min(1, len(log_p.meta.shape) - 1)
    if log_p.op == "view":
        kept = dim == len(z.meta.shape) - 1 and classes == rank - 1 and same_literal(z.meta.shape[-1], log_p.meta.shape[-1])
        z = n.view(z, log_p.meta.shape)
    elif log_p.op == "permute":
        kept, z = log_p.args[1][classes] == dim, n.permute(z, log_p.args[1])
    else:
        kept = dim == classes
    return n.call("cross_entropy_loss", (z, target, weight, reduction, ignore_index, 0.0), c.metas) if kept else None


@rule("log")
def log_of_softmax(n: Normal, c: Call, x: Value):
    """log(softmax(x)) = log_softmax(x)."""
    return n.add("log_softmax", x.args, c.meta) if n.near(x, "softmax") else None


@rule("log_softmax")
def one_log_softmax(n: Normal, c: Call, x: Value, dim, dtype=None):
    """log_softmax(x, −1, dtype) = log_softmax(cast(x, dtype), rank − 1)."""
    return n.add("log_softmax", (n.cast(x, dtype) if dtype else x, dim % max(len(x.meta.shape), 1)), c.meta)


@rule("gather")
def gathered(n: Normal, c: Call, x: Value, dim, index: Value, sparse=False):
    """log_softmax(z).gather(−1, t) = −cross_entropy_loss(z, t), of each row, where no label is ignored."""
    last = len(x.meta.shape) - 1
    if last < 1 or not n.near(x, "log_softmax") or dim % (last + 1) != last or x.args[1] != last:
        return None
    found = _of_rows(n, c, x.args[0], index)
    return found and n.call("neg", (found,), c.metas)


@rule("sub")
def left_of_the_sum(n: Normal, c: Call, a, b, alpha=1):
    """logsumexp(z) − z[t] = cross_entropy_loss(z, t), of each row; z[t] − logsumexp(z) = −that."""
    if alpha != 1 or not (isinstance(a, Value) and isinstance(b, Value)) or not same_literal(a.meta.shape, b.meta.shape):
        return None
    for total, picked, turned in ((a, b, False), (b, a, True)):
        inner = picked.args[0] if n.near(picked, "view") else picked
        total = total.args[0] if n.near(total, "view") else total
        if not n.near(total, "logsumexp") or not n.near(inner, "gather") or total.args[0] is not inner.args[0]:
            continue
        z, dim, index, *_ = inner.args
        last = len(z.meta.shape) - 1
        if last < 1 or dim % (last + 1) != last or [d % (last + 1) for d in total.args[1]] != [last]:
            return None
        found = _of_rows(n, Call("gather", (inner.meta,)), z, index)
        found = found and n.view(found, c.meta.shape)
        return found and n.call("neg", (found,), c.metas) if turned else found
    return None


@rule("neg")
def twice_negative(n: Normal, c: Call, x: Value):
    """−(−x) = x, a view between them too."""
    if n.near(x, "neg"):
        return x.args[0]
    return n.view(x.args[0].args[0], c.meta.shape) if n.near(x, "view") and n.near(x.args[0], "neg") else None


@rule("mean", "sum")
def mean_of_rows(n: Normal, c: Call, x: Value, *how):
    """sum(cross_entropy_loss(z, t) of each row) = its sum; mean(…) its mean, where no label is ignored; of −x: −that."""
    if c.meta.shape or any(how[1:]) or how and how[0] not in (None, c.meta.dtype) or x.meta.dtype != c.meta.dtype:
        return None
    below, turned, between = x, False, []
    while n.near(below, "neg") or n.near(below, "view"):
        between.append(below)
        below, turned = below.args[0], turned != (below.op == "neg")
    if not n.near(below, "cross_entropy_loss") or below.args[3] != NONE:
        return None
    z, target, weight, _, ignored, *more = below.args
    if c.op == "mean" and (ignored != NO_LABEL or weight is not None):
        return None
    found = n.call("cross_entropy_loss", (z, target, weight, MEAN if c.op == "mean" else SUM, ignored, *more), c.metas)
    found.replaces[:] = dict.fromkeys((*found.replaces, *between, below, *below.replaces))  # it does without them
    return n.call("neg", (found,), c.metas) if turned else found


def _of_rows(n: Normal, c: Call, z: Value, index: Value) -> Value | None:
    """The loss of each row of z [..., V], for labels [..., 1]."""
    *rows, one = index.meta.shape
    if not same_literal(one, 1) or not same_literal(tuple(rows), tuple(z.meta.shape[:-1])) or not z.meta.dtype.is_floating_point:
        return None
    flat = (prod(rows),)
    operands = n.view(z, (*flat, z.meta.shape[-1])), n.view(index, flat), None, NONE, NO_LABEL, 0.0
    return n.view(n.call("cross_entropy_loss", operands, (c.meta._replace(shape=flat),)), c.meta.shape)
