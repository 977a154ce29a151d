"""The middle of a gated MLP: act(gate) · up, with gate and up from two projections or packed in one."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sloth.kernels.gated_act import backward_kernel, gated_act, gated_act_packed
from sloth.rewriter.compile.passes import declare_inplace
from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.value import Value, same_literal, uncast
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import computes_wide

QUICK = 1.702  # in place of what makes GELU of it


def is_gate(v: Value) -> bool:
    """An activation times something else of its shape (times a vector it is a scaling, as in state space models)."""
    if v.op != "mul" or not isinstance(v.args[1], Value) or not same_literal(*(a.meta.shape for a in v.args)):
        return False
    acts = [uncast(a) for a in v.args] if v.args[0] is not v.args[1] else []
    return any(is_activation(a) or a.op in EVERYWHERE and of_layers(v) for a in acts)


def is_activation(v: Value) -> bool:
    if v.op == "mul" and isinstance(v.args[1], Value):
        return any(
            s.op == "sigmoid" and s.args[0].op == "mul" and s.args[0].args == (x, QUICK) for x, s in (v.args, v.args[::-1])
        )
    return v.op in ("silu", "gelu")


EVERYWHERE = ("relu", "sigmoid")  # what gates in other places too


def of_layers(product: Value) -> bool:
    """Is it a product of two layers' results, one activated, that a layer reads?"""
    operands = [uncast(a) for a in product.args]
    return all(_is_layer(a.args[0] if a.op in EVERYWHERE else a) for a in operands) and _is_read_by_layer(product)


def _is_layer(v: Value) -> bool:
    while v.op in VIEWS:
        v = v.args[0]
    return v.op == "linear" or v.op == "cat" and all(map(_is_layer, v.inputs))


def _is_read_by_layer(v: Value) -> bool:
    return any(u.op == "linear" or u.op in VIEWS and _is_read_by_layer(u) for u in v.users)


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    has = lambda *names: all(hasattr(module, n) for n in names)  # noqa: E731
    return int(has("gate_proj", "up_proj") or has("gate_up_proj") or has("w1", "w2", "w3"))


GATED_MLP = Construct("gated_mlp", "gated MLP", anchor=is_gate, module=_calls)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(QUICK * x)


ACTIVATIONS = {
    "silu": (F.silu, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (gelu_tanh, "gelu_tanh"),
    "quick_gelu": (quick_gelu, "quick_gelu"),
}


def separate(act):
    return lambda gate, up: act(gate) * up


def packed(act, up_first):
    def both(x):
        gate, up = reversed(x.chunk(2, -1)) if up_first else x.chunk(2, -1)
        return act(gate) * up

    return both


declare_inplace(backward_kernel, du_ptr="u_ptr")
domain(gated_act)
domain(gated_act_packed)
computes_wide(gated_act, ("gate", "up"))

act_mul = pattern(
    GATED_MLP, op=gated_act, dims={"gate": "B S I", "up": "B S I"}, recompute=True, name="gated_mlp", variant="silu", act="silu"
)(separate(F.silu))
act_mul_packed = pattern(
    GATED_MLP,
    op=gated_act_packed,
    dims={"x": "B S 2*I"},
    recompute=True,
    name="gated_mlp_packed",
    variant="silu",
    act="silu",
    up_first=False,
)(packed(F.silu, False))
for _name, (_act, _told) in ACTIVATIONS.items():
    if _name != "silu":
        act_mul.variant(_name, act=_told)(separate(_act))
        act_mul_packed.variant(_name, act=_told, up_first=False)(packed(_act, False))
    act_mul_packed.variant(f"{_name}_up_first", act=_told, up_first=True)(packed(_act, True))


# Of activations that gate elsewhere too, only those between layers. As constructs are told apart as objects, what its check
# refuses is no miss of a gated MLP, unless the anchor says so.
BETWEEN = replace(GATED_MLP)
relu_mul = pattern(BETWEEN, op=gated_act, dims=act_mul.dims, recompute=True, name="gated_layers", variant="relu", act="relu")(
    separate(torch.relu)
)
relu_mul.variant("sigmoid", act="sigmoid")(separate(torch.sigmoid))
relu_mul_packed = pattern(
    BETWEEN,
    op=gated_act_packed,
    dims=act_mul_packed.dims,
    recompute=True,
    name="gated_layers_packed",
    variant="relu",
    act="relu",
    up_first=False,
)(packed(torch.relu, False))
relu_mul_packed.variant("relu_up_first", act="relu", up_first=True)(packed(torch.relu, True))
relu_mul_packed.variant("sigmoid", act="sigmoid", up_first=False)(packed(torch.sigmoid, False))
relu_mul_packed.variant("sigmoid_up_first", act="sigmoid", up_first=True)(packed(torch.sigmoid, True))


@relu_mul.check
@relu_mul_packed.check
def between_layers(match):
    match.require(of_layers(match.roots[0]), "it is not between layers")


@relu_mul.check
@act_mul.check
def same_dtype(match):
    gate, up = match.gate.meta, match.up.meta
    match.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")
