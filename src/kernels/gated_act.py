"""Gated activation, the middle of a gated MLP:  h = act(g) · u.

Shapes   g, u, h [..., I]; packed: x = [g | u] (or [u | g]) along the last dimension, [..., 2I].
act      "silu", "gelu" (erf), "gelu_tanh", "quick_gelu", "relu" or "sigmoid".

Forward  h = act(g) · u in fp32, rounded once.

Backward, from dh = ∂L/∂h (the chain rule, element by element):
    du = dh · act(g)
    dg = dh · u · act'(g)
with
    silu       s = σ(g)                        act = g·s        act' = s·(1 + g·(1 − s))
    gelu       Φ = ½(1 + erf(g/√2))            act = g·Φ        act' = Φ + g·φ(g),  φ(g) = e^(−g²/2)/√(2π)
    gelu_tanh  z = √(2/π)(g + 0.044715 g³)     act = g·s        act' = s + g·s·(1 − s)·2z'
               s = ½(1 + tanh z) = σ(2z)       z' = √(2/π)(1 + 3·0.044715 g²)
    quick_gelu s = σ(αg), α = 1.702             act = g·s        act' = s·(1 + αg·(1 − s))
    relu       act = max(g, 0)                  act' = [g > 0]
    sigmoid    act = σ(g)                       act' = act·(1 − act)
(Shazeer, "GLU variants improve transformer", 2020; Hendrycks & Gimpel, "GELU", 2016.)

Saved    g and u (or packed x), which the matmuls before it produced anyway; only g where only u wants a gradient.
         h is not saved. The packed backward writes one packed dx, which is what the matmul before it consumes, and may write
         it over x, element by element (rewriter/compile/passes.py lets it where x was computed again).
         The other writes dg over a copy of dh, which Inductor lets go where dh has no other reader, and may write du over u,
         likewise: two [N, I] less at the peak.
Layout   outputs as the eager code: the dimension order of the inputs, dense.
Bytes    forward 3 passes over [N, I] (read g, u; write h), backward 5 (read dh, g, u; write dg, du): the floor is
         8·N·I·itemsize over the copy rate.
"""

import math

import torch

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, triton_op
from sloth.kernels.common.layout import from_rows, ordered_rows, row_order

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid")

# Tuning: elements of a row to a program, and its warps (8 bf16 elements, one 16-byte load, to a thread).
BLOCK = 1024
NUM_WARPS = 4


# ---------------------------------------------------------------- Triton


@triton.jit
def _act(g, ACT: tl.constexpr):
    """act(g) and act'(g), fp32."""
    if ACT == "silu":
        s = tl.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * g)
        return g * s, s * (1 + 1.702 * g * (1 - s))
    elif ACT == "relu":
        return tl.where(g < 0, 0.0, g), tl.where(g > 0, 1.0, 0.0)
    elif ACT == "sigmoid":
        s = tl.sigmoid(g)
        return s, s * (1 - s)
    elif ACT == "gelu":
        cdf = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        z = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = tl.exp(-2 * tl.abs(z))
        r = 1 / (1 + t)  # σ(|2z|); both s and 1 − s without cancellation
        s = tl.where(z < 0, t * r, r)
        return g * s, s + g * r * (t * r) * 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * g * g)


