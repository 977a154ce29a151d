"""Rotary position embedding (RoPE), applied to q and k in one launch.

Shapes   q [B, H, S, D], k [B, G, S, D] with any strides (in Hugging Face models a transpose of [B, S, H, D]),
         cos, sin [B or 1, S, R] or [B or 1, 1, S, R], R even, R ≤ D. The last D − R channels pass through (partial rotary).
         Where cos and sin are [B or 1, S, 1, R], q, k and the results are [B, S, heads, D]: its transpose is what is rotated.

Forward  y = x·cos + rotate(x)·sin on the first R channels, in fp32, rounded once. With the channels of x paired as
         (a, b) = (x[:R/2], x[R/2:R])   half-split (GPT-NeoX, Llama)   rotate(x) = cat(−b, a)
         (a, b) = (x[0:R:2], x[1:R:2])  interleaved (GPT-J, Cohere)    rotate(x) = stack(−b, a).flatten
         and c₁, c₂, s₁, s₂ the values of cos and sin at the channels of a and b (they may differ: used as given)
             y_a = a·c₁ − b·s₁
             y_b = b·c₂ + a·s₂

Backward For each pair that is a linear map (y_a, y_b)ᵀ = M (a, b)ᵀ,  M = [[c₁, −s₁], [s₂, c₂]], so
         ∂L/∂(a, b) = Mᵀ ∂L/∂(y_a, y_b):
             da = dy_a·c₁ + dy_b·s₂
             db = dy_b·c₂ − dy_a·s₁
         which is the forward with (s₁, s₂) replaced by (−s₂, −s₁). cos and sin are functions of the positions: no gradient.
(Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.)

Saved    cos and sin only.
Layout   outputs as the eager code: like q's and k's own memory order, or contiguous where partial rotary ends in a `cat`;
         gradients in [B, S, H, D] memory order (seen as [B, H, S, D]), as the projection before consumes them.
Bytes    forward and backward each read and write q and k once: the floor is 4·B·S·(H + G)·D·itemsize over the copy rate.
"""

import torch

from sloth.kernels.common.dispatch import implementations
from sloth.kernels.common.language import tl, triton
from sloth.kernels.common.launch import compute_dtype, launch, triton_op

# Tuning: channels of a program (some heads of one token), and its warps. Small programs, many of them.
CHANNELS = 1024
NUM_WARPS = 1


# ---------------------------------------------------------------- Triton
#
# Written per channel: y[i] = x[i]·c[i] ± x[j]·s, j the partner of i. A row is then loaded and stored in one piece; the second
# load of it, for the partners, finds the lines in L1. (Two half rows at a time are 2 % slower on an H200.)


