"""Rotary position embedding of q and k, and of one tensor alone, after Su et al., "RoFormer" (2021).

    y = x · cos + rotate(x) · sin

Forms are the product of three choices: how `rotate` pairs the channels, what dtype it works in, and whether only the leading
channels are rotated.
"""

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sloth.kernels.rope import rope, rope_single
from sloth.patterns import mathematics
from sloth.rewriter.graph.value import Value
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import rounds_once

PART = "part of a rotation"  # of what sloth.patterns.rotation has read: is it the whole?


def is_rotation(v: Value) -> bool:
    """What was read as one; else cat(−x₂, x₁) or its pairwise form, multiplied by a table."""
    if PART in v.analyses:
        return v.analyses[PART]
    if v.op != "cat" or len(v.args[0]) != 2:
        return False
    first, second = (x.args[0] if x.op == "view" else x for x in v.args[0])
    return (
        first.op == "neg" and _slice_source(first.args[0]) is not None and _slice_source(first.args[0]) is _slice_source(second)
    )


def _slice_source(v: Value) -> Value | None:
    """x of a slice of x, or of the second half that a chunk gives."""
    return v.args[0] if v.op == "slice" else None


ROPE = Construct("rope", "RoPE", anchor=is_rotation, function="apply_rotary", per_site=2, mathematics=mathematics.rotation)


def halves(x):
    """GPT-NeoX and Llama: channel i turns with channel i + R/2."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def pairs(x):
    """GPT-J, Cohere, GLM: channel 2i turns with channel 2i + 1."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def plain(rotate):
    """In the dtype that q and the tables promote to."""
    return lambda x, cos, sin: x * cos + rotate(x) * sin


def cast_back(rotate):
    """The tables may be fp32; the result has the dtype of q."""
    return lambda x, cos, sin: (x * cos + rotate(x) * sin).to(x.dtype)


def in_fp32(rotate):
    """Computed in fp32, cast back."""
    return lambda x, cos, sin: (x.float() * cos + rotate(x.float()) * sin).to(x.dtype)


def partial(turn):
    """Only the leading channels, as many as the tables have, are rotated."""

    def turned(x, cos, sin):
        r = cos.shape[-1]
        return torch.cat((turn(x[..., :r], cos, sin), x[..., r:]), -1)

    return turned


def forms():
    """(name, turn, dims of the tables, options of the operator), the simplest first."""
    for rotate, interleaved in ((halves, False), (pairs, True)):
        for dtype in (plain, cast_back, in_fp32):
            for whole in (True, False):
                turn = dtype(rotate) if whole else partial(dtype(rotate))
                name = "_".join((rotate.__name__, dtype.__name__, "full" if whole else "partial"))
                tables = dict.fromkeys(("cos", "sin"), "B 1 S D" if whole else "B 1 S R")
                yield name, turn, tables, {"interleaved": interleaved, "promote": dtype is plain}


def on_both(turn):
    return lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))


SIZES = {"R": 8, "D": 14}
NO_GRAD = ("cos", "sin")

(_name, _turn, _tables, _options), *_others = forms()
both = pattern(
    ROPE,
    op=rope,
    dims={"q": "B H S D", "k": "B G S D", **_tables},
    sizes=SIZES,
    no_grad=NO_GRAD,
    name="rope",
    variant=_name,
    **_options,
)(on_both(_turn))
single = pattern(
    ROPE,
    op=rope_single,
    dims={"x": "B H S D", **_tables},
    sizes=SIZES,
    no_grad=NO_GRAD,
    name="rope_single",
    variant=_name,
    **_options,
)(_turn)
for _name, _turn, _tables, _options in _others:
    both.variant(_name, _tables, **_options)(on_both(_turn))
    single.variant(_name, _tables, **_options)(_turn)


domain(rope)
domain(rope_single)
rounds_once(rope, streams=("q", "k"))
rounds_once(rope_single, streams=("x",))


@both.check
@single.check
def one_table_for_all_heads(match):
    shape = match.cos.meta.shape
    fits = len(shape) == 4 and (statically_known_true(shape[1] == 1) or statically_known_true(shape[2] == 1))
    match.require(fits, f"cos is {list(shape)}, neither [B, 1, S, R] nor [B, S, 1, R]")
