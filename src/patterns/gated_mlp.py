"""The middle of a gated MLP: act(gate) · up, with gate and up from two projections or packed in one."""

import torch
import torch.nn.functional as F

from sloth.kernels.gated_act import backward_kernel, gated_act, gated_act_packed
from sloth.rewriter.compile.passes import declare_inplace
from sloth.rewriter.graph.value import Value, same_literal, uncast
from sloth.rewriter.match.domain import domain
from sloth.rewriter.match.pattern import Construct
from sloth.rewriter.match.registry import pattern
from sloth.rewriter.plan.narrow import computes_wide


def is_gate(v: Value) -> bool:
    """An activation times something else of its shape (times a vector it is a scaling, as in state space models)."""
    if v.op != "mul" or not isinstance(v.args[1], Value) or not same_literal(*(a.meta.shape for a in v.args)):
        return False
    return v.args[0] is not v.args[1] and any(map(is_activation, map(uncast, v.args)))


def is_activation(v: Value) -> bool:
    if v.op == "mul" and isinstance(v.args[1], Value):  # x · sigmoid(1.702 · x)
        return any(s.op == "sigmoid" and s.args[0].op == "mul" and s.args[0].args[0] is x for x, s in (v.args, v.args[::-1]))
    return v.op in ("silu", "gelu", "relu", "sigmoid")


def _calls(module: torch.nn.Module, arguments: dict) -> int:
    has = lambda *names: all(hasattr(module, n) for n in names)  # noqa: E731
    return int(has("gate_proj", "up_proj") or has("gate_up_proj") or has("w1", "w2", "w3"))


GATED_MLP = Construct("gated_mlp", "gated MLP", anchor=is_gate, module=_calls)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "silu": (F.silu, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (gelu_tanh, "gelu_tanh"),
    "quick_gelu": (quick_gelu, "quick_gelu"),
    "relu": (F.relu, "relu"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
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


@act_mul.check
def same_dtype(match):
    gate, up = match.gate.meta, match.up.meta
    match.require(gate.dtype == up.dtype, f"gate is {gate.dtype}, up is {up.dtype}")