@triton.jit
def _partner(col, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that `col` turns with, and whether `col` is the first of the two. Channels from R on have none."""
    if INTERLEAVED:
        first = col % 2 == 0
        other = tl.where(first, col + 1, col - 1)
    else:
        first = col < R // 2
        other = tl.where(first, col + R // 2, col - R // 2)
    return tl.where(col < R, other, col), first


@triton.jit
def load_table(cos_at, sin_at, col, R: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr):
    """What x[i] and its partner are multiplied by, for one token: 1 and 0 where a channel passes through."""
    other, first = _partner(col, R, INTERLEAVED)
    c = tl.load(cos_at + col, col < R, other=1.0, eviction_policy="evict_last").to(tl.float32)
    s = tl.load(sin_at + (other if TRANSPOSE else col), col < R, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return c, tl.where(first != TRANSPOSE, -s, s), other


@triton.jit
def _rotate(x_at, y_at, x_head, y_head, block, heads, c, s, col, other, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS heads of one token. `x_at`, `y_at`: its first channel; `x_head`, `y_head`: strides from head to head."""
    head = block * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    mask = (head < heads) & (col < D)
    x, y = x_at + head * x_head, y_at + head * y_head
    turned = tl.load(x + col, mask, 0.0).to(tl.float32) * c + tl.load(x + other, mask, 0.0).to(tl.float32) * s
    tl.store(y + col, turned.to(y.dtype.element_ty), mask)


@triton.jit
def _single_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, S, H,
    x_b, x_h, x_s, y_b, y_h, y_s, cos_b, cos_s, sin_b, sin_s,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: program (b·S + s, block of heads). Strides are named tensor_dimension."""
    pid = tl.program_id(0).to(tl.int64)
    b, s = pid // S, pid % S
    col = tl.arange(0, BLOCK)[None, :]
    cos_at, sin_at = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
    cos, sin, other = load_table(cos_at, sin_at, col, R, INTERLEAVED, TRANSPOSE)
    _rotate(x_ptr + b * x_b + s * x_s, y_ptr + b * y_b + s * y_s, x_h, y_h, tl.program_id(1), H, cos, sin, col, other, D, ROWS)


@triton.jit
def _pair_kernel(
    q_ptr, k_ptr, yq_ptr, yk_ptr, cos_ptr, sin_ptr, S, H, G,
    q_b, q_h, q_s, k_b, k_h, k_s, yq_b, yq_h, yq_s, yk_b, yk_h, yk_s, cos_b, cos_s, sin_b, sin_s,
    D: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """Some heads of one token, of q in the first programs of axis 1, of k in the others."""
    pid = tl.program_id(0).to(tl.int64)
    b, s = pid // S, pid % S
    col = tl.arange(0, BLOCK)[None, :]
    cos_at, sin_at = cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s
    cos, sin, other = load_table(cos_at, sin_at, col, R, INTERLEAVED, TRANSPOSE)
    block, q_blocks = tl.program_id(1), tl.cdiv(H, ROWS)
    if block < q_blocks:
        _rotate(q_ptr + b * q_b + s * q_s, yq_ptr + b * yq_b + s * yq_s, q_h, yq_h, block, H, cos, sin, col, other, D, ROWS)
    else:
        k_block = block - q_blocks
        _rotate(k_ptr + b * k_b + s * k_s, yk_ptr + b * yk_b + s * yk_s, k_h, yk_h, k_block, G, cos, sin, col, other, D, K_ROWS)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def table_args(cos: torch.Tensor, sin: torch.Tensor, B) -> tuple[list[torch.Tensor], list[int]]:
    """cos, sin with unit stride along R, and their batch and position strides (batch 0 where they have one row for all)."""
    tables = [unit_stride(t).expand(B, -1, -1) for t in (cos, sin)]
    return tables, [t.stride(d) for t in tables for d in (0, 1)]


def _constants(x: torch.Tensor, R: int, interleaved: bool, transpose: bool) -> dict:
    return dict(
        D=x.shape[-1], R=R, BLOCK=padded(x.shape[-1]), ROWS=block_heads(x.shape[1], x.shape[-1]),
        INTERLEAVED=interleaved, TRANSPOSE=transpose, num_warps=NUM_WARPS,
    )  # fmt: skip


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def block_heads(heads: int, D: int) -> int:
    return min(triton.next_power_of_2(heads), max(CHANNELS // padded(D), 1))


def blocks(heads, rows: int):
    return (heads + rows - 1) // rows


def single_triton(x, cos, sin, interleaved: bool, dtype: torch.dtype, backward: bool = False) -> torch.Tensor:
    x = unit_stride(x)
    B, H, S, _ = x.shape
    buffer, out = allocate(x, cos, dtype, backward)
    (cos, sin), table_strides = table_args(cos, sin, B)
    strides = [t.stride(d) for t in (x, out) for d in range(3)]
    options = _constants(x, cos.shape[-1], interleaved, backward)
    launch(_single_kernel)[(B * S, blocks(H, options["ROWS"]))](x, buffer, cos, sin, S, H, *strides, *table_strides, **options)
    return out


def pair_triton(
    q, k, cos, sin, interleaved: bool, q_dtype: torch.dtype, k_dtype: torch.dtype, backward: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = unit_stride(q), unit_stride(k)
    B, H, S, _ = q.shape
    G = k.shape[1]
    (q_buffer, yq), (k_buffer, yk) = allocate(q, cos, q_dtype, backward), allocate(k, cos, k_dtype, backward)
    (cos, sin), table_strides = table_args(cos, sin, B)
    strides = [t.stride(d) for t in (q, k, yq, yk) for d in range(3)]
    options = _constants(q, cos.shape[-1], interleaved, backward)
    options["K_ROWS"] = block_heads(G, q.shape[-1])
    grid = B * S, blocks(H, options["ROWS"]) + blocks(G, options["K_ROWS"])
    launch(_pair_kernel)[grid](q, k, q_buffer, k_buffer, cos, sin, S, H, G, *strides, *table_strides, **options)
    return yq, yk


# ---------------------------------------------------------------- ATen


def single_aten(x, cos, sin, interleaved: bool, dtype: torch.dtype, backward: bool = False) -> torch.Tensor:
    """Stacks nothing: with x viewed as pairs, rotate(x) is a flip whose sign goes to the (small) table of sines."""
    R, D = cos.shape[-1], x.shape[-1]
    wide = compute_dtype(x, cos)
    pairs, axis = ((R // 2, 2), -1) if interleaved else ((2, R // 2), -2)
    c, s = (t.to(wide).unsqueeze(1).unflatten(-1, pairs) for t in (cos, sin))
    s1, s2 = s.unbind(axis)
    s = torch.stack((s2, -s1) if backward else (-s1, s2), axis)
    _, out = allocate(x, cos, dtype, backward)
    x_pairs = x[..., :R].to(wide).unflatten(-1, pairs)
    y = (x_pairs * c + x_pairs.flip(axis) * s).flatten(-2)
    if R < D:
        y = torch.cat((y.to(dtype), x[..., R:].to(dtype)), -1)
    return out.copy_(y)


def pair_aten(q, k, cos, sin, interleaved, q_dtype, k_dtype, backward: bool = False):
    return (
        single_aten(q, cos, sin, interleaved, q_dtype, backward),
        single_aten(k, cos, sin, interleaved, k_dtype, backward),
    )


# ---------------------------------------------------------------- operators


def allocate(x: torch.Tensor, cos: torch.Tensor, dtype: torch.dtype, backward: bool):
    """The output's buffer and the output, which may be a view of it (see Layout above)."""
    if backward:
        buffer = torch.empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype=dtype, device=x.device)
        return buffer, buffer.transpose(1, 2)
    partial = cos.shape[-1] < x.shape[-1]
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format if partial else torch.preserve_format)
    return out, out


