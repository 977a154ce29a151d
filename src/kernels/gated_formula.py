"""The middle of a gated MLP by any formula:  h = F(g, u), element by element, with its backward pass.

Shapes   g, u, h [..., I].
formula  text that `sloth.kernels.formula` reads, "mul(mul(g,sigmoid(mul(1.702,g))),add(u,1.0))".

Forward  h = F(g, u) in fp32, rounded once, by the steps of the code that the formula was read from.
Backward dg = dh · ∂F/∂g, du = dh · ∂F/∂u by the chain rule (`formula.py`), only those that are needed.

The kernels are written for each formula: source made of the functions that `formula.OPS` lists and of numbers, nothing else,
kept on disk as Inductor keeps its own (`codecache.PyCodeCache`), so that Triton and Inductor read it as they read any kernel's.

Saved    g and u, which the matmuls before it produced anyway. h is not saved.
Bytes    forward 3 passes over [N, I] (read g, u; write h), backward 5 (read dh, g, u; write dg, du): the floor is
         8·N·I·itemsize over the copy rate.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.launch import compute_dtype, launch, triton_op
from sloth.kernels.common.layout import from_rows, ordered_rows, row_order
from sloth.kernels.formula import backward, evaluate, formula, triton_lines
from sloth.kernels.gated_act import BLOCK, NUM_WARPS

# ---------------------------------------------------------------- Triton

HEAD = '''"""h = {text} and its gradients, written by sloth.kernels.gated_formula."""

from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.special import expm1, log1p, sech2, softplus, tanh
from sloth.kernels.gated_act import _load, _position, _store

'''
BOTH, GATE, UP = (True, True), (True, False), (False, True)
NAMES = {BOTH: "backward_kernel", GATE: "backward_gate_kernel", UP: "backward_up_kernel"}


def source(text: str) -> str:
    """The module with the kernels of a formula."""
    forward = formula(text)
    parts = [HEAD.format(text=text), _kernel("forward_kernel", ("g", "u"), forward, ("h",))]
    for need, name in NAMES.items():
        outputs = tuple(output for output, needed in zip(("dg", "du"), need, strict=True) if needed)
        parts.append(_kernel(name, ("dh", "g", "u"), backward(text, *need), outputs))
    return "\n".join(parts)


def _kernel(name: str, inputs: tuple[str, ...], f: Any, outputs: tuple[str, ...]) -> str:
    pointers = [f"{x}_ptr" for x in (*inputs, *outputs)]
    arguments = [*pointers, *(f"{x}_stride" for x in inputs), "I", "BLOCK: tl.constexpr"]
    lines, results = triton_lines(f)
    body = ["row, col = _position(I, BLOCK)", "mask = col < I"]
    body += [f"{x} = _load({x}_ptr + row * {x}_stride + col, mask)" for x in inputs]
    body += [*lines, *(f"_store({x}_ptr + row * I + col, {r}, mask)" for x, r in zip(outputs, results, strict=True))]
    return "\n".join(["@triton.jit", f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in body), ""])


@cache
def kernels(text: str) -> ModuleType:
    """The kernels of a formula, written and imported."""
    from sloth.compat.inductor import PyCodeCache

    return PyCodeCache.load(source(text))


def _launch(text: str, kernel: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
    N, I = inputs[0].shape
    grid = (N * ((I + BLOCK - 1) // BLOCK),)
    launch(getattr(kernels(text), kernel))[grid](
        *inputs, *outputs, *(x.stride(0) for x in inputs), I, BLOCK=BLOCK, num_warps=NUM_WARPS
    )


def forward_triton(gate: torch.Tensor, up: torch.Tensor, text: str) -> torch.Tensor:
    order = row_order(gate, up)
    g, u = ordered_rows(gate, order), ordered_rows(up, order)
    h = torch.empty(g.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    _launch(text, "forward_kernel", [g, u], [h])
    return from_rows(h, gate.shape, order)


def backward_triton(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, text: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    order = row_order(gate, up)
    dh, g, u = (ordered_rows(t, order) for t in (dh, gate, up))
    needed = [like for like, need in ((gate, need_gate), (up, need_up)) if need]
    grads = [torch.empty(g.shape, dtype=like.dtype, device=like.device) for like in needed]
    if grads:
        _launch(text, NAMES[need_gate, need_up], [dh, g, u], grads)
    return [from_rows(d, gate.shape, order) for d in grads]


# ---------------------------------------------------------------- ATen


def forward_aten(gate: torch.Tensor, up: torch.Tensor, text: str) -> torch.Tensor:
    dtype = compute_dtype(gate, up)
    (h,) = evaluate(formula(text), g=gate.to(dtype), u=up.to(dtype))
    return h.to(torch.promote_types(gate.dtype, up.dtype))


def backward_aten(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, text: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    dtype = compute_dtype(gate, up)
    grads = evaluate(backward(text, need_gate, need_up), dh=dh.to(dtype), g=gate.to(dtype), u=up.to(dtype))
    needed = [like.dtype for like, need in ((gate, need_gate), (up, need_up)) if need]
    return [d.to(to) for d, to in zip(grads, needed, strict=True)]


# ---------------------------------------------------------------- operators

forward_for = implementations("sloth::gated_formula", triton=forward_triton, aten=forward_aten)
backward_for = implementations("sloth::gated_formula_backward", triton=backward_triton, aten=backward_aten)


@triton_op("sloth::gated_formula", "gated_formula")
def _gated_formula(gate: torch.Tensor, up: torch.Tensor, formula: str) -> torch.Tensor:
    torch._check(gate.shape == up.shape, lambda: f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    return forward_for(gate, up)(gate, up, formula)


@triton_op("sloth::gated_formula_backward", "gated_formula")
def _gated_formula_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, formula: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    """[dgate, dup], each only if it is needed."""
    return backward_for(gate, up)(dh, gate, up, formula, need_gate, need_up)


gated_formula = torch.ops.sloth.gated_formula.default
gated_formula_backward = torch.ops.sloth.gated_formula_backward.default


def _setup(ctx, inputs, output):
    gate, up, ctx.formula = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx, dh):
    need_gate, need_up = ctx.needs_input_grad[:2]
    grads = iter(gated_formula_backward(dh, *ctx.saved_tensors, ctx.formula, need_gate, need_up))
    return next(grads) if need_gate else None, next(grads) if need_up else None, None


_gated_formula.register_autograd(_gradients, setup_context=_setup)


# ---------------------------------------------------------------- compiled for every target by the tests

EXAMPLES = (
    "mul(mul(clamp(g,-inf,7.0),sigmoid(mul(1.702,clamp(g,-inf,7.0)))),add(clamp(u,-7.0,7.0),1.0))",
    "mul(mul(g,tanh(softplus(g))),u)",
    "mul(select(positive(g),log1p(relu(g)),expm1(clamp(g,-inf,0.0))),hardtanh(u,0.0,6.0))",
    "mul(add(mul(erf(g),cos(g)),div(sin(g),sqrt(add(mul(g,g),1.0)))),mul(exp(neg(abs(u))),rsqrt(add(mul(u,u),1.0))))",
)


def __getattr__(name: str) -> Any:
    """COMPILE, whose kernels are written when it is asked for."""
    if name != "COMPILE":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = []
    for text in EXAMPLES:
        for kernel in ("forward_kernel", *NAMES.values()) if text is EXAMPLES[0] else ("forward_kernel", NAMES[BOTH]):
            fn = getattr(kernels(text), kernel)
            kinds = {a: "*bf16" if a.endswith("_ptr") else "i32" for a in fn.arg_names if a != "BLOCK"}
            found.append((fn, kinds, {"BLOCK": BLOCK}, {"num_warps": NUM_WARPS}))
    return found
