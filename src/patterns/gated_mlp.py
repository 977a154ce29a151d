"""The middle of a gated MLP: act(gate) · up, with gate and up from two projections or packed in one."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from sloth.kernels.gated_act import backward_kernel, backward_packed_kernel, gated_act, gated_act_packed
from sloth.patterns import mathematics
from sloth.rewriter.compile.passes import declare_inplace
from sloth.rewriter.graph.canonical import VIEWS
from sloth.rewriter.graph.value import Value, same_literal, uncast
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import computes_wide
from sloth.rewriter.plan.side_by_side import read_side_by_side

LAYERS = ("linear", "_grouped_mm", "transformers::grouped_mm_fallback")  # the others: of experts
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
    return all(is_layer(uncast(a.args[0] if a.op in EVERYWHERE else a)) for a in operands) and is_read_by_layer(product)


def is_layer(v: Value) -> bool:
    """The result of a linear layer, or of one and its adapters, rounded where these are wider: views of it, not other casts."""
    while v.op in VIEWS and v.op != "cast":
        v = v.args[0]
    if v.op == "cast" and v.args[0].op == "add" and v.meta.dtype.itemsize < v.args[0].meta.dtype.itemsize:
        v = v.args[0]
    if v.op == "add":
        return all(isinstance(a, Value) and is_layer(_unscaled(a)) for a in v.args)
    return v.op in LAYERS or v.op == "cat" and all(map(is_layer, v.inputs))


def _unscaled(v: Value) -> Value:
    while v.op == "cast" or v.op == "mul" and not isinstance(v.args[1], Value):
        v = v.args[0]
    return v


def is_read_by_layer(v: Value) -> bool:
    """Does a layer read it, or its norm (BitNet)?"""
    return any(u.op in LAYERS or (u.op in VIEWS or is_of_norm(u, v)) and is_read_by_layer(u) for u in v.users)


def is_of_norm(u: Value, v: Value) -> bool:
    """Is u part of v's RMSNorm: v², v over its root, or that times a weight?"""
    others = [a for a in u.inputs if a is not v]
    if u.op != "mul" or len(others) > 1:
        return False
    if not others:
        return all(x.op == "mean" for x in u.users)
    return bool(mathematics.rms_norm(u)) or len(others[0].meta.shape) == 1 and bool(mathematics.rms_norm(uncast(v)))


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    has = lambda *names: all(hasattr(module, n) for n in names)  # noqa: E731
    return int(has("gate_proj", "up_proj") or has("gate_up_proj") or has("w1", "w2", "w3"))


GATED_MLP = Construct("gated_mlp", "gated MLP", anchor=is_gate, module=_calls, mathematics=mathematics.gated_mlp)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(QUICK * x)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


def separate(act):
    return lambda gate, up: act(gate) * up


def cast_back(act):
    """Of a gate in fp32: gated norms of linear attention (Qwen3-Next)."""
    return lambda gate, up: (act(gate.float()) * up).to(up.dtype)


def packed(act, up_first):
    def both(x):
        gate, up = reversed(x.chunk(2, -1)) if up_first else x.chunk(2, -1)
        return act(gate) * up

    return both


declare_inplace(backward_kernel, du_ptr="u_ptr")
declare_inplace(backward_packed_kernel, dx_ptr="x_ptr")
read_side_by_side(gated_act, gated_act_packed, lambda both, up_first, rest: (both, *rest, up_first))
domain(gated_act)
domain(gated_act_packed)
computes_wide(gated_act, ("gate", "up"))


def entries(construct, name, activations):
    """Gate and up apart, and in one tensor, either first. activations: formulas, by what the operator calls them."""
    first, formula = next(iter(activations.items()))
    apart = {"op": gated_act, "dims": {"gate": "B S I", "up": "B S I"}, "name": name}
    joined = {"op": gated_act_packed, "dims": {"x": "B S 2*I"}, "name": f"{name}_packed"}
    one = pattern(construct, **apart, recompute=True, variant=first, act=first)(separate(formula))
    two = pattern(construct, **joined, recompute=True, variant=first, act=first, up_first=False)(packed(formula, False))
    for act, formula in activations.items():
        if act != first:
            one.variant(act, act=act)(separate(formula))
            two.variant(act, act=act, up_first=False)(packed(formula, False))
        two.variant(f"{act}_up_first", act=act, up_first=True)(packed(formula, True))
    return one, two


act_mul, act_mul_packed = entries(GATED_MLP, "gated_mlp", ACTIVATIONS)
act_mul.variant("silu_cast_back", act="silu")(cast_back(F.silu))
# Of activations that gate elsewhere too, only those between layers. As constructs are told apart as objects, what its check
# refuses is no miss of a gated MLP, unless the anchor says so.
relu_mul, relu_mul_packed = entries(replace(GATED_MLP), "gated_layers", {"relu": torch.relu, "sigmoid": torch.sigmoid})


@relu_mul.check
@relu_mul_packed.check
def between_layers(match):
    match.require(of_layers(match.roots[0]), "it is not between layers")


@relu_mul.check
@act_mul.check
def no_wider_gate(match):
    gate, up = match.gate.meta.dtype, match.up.meta.dtype
    match.require(torch.promote_types(gate, up) == up, f"gate is {gate}, up is {up}")