def heads_last(cos: torch.Tensor) -> bool:
    """Do these tables go with x [B, S, heads, D]?"""
    return cos.dim() == 4 and cos.shape[1] != 1


def arranged(cos: torch.Tensor, sin: torch.Tensor, *xs: torch.Tensor) -> list[torch.Tensor]:
    """The tables as [B or 1, S, R] and the xs as [B, heads, S, D], after checking that they fit."""
    if heads_last(cos):
        xs = tuple(x.transpose(1, 2) if x.dim() == 4 else x for x in xs)
    head = 2 if heads_last(cos) else 1
    cos, sin = (t.squeeze(head) if t.dim() == 4 else t for t in (cos, sin))
    torch._check(cos.shape == sin.shape, lambda: f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} differ in shape")
    for x in xs:
        torch._check(
            x.dim() == 4 and cos.dim() == 3,
            lambda: (
                "rope takes x [B, heads, S, D] and cos, sin [B or 1, S, R] or [B or 1, 1, S, R], "
                "or x [B, S, heads, D] and cos, sin [B or 1, S, 1, R]"
            ),
        )
        R, D = cos.shape[-1], x.shape[-1]
        torch._check(R % 2 == 0 and 0 < R <= D, lambda: f"the rotary width {R} must be even and at most {D}")  # noqa: B023
        torch._check(x.shape[2] == cos.shape[1], lambda: f"{x.shape[2]} positions, but cos has {cos.shape[1]}")  # noqa: B023
    return [cos, sin, *xs]


def _result_dtype(x: torch.Tensor, cos: torch.Tensor, promote: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, cos.dtype) if promote else x.dtype


