"""Attention with a mask that is computed: kernels are told the interval of keys that it is proven to leave each query."""

import math
from collections.abc import Callable, Iterable, Set

import torch
import torch.nn.functional as F

from sloth.kernels.attention.attention import attention, attention_bounds, repeats
from sloth.patterns import mathematics
from sloth.patterns.attention.additive_mask import Added, added, may_see_nothing, require_swallowed
from sloth.patterns.attention.additive_mask import why_not as why_not_added
from sloth.patterns.attention.alibi import of_keys
from sloth.patterns.attention.index_expr import is_truth
from sloth.patterns.attention.mask_analysis import Interval, meaning, why_not
from sloth.rewriter.graph.normal_form import VIEWS, Call, Normal, rule
from sloth.rewriter.graph.value import Value, same_literal
from sloth.rewriter.match.domain import INTEGERS, domain, positive
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.hoist import shares
from sloth.rewriter.plan.narrow import casts_in_autocast


def is_masked(v: Value) -> bool:
    return v.op == "scaled_dot_product_attention" and isinstance(v.args[3], Value)


BEFORE = VIEWS | {"add", "sub", "mul", "div", "tanh", "cat", "where"}  # what makes scores of products
BEHIND = VIEWS | {"mul", "dropout", "where"}  # … and weights of their softmax


def is_spelled(v: Value) -> bool:
    """The softmax of products of queries and keys, whose result is multiplied with values."""
    return (
        v.op == "softmax" and _reaches(v.args[0], lambda x: x.inputs, BEFORE) and _reaches(v, lambda x: x.users, BEHIND | {v.op})
    )


def _reaches(start: Value, neighbours: Callable[[Value], Iterable[Value]], through: Set[str]) -> bool:
    """Is there a product of tensors of at least three dimensions, by way of these operations? Each is looked at once."""
    seen, todo = set(), [start]
    while todo:
        v = todo.pop()
        if v in seen or v.meta is None:
            continue
        seen.add(v)
        if v.op not in ("matmul", "matmul_transposed", "baddbmm"):
            todo += neighbours(v) if v.op in through else ()
        elif len(v.meta.shape) > 2:
            return True
    return False


ATTENTION = Construct("attention", "attention", anchor=lambda v: is_masked(v) or is_spelled(v), mathematics=mathematics.attention)
DIMS = {"query": "B H S D", "key": "B H T D", "value": "B H T E", "attn_mask": "B 1 S T"}
GROUPED = {"query": "B 2*G S D", "key": "B G T D", "value": "B G T E"}
domain(  # a score that is hidden is −inf before torch's kernels scale it, and a maximum is taken of scores as they come
    attention, {"scale": positive, "softcap": positive}, documents=INTEGERS, valid=INTEGERS, visible=INTEGERS
)
shares(attention, attention_bounds, "bounds", when=lambda call: call.meta["example_value"].shape[2] != 1)
OPERANDS = ("query", "key", "value")
casts_in_autocast(F.scaled_dot_product_attention, OPERANDS)
casts_in_autocast(attention, OPERANDS, unless=lambda call: repeats(*(n.meta.get("example_value") for n in call.args[:2])))
BY_TORCH = (Interval(), Interval(ahead=0))  # masks that torch's kernels know


@rule("scaled_dot_product_attention")
def scale(n: Normal, c: Call, query: Value, *rest):
    """scaled_dot_product_attention(q, …, scale=None) = the same with scale = 1 / √(width of q's heads), where that is known."""
    *others, given, gqa = rest
    width = query.meta.shape[-1]
    return n.add(c.op, (query, *others, 1 / math.sqrt(width), gqa), c.meta) if given is None and isinstance(width, int) else None


def shown(match) -> Added | None:
    """The mask as one that is added. A boolean one says less of what a query that sees nothing gets: nothing, here."""
    return Added(match.attn_mask, 0.0, None) if is_truth(match.attn_mask) else added(match.attn_mask)


def told(match) -> Interval | None:
    """What is proven of the mask, if the operator can be told that."""
    mask = shown(match)
    found, rows, columns = mask and meaning(mask.seen), match.query.meta.shape[-2], match.key.meta.shape[-2]
    return found if found in BY_TORCH or found is not None and same_literal(rows, columns) else None


def proven(told: Callable) -> dict[str, Callable]:
    """The fields of what is `told` of a match's mask as arguments of the operator. Nothing proven is refused by a check."""
    fields = ("documents", "valid", "ahead", "behind")
    return {field: lambda match, field=field: getattr(told(match) or Interval(), field) for field in fields}


def bias(match) -> Value | None:
    mask = shown(match)
    return of_keys(mask.bias, match.query.meta.shape[1]) if mask is not None and mask.bias is not None else None


def uniform(match) -> bool:
    """May there be queries that see nothing, and then weigh all keys alike?"""
    return not is_truth(match.attn_mask) and may_see_nothing(told(match) or Interval())


TOLD = proven(told) | {"bias": bias, "uniform": uniform}


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    B, G, T, D = x.shape
    return x[:, :, None].expand(B, G, heads // G, T, D).reshape(B, heads, T, D)


@pattern(ATTENTION, op=attention, dims=DIMS, name="attention", variant="plain", **TOLD)
def plain(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)


@plain.variant("grouped", dims=GROUPED, **TOLD)
def grouped(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    heads = query.shape[1]
    key, value = repeated(key, heads), repeated(value, heads)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)


@plain.variant("grouped_native", dims=GROUPED, **TOLD)
def grouped_native(query, key, value, attn_mask, *, dropout_p: float, scale: float):
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale, enable_gqa=True)


@plain.check
def is_supported(match):
    mask = readable(match)
    by_torch = told(match) in BY_TORCH and mask.bias is None
    match.require(match.dropout_p == 0 or by_torch, "it has dropout, and its mask is not proven to be causal")
    match.require(meaning(mask.seen) is not None, why_not(mask.seen))
    match.require(told(match) is not None, "its queries and keys differ in number, and its mask is not causal")
    if uniform(match):
        require_finite(match, mask)
    require_widths(match)


def readable(match) -> Added:
    """What is said of the mask in the operator's terms; refused where it adds other numbers to scores."""
    mask = shown(match)
    match.require(mask is not None, why_not_added(match.attn_mask))
    match.require(mask.bias is None or bias(match) is not None, "its mask adds a bias that is not proven to be ALiBi's")
    return mask


def require_finite(match, mask: Added) -> None:
    match.require(-math.inf < mask.least, "a query may see nothing, and is nan then")
    require_swallowed(match, mask)


def require_widths(match) -> None:
    grouped = not same_literal(match.query.meta.shape[1], match.key.meta.shape[1])
    same = same_literal(match.query.meta.shape[-1], match.value.meta.shape[-1])
    match.require(same or not grouped, "values differ in width from keys, and torch has no kernel for that with groups of heads")