@triton.jit
def _position(I, BLOCK: tl.constexpr):
    """Row and columns of this program: neighbouring programs work on neighbouring memory."""
    blocks = tl.cdiv(I, BLOCK)
    pid = tl.program_id(0)
    return (pid // blocks).to(tl.int64), (pid % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(at, mask):
    return tl.load(at, mask).to(tl.float32)


@triton.jit
def _store(at, x, mask):
    tl.store(at, x.to(at.dtype.element_ty), mask)


@triton.jit
def _forward_kernel(g_ptr, u_ptr, h_ptr, g_stride, u_stride, g_col, u_col, I, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row. g_col and u_col are the columns at which g and u start in their rows (0 unless packed)."""
    row, col = _position(I, BLOCK)
    mask = col < I
    a, _ = _act(_load(g_ptr + row * g_stride + g_col + col, mask), ACT)
    _store(h_ptr + row * I + col, a * _load(u_ptr + row * u_stride + u_col + col, mask), mask)


@triton.jit
def _gradients(dh_at, g_at, u_at, mask, ACT: tl.constexpr):
    """dg and du, fp32."""
    dh = _load(dh_at, mask)
    a, da = _act(_load(g_at, mask), ACT)
    return dh * _load(u_at, mask) * da, dh * a


@triton.jit
def backward_kernel(
    dh_ptr, g_ptr, u_ptr, dg_ptr, du_ptr, dh_stride, g_stride, u_stride, I, ACT: tl.constexpr, BLOCK: tl.constexpr
):
    row, col = _position(I, BLOCK)
    mask = col < I
    g_at, u_at = g_ptr + row * g_stride + col, u_ptr + row * u_stride + col
    dg, du = _gradients(dh_ptr + row * dh_stride + col, g_at, u_at, mask, ACT)
    _store(dg_ptr + row * I + col, dg, mask)
    _store(du_ptr + row * I + col, du, mask)


@triton.jit
def _backward_gate_kernel(dh_ptr, g_ptr, u_ptr, dg_ptr, dh_stride, g_stride, u_stride, I, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row, col = _position(I, BLOCK)
    mask = col < I
    g_at, u_at = g_ptr + row * g_stride + col, u_ptr + row * u_stride + col
    dg, _ = _gradients(dh_ptr + row * dh_stride + col, g_at, u_at, mask, ACT)
    _store(dg_ptr + row * I + col, dg, mask)


@triton.jit
def _backward_up_kernel(dh_ptr, g_ptr, du_ptr, dh_stride, g_stride, I, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """Does not read u."""
    row, col = _position(I, BLOCK)
    mask = col < I
    a, _ = _act(_load(g_ptr + row * g_stride + col, mask), ACT)
    _store(du_ptr + row * I + col, _load(dh_ptr + row * dh_stride + col, mask) * a, mask)


@triton.jit
def backward_packed_kernel(dh_ptr, x_ptr, dx_ptr, dh_stride, x_stride, g_col, u_col, I, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """dx is one buffer [N, 2I]: dg at g_col, du at u_col, as g and u lie in x."""
    row, col = _position(I, BLOCK)
    mask = col < I
    at, out = x_ptr + row * x_stride + col, dx_ptr + row * (2 * I) + col
    dg, du = _gradients(dh_ptr + row * dh_stride + col, at + g_col, at + u_col, mask, ACT)
    _store(out + g_col, dg, mask)
    _store(out + u_col, du, mask)


def _grid(n_rows, I):
    return (n_rows * ((I + BLOCK - 1) // BLOCK),)


def _empty(like: torch.Tensor, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device)


def forward_triton(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    order = row_order(gate)  # eager's act(gate) is a dense tensor, which decides for the product
    g, u = ordered_rows(gate, order), ordered_rows(up, order)
    N, I = g.shape
    h = _empty(g, N, I, dtype=torch.promote_types(gate.dtype, up.dtype))
    launch(_forward_kernel)[_grid(N, I)](g, u, h, g.stride(0), u.stride(0), 0, 0, I, ACT=act, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return from_rows(h, gate.shape, order)


def forward_packed_triton(x: torch.Tensor, act: str, up_first: bool) -> torch.Tensor:
    order = row_order(x)
    x_N2I = ordered_rows(x, order)
    N, I = x_N2I.shape[0], x.shape[-1] // 2
    g_col, u_col = (I, 0) if up_first else (0, I)
    h, stride = _empty(x, N, I), x_N2I.stride(0)
    launch(_forward_kernel)[_grid(N, I)](
        x_N2I, x_N2I, h, stride, stride, g_col, u_col, I, ACT=act, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return from_rows(h, (*x.shape[:-1], I), order)


def backward_triton(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    order = row_order(gate)
    dh, g, u = (ordered_rows(t, order) for t in (dh, gate, up))
    N, I = g.shape
    du = _empty(up, N, I) if need_up else None
    dg = None
    if need_gate and need_up and dh.dtype == gate.dtype:
        dh = dg = dh.clone(memory_format=torch.contiguous_format)
    elif need_gate:
        dg = _empty(gate, N, I)
    grid, options = _grid(N, I), dict(ACT=act, BLOCK=BLOCK, num_warps=NUM_WARPS)
    if need_gate and need_up:
        launch(backward_kernel)[grid](dh, g, u, dg, du, dh.stride(0), g.stride(0), u.stride(0), I, **options)
    elif need_gate:
        launch(_backward_gate_kernel)[grid](dh, g, u, dg, dh.stride(0), g.stride(0), u.stride(0), I, **options)
    elif need_up:
        launch(_backward_up_kernel)[grid](dh, g, du, dh.stride(0), g.stride(0), I, **options)
    return [from_rows(d, gate.shape, order) for d in (dg, du) if d is not None]


def backward_packed_triton(dh: torch.Tensor, x: torch.Tensor, act: str, up_first: bool) -> torch.Tensor:
    order = row_order(x)
    dh, x_N2I = ordered_rows(dh, order), ordered_rows(x, order)
    N, I = dh.shape
    g_col, u_col = (I, 0) if up_first else (0, I)
    dx = _empty(x, N, 2 * I)
    launch(backward_packed_kernel)[_grid(N, I)](
        dh, x_N2I, dx, dh.stride(0), x_N2I.stride(0), g_col, u_col, I, ACT=act, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return from_rows(dx, x.shape, order)


# ---------------------------------------------------------------- ATen


def act_and_derivative(g: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """act(g) and act'(g) in g's dtype, as in `_act`."""
    if act == "silu":
        s = torch.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    if act == "quick_gelu":
        s = torch.sigmoid(1.702 * g)
        return g * s, s * (1 + 1.702 * g * (1 - s))
    if act == "relu":
        return torch.relu(g), (g > 0).to(g.dtype)
    if act == "sigmoid":
        s = torch.sigmoid(g)
        return s, s * (1 - s)
    if act == "gelu":
        cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) * (1 / math.sqrt(2 * math.pi))
    k = math.sqrt(2 / math.pi)
    z = k * (g + 0.044715 * g * g * g)
    t = torch.exp(-2 * z.abs())
    r = 1 / (1 + t)
    s = torch.where(z < 0, t * r, r)
    return g * s, s + g * r * (t * r) * 2 * k * (1 + 3 * 0.044715 * g * g)


def forward_aten(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    dtype = compute_dtype(gate, up)
    a, _ = act_and_derivative(gate.to(dtype), act)
    return (a * up.to(dtype)).to(torch.promote_types(gate.dtype, up.dtype))


def backward_aten(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    dtype = compute_dtype(gate, up)
    dh = dh.to(dtype)
    a, da = act_and_derivative(gate.to(dtype), act)
    grads = []
    if need_gate:
        grads.append((dh * up.to(dtype) * da).to(gate.dtype))
    if need_up:
        grads.append((dh * a).to(up.dtype))
    return grads


def _halves(x: torch.Tensor, up_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed x as (gate, up) views."""
    first, second = x.chunk(2, -1)
    return (second, first) if up_first else (first, second)


def forward_packed_aten(x: torch.Tensor, act: str, up_first: bool) -> torch.Tensor:
    return forward_aten(*_halves(x, up_first), act)


def backward_packed_aten(dh: torch.Tensor, x: torch.Tensor, act: str, up_first: bool) -> torch.Tensor:
    dg, du = backward_aten(dh, *_halves(x, up_first), act, True, True)
    return torch.cat((du, dg) if up_first else (dg, du), -1)


# ---------------------------------------------------------------- operators


def _check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {ACTIVATIONS}, got {act!r}")


forward_for = implementations("sloth::gated_act", triton=forward_triton, aten=forward_aten)
backward_for = implementations("sloth::gated_act_backward", triton=backward_triton, aten=backward_aten)
forward_packed_for = implementations("sloth::gated_act_packed", triton=forward_packed_triton, aten=forward_packed_aten)
backward_packed_for = implementations(
    "sloth::gated_act_packed_backward", triton=backward_packed_triton, aten=backward_packed_aten
)


@triton_op("sloth::gated_act", "gated_mlp")
def _gated_act(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    _check_act(act)
    torch._check(gate.shape == up.shape, lambda: f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    return forward_for(gate, up)(gate, up, act)


@triton_op("sloth::gated_act_backward", "gated_mlp")
def _gated_act_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str, need_gate: bool, need_up: bool
) -> list[torch.Tensor]:
    """[dgate, dup], each only if it is needed. `up` is not read where dgate is not needed."""
    return backward_for(gate, up)(dh, gate, up, act, need_gate, need_up)


@triton_op("sloth::gated_act_packed", "gated_mlp")
def _gated_act_packed(x: torch.Tensor, act: str, up_first: bool = False) -> torch.Tensor:
    _check_act(act)
    torch._check(x.shape[-1] % 2 == 0, lambda: f"packed gate and up need an even last dimension, got {x.shape[-1]}")
    return forward_packed_for(x)(x, act, up_first)


@triton_op("sloth::gated_act_packed_backward", "gated_mlp")
def _gated_act_packed_backward(dh: torch.Tensor, x: torch.Tensor, act: str, up_first: bool) -> torch.Tensor:
    return backward_packed_for(x)(dh, x, act, up_first)


gated_act = torch.ops.sloth.gated_act.default
gated_act_backward = torch.ops.sloth.gated_act_backward.default
gated_act_packed = torch.ops.sloth.gated_act_packed.default
gated_act_packed_backward = torch.ops.sloth.gated_act_packed_backward.default


def _setup(ctx, inputs, output):
    gate, up, ctx.act = inputs
    need_gate = ctx.needs_input_grad[0]
    ctx.save_for_backward(gate, up if need_gate else None)


def _backward(ctx, dh):
    gate, up = ctx.saved_tensors
    need_gate, need_up = ctx.needs_input_grad[:2]
    grads = iter(gated_act_backward(dh, gate, gate if up is None else up, ctx.act, need_gate, need_up))
    return next(grads) if need_gate else None, next(grads) if need_up else None, None


def _setup_packed(ctx, inputs, output):
    x, ctx.act, ctx.up_first = inputs
    ctx.save_for_backward(x)


def _backward_packed(ctx, dh):
    (x,) = ctx.saved_tensors
    return gated_act_packed_backward(dh, x, ctx.act, ctx.up_first), None, None


_gated_act.register_autograd(_backward, setup_context=_setup)
_gated_act_packed.register_autograd(_backward_packed, setup_context=_setup_packed)


# ---------------------------------------------------------------- compiled for every target by the tests

_INTEGERS = ("g_stride", "u_stride", "dh_stride", "x_stride", "g_col", "u_col", "I")


def _compile_case(kernel, act: str):
    signature = {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= {name: "i32" for name in kernel.arg_names if name in _INTEGERS}
    return kernel, signature, {"ACT": act, "BLOCK": BLOCK}, {"num_warps": NUM_WARPS}


COMPILE = [
    *[_compile_case(_forward_kernel, act) for act in ACTIVATIONS],
    *[_compile_case(backward_kernel, act) for act in ACTIVATIONS],
    *[_compile_case(kernel, "silu") for kernel in (_backward_gate_kernel, _backward_up_kernel, backward_packed_kernel)],
]