pair_for = implementations("sloth::rope", "sloth::rope_backward", triton=pair_triton, aten=pair_aten)
single_for = implementations("sloth::rope_single", "sloth::rope_single_backward", triton=single_triton, aten=single_aten)


@triton_op("sloth::rope", "rope")
def _rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    promote: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    last = heads_last(cos)
    cos, sin, q, k = arranged(cos, sin, q, k)
    yq, yk = pair_for(q, k, cos)(q, k, cos, sin, interleaved, *(dtype or _result_dtype(x, cos, promote) for x in (q, k)))
    return (yq.transpose(1, 2), yk.transpose(1, 2)) if last else (yq, yk)


@triton_op("sloth::rope_backward", "rope")
def _rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    q_dtype: torch.dtype,
    k_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    last = heads_last(cos)
    cos, sin, dq, dk = arranged(cos, sin, dq, dk)
    dq, dk = pair_for(dq, dk, cos)(dq, dk, cos, sin, interleaved, q_dtype, k_dtype, True)
    return (dq.transpose(1, 2), dk.transpose(1, 2)) if last else (dq, dk)


@triton_op("sloth::rope_single", "rope")
def _rope_single(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    promote: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    last = heads_last(cos)
    cos, sin, x = arranged(cos, sin, x)
    y = single_for(x, cos)(x, cos, sin, interleaved, dtype or _result_dtype(x, cos, promote))
    return y.transpose(1, 2) if last else y


@triton_op("sloth::rope_single_backward", "rope")
def _rope_single_backward(
    dy: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, dtype: torch.dtype
) -> torch.Tensor:
    last = heads_last(cos)
    cos, sin, dy = arranged(cos, sin, dy)
    dx = single_for(dy, cos)(dy, cos, sin, interleaved, dtype, True)
    return dx.transpose(1, 2) if last else dx


rope = torch.ops.sloth.rope.default
rope_backward = torch.ops.sloth.rope_backward.default
rope_single = torch.ops.sloth.rope_single.default
rope_single_backward = torch.ops.sloth.rope_single_backward.default


def _setup(ctx, inputs, output):
    q, k, cos, sin, ctx.interleaved, *_ = inputs
    ctx.dtypes = q.dtype, k.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq, dk):
    cos, sin = ctx.saved_tensors
    q_dtype, k_dtype = ctx.dtypes
    need_q, need_k = ctx.needs_input_grad[0] and dq is not None, ctx.needs_input_grad[1] and dk is not None
    if need_q and need_k:
        dq, dk = rope_backward(dq, dk, cos, sin, ctx.interleaved, q_dtype, k_dtype)
    else:
        dq = rope_single_backward(dq, cos, sin, ctx.interleaved, q_dtype) if need_q else None
        dk = rope_single_backward(dk, cos, sin, ctx.interleaved, k_dtype) if need_k else None
    return dq, dk, *[None] * 5


def _setup_single(ctx, inputs, output):
    x, cos, sin, ctx.interleaved, *_ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(cos, sin)


def _backward_single(ctx, dy):
    return rope_single_backward(dy, *ctx.saved_tensors, ctx.interleaved, ctx.dtype), *[None] * 5


_rope.register_autograd(_backward, setup_context=_setup)
_rope_single.register_autograd(_backward_single, setup_context=_setup_single)


# ---------------------------------------------------------------- compiled for every target by the tests


def _compile_case(kernel, R: int, interleaved: bool, transpose: bool, out: str = "*bf16"):
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    constants = dict(D=128, R=R, BLOCK=128, ROWS=8, K_ROWS=8, INTERLEAVED=interleaved, TRANSPOSE=transpose)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in constants}
    signature |= {name: out if name.startswith("y") else "*bf16" for name in pointers}
    return kernel, signature, constants, {"num_warps": NUM_WARPS}


COMPILE = [
    _compile_case(_pair_kernel, 128, False, False),
    _compile_case(_pair_kernel, 96, False, True, out="*fp32"),
    _compile_case(_pair_kernel, 96, True, True),
    _compile_case(_single_kernel, 128, True, False),
    _compile_case(_single_kernel, 64, False, True),
]
