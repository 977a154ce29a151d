"""Linear layers with low-rank adapters (Hu et al., "LoRA", 2021), several at once that read the same x:

    y_i = x W_iᵀ + b_i + s_i (x_i A_iᵀ) B_iᵀ          x_i = x, or what the adapter reads instead (x after dropout, x in fp32)

Shapes   x [..., K], W_i [N_i, K] frozen, b_i [N_i] or None, A_i [r_i, K] and B_i [N_i, r_i] or None (no adapter), y_i [..., N_i].
Dtypes   W_i as x; adapters in a dtype of their own (PEFT keeps them in fp32 over a bf16 base); y_i in `dtype`, by default x's.

Backward, with g_i = ∂L/∂y_i, t_i = x_i A_iᵀ [M, r] (all that is saved beside the inputs) and u_i = s_i g_i B_i [M, r]:
    ∂L/∂t_i = s_i g_i B_i = u_i       dB_i = s_i g_iᵀ t_i       dA_i = u_iᵀ x_i       db_i = Σ_rows g_i
    dx   = Σ_i g_i W_i + Σ_{x_i = x} u_i A_i                    dx_i = u_i A_i  otherwise
W_i gets no gradient: it is frozen. B Aᵀ [N, K] is never formed: all adapter products are rank r.

Order    where dtypes agree, a sum of products is one buffer, thin products first (gemm.py): y = s t Bᵀ, then += x Wᵀ.
         Adapters that read x itself are one product: [A_1; A_2; …] x, and x is read once for all of them, forward and backward.
         On a GPU narrow layers that read x are one product too (gemm_columns.py): [y_1, y_2, …] = s t diag(B_1ᵀ, B_2ᵀ, …)
         + x [W_1; W_2; …]ᵀ. Of wide ones, each y_i is memory of its own, which can be let go or written over by itself, unless
         whoever reads them takes them side by side (`side_by_side`: gate and up): then they are one result, [..., Σ N_i].
Bytes    over the products x Wᵀ and g W: x, y, g and dx once or twice each; the floor is that of the two matmuls.
"""

from itertools import compress

import torch
from torch import Tensor

from sloth.kernels.common.launch import compiling, compute_dtype, triton_op, use_triton, without_autocast
from sloth.kernels.common.row_reduction import raise_on_double_backward
from sloth.kernels.linear.gemm import NARROW, as_matrix, sum_of_products
from sloth.kernels.linear.gemm_columns import products_in_columns
from sloth.kernels.linear.gemm_rows import product_in_rows
from sloth.kernels.linear.lora_grad_b import MAX_RANK, lora_grad_b


def _shared(lora_input: list, a: list) -> list[int]:
    """Which adapters read x itself."""
    return [i for i, (own, ai) in enumerate(zip(lora_input, a, strict=True)) if ai is not None and own is None]


def _thirds(places: list[int]) -> tuple[list[int], ...]:
    """For each layer: has it a bias, an adapter input of its own, an adapter?"""
    n = len(places) // 3
    return tuple(places[i * n : (i + 1) * n] for i in range(3))


def _spread(values: list, places: list[int]) -> list:
    """One element for each layer, None where it has none: lists with gaps have no gradients in torch.library."""
    there = iter(values)
    return [next(there) if place else None for place in places]


def _split(joined: Tensor, parts: list[Tensor], dim: int) -> list[Tensor]:
    return list(joined.split([p.shape[0] for p in parts], dim))


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _down(x: Tensor, lora_input: list, a: list) -> list[Tensor]:
    """x_i A_iᵀ: one product for all that share x, then the others."""
    own = [a[i] for i in _shared(lora_input, a)]
    joined = [as_matrix(x).to(own[0].dtype) @ _joined(own).t()] if own else []
    return joined + [as_matrix(xi).to(ai.dtype) @ ai.t() for xi, ai in zip(lora_input, a, strict=True) if xi is not None]


def _each(down: list[Tensor], lora_input: list, a: list) -> list[Tensor | None]:
    """t_i of each layer, of what `_down` gave."""
    together = _shared(lora_input, a)
    parts = iter(_split(down[0], [a[i] for i in together], 1) if together else [])
    others = iter(down[1:] if together else down)
    return [None if ai is None else next(parts) if xi is None else next(others) for xi, ai in zip(lora_input, a, strict=True)]


def can_be_one(x, bias: list, lora_input: list, b: list, scale: list[float], dtype: torch.dtype) -> bool:
    """May layers of these operands, or with these descriptions, be one product?"""
    return (
        len(b) > 1
        and all(bi is None and own is None for bi, own in zip(bias, lora_input, strict=True))
        and all(up is not None and up.dtype == x.dtype == dtype for up in b)
        and all(s == scale[0] for s in scale)
        and sum(up.shape[1] for up in b) <= MAX_RANK
    )


def _in_columns(x, weight, bias, lora_input, b, scale, dtype) -> bool:
    """Are these layers one product? Only in a graph that is compiled: results of an operator share no memory."""
    return (
        can_be_one(x, bias, lora_input, b, scale, dtype)
        and sum(w.shape[0] for w in weight) <= NARROW * x.shape[-1]
        and use_triton(x)
        and compiling()
    )


def _diagonal(b: list[Tensor]) -> Tensor:
    """[Σ N_i, Σ R_i], zero but for each B_i in rows and columns of its own."""
    total, before, rows = sum(up.shape[1] for up in b), 0, []
    for up in b:
        rows.append(torch.nn.functional.pad(up, (before, total - before - up.shape[1])))
        before += up.shape[1]
    return torch.cat(rows)


def _check(x, weight, bias, lora_input, a, b, scale) -> None:
    lengths = {len(values) for values in (weight, bias, lora_input, a, b, scale)}
    torch._check(lengths == {len(weight)} and len(weight) > 0, lambda: "lora_linear: every list needs an element for each layer")
    for w, ai, bi in zip(weight, a, b, strict=True):
        told = f"x {x.dtype} {list(x.shape)}, weight {w.dtype} {list(w.shape)}"
        torch._check(w.dim() == 2 and w.shape[1] == x.shape[-1] and w.dtype == x.dtype, lambda told=told: f"lora_linear: {told}")
        if ai is not None:
            told = f"{told}, A {ai.dtype} {list(ai.shape)}, B {bi.dtype} {list(bi.shape)}"
            fits = ai.shape[1] == w.shape[1] and bi.shape == (w.shape[0], ai.shape[0]) and ai.dtype == bi.dtype
            torch._check(fits, lambda told=told: f"lora_linear: {told}")


@triton_op("sloth::lora_linear_forward", "lora")
def _lora_linear_forward(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    lora_input: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    scale: list[float],
    places: list[int],
    dtype: torch.dtype,
    side_by_side: bool,
) -> list[Tensor]:
    """[y_1, …, y_n], or all in one, and then what `_down` gives. Lists hold what there is; `places` tells of which layer
    (`_spread`).
    """
    with_bias, with_lora_input, with_adapter = _thirds(places)
    bias, lora_input = _spread(bias, with_bias), _spread(lora_input, with_lora_input)
    a, b = _spread(a, with_adapter), _spread(b, with_adapter)
    x2, down, out = as_matrix(x), _down(x, lora_input, a), []
    if side_by_side or _in_columns(x, weight, bias, lora_input, b, scale, dtype):
        y = products_in_columns(down[0], _diagonal(b).t(), x2, [w.t() for w in weight], scale[0])
        widths = [w.shape[0] for w in weight]
        parts = [y] if side_by_side else y.unsafe_split_with_sizes(widths, 1)  # as `_unsafe_view`, below
        return [torch.ops.aten._unsafe_view(yi, [*x.shape[:-1], yi.shape[1]]) for yi in parts] + down
    for w, bi, ti, up, s in zip(weight, bias, _each(down, lora_input, a), b, scale, strict=True):
        if ti is None:
            y = torch.nn.functional.linear(x2, w, bi).to(dtype)
        elif x.dtype == up.dtype == dtype and (bi is None or bi.dtype == dtype):
            y = sum_of_products([ti, x2], [up.t(), w.t()], [s, 1.0], bi)
        else:
            wide = compute_dtype(x, up)
            y = (torch.nn.functional.linear(x2, w, bi).to(wide) + (ti @ up.t()).to(wide) * s).to(dtype)
        out.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], w.shape[0]]))  # no view, or it could not be written in place
    return out + down


@triton_op("sloth::lora_linear_backward", "lora")
def _lora_linear_backward(
    g: list[Tensor],
    x: Tensor,
    weight: list[Tensor],
    lora_input: list[Tensor],
    a: list[Tensor],
    b: list[Tensor],
    down: list[Tensor],
    scale: list[float],
    places: list[int],
    need_x: bool,
    need_lora_input: list[bool],
    need_a: list[bool],
    need_b: list[bool],
) -> list[Tensor]:
    """dx, then dx_i, dA_i and dB_i, each only if it is needed."""
    _, with_lora_input, with_adapter = _thirds(places)
    lora_input, need_lora_input = _spread(lora_input, with_lora_input), _spread(need_lora_input, with_lora_input)
    a, b, need_a, need_b = (_spread(values, with_adapter) for values in (a, b, need_a, need_b))
    g2 = [as_matrix(gi) for gi in g]
    if len(g2) < len(weight):  # side by side
        g2 = list(g2[0].split([w.shape[0] for w in weight], 1))
    together, own = _shared(lora_input, a), [i for i, xi in enumerate(lora_input) if xi is not None]
    t = ([down[0]] if together else []) + down[len(down) - len(own) :]
    u, dlora_input, da, db = None, {}, {}, {}
    for layers, ti in zip(([together] if together else []) + [[i] for i in own], t, strict=True):
        reads = x if layers is together else lora_input[layers[0]]
        need_input = need_x if layers is together else need_lora_input[layers[0]]
        read_by = [i for i in layers if need_input or need_a[i]]
        ui, dbi = _up_gradients(g2, b, ti, scale, layers, read_by, need_b)
        db.update(dbi)
        if of_a := [i for i in read_by if need_a[i]]:
            # Before dx: x may be let go before the weights are made again for it.
            da.update(zip(of_a, _down_gradients(reads, _columns(ui, a, read_by, of_a), [a[i] for i in of_a]), strict=True))
        if layers is together:
            u = ui
        elif need_input:
            dlora_input[layers[0]] = (ui @ a[layers[0]]).to(reads.dtype).view(reads.shape)
    dx = [_dx(g2, x, weight, u, [a[i] for i in together])] if need_x else []
    return [*dx, *(of[i] for of in (dlora_input, da, db) for i in sorted(of))]


def _up_gradients(g, b, t: Tensor, scale, layers: list[int], read_by: list[int], need_b) -> tuple[Tensor | None, dict]:
    """u of those layers whose is read, side by side, and dB_i. t is of all layers."""
    pick = lambda values: [values[i] for i in layers]  # noqa: E731
    if read_by == layers and all(need_b[i] for i in layers):
        u, *db = lora_grad_b(pick(g), pick(b), t, pick(scale))
        return u, dict(zip(layers, db, strict=True))
    parts = dict(zip(layers, _split(t, [b[i].t() for i in layers], 1), strict=True))
    u = [sum_of_products([g[i].to(b[i].dtype)], [b[i]], [scale[i]]) for i in read_by]
    db = {i: sum_of_products([g[i].to(b[i].dtype).t()], [parts[i]], [scale[i]]) for i in layers if need_b[i]}
    return _joined(u, 1) if u else None, db


def _columns(u: Tensor, a: list, layers: list[int], wanted: list[int]) -> Tensor:
    """u of the wanted ones, of all these layers'."""
    if wanted == layers:
        return u
    each = dict(zip(layers, _split(u, [a[i] for i in layers], 1), strict=True))
    return _joined([each[i] for i in wanted], 1)


def _down_gradients(x: Tensor, u: Tensor, a: list[Tensor]) -> list[Tensor]:
    """dA_i = u_iᵀ x, in one product."""
    return product_in_rows(u.t(), as_matrix(x).to(u.dtype), [ai.shape[0] for ai in a])


def _dx(g: list[Tensor], x: Tensor, weight: list[Tensor], u: Tensor | None, a: list[Tensor]) -> Tensor:
    """Σ u_i A_i + Σ g_i W_i."""
    big = [gi.to(x.dtype) for gi in g], weight
    if u is None:
        return sum_of_products(*big, [1.0] * len(g)).view(x.shape)
    joined = _joined(a)
    if joined.dtype == x.dtype:
        return sum_of_products([u, *big[0]], [joined, *big[1]], [1.0] * (1 + len(g))).view(x.shape)
    wide = compute_dtype(x, joined)
    dx = sum_of_products(*big, [1.0] * len(g)).to(wide) + (u @ joined).to(wide)
    return dx.to(x.dtype).view(x.shape)


def _setup(ctx, inputs, output):
    x, weight, bias, lora_input, a, b, ctx.scale, ctx.places, _, side_by_side = inputs
    ctx.results = 1 if side_by_side else len(weight)
    ctx.lengths = [len(values) for values in (weight, bias, lora_input, a, b)]
    ctx.save_for_backward(x, *weight, *lora_input, *a, *b, *output[ctx.results :])
    ctx.bias_dtypes = [bi.dtype for bi in bias]
    ctx.mark_non_differentiable(*output[ctx.results :])
    ctx.set_materialize_grads(False)


def _vjp(ctx, grads):
    n, _, n_lora_input, n_a, _ = ctx.lengths
    saved = iter(ctx.saved_tensors)
    take = lambda k: [next(saved) for _ in range(k)]  # noqa: E731
    (x,), weight, lora_input, a, b = take(1), *map(take, (n, n_lora_input, n_a, n_a))
    used = [d is not None for d in grads[: ctx.results]]
    widths = [w.shape[0] for w in weight] if ctx.results == n else [sum(w.shape[0] for w in weight)]
    g = [x.new_zeros(*x.shape[:-1], width) if d is None else d for d, width in zip(grads, widths, strict=False)]
    used *= n // ctx.results
    with_bias, with_lora_input, with_adapter = _thirds(ctx.places)

    def need(argument: int, places: list[int]) -> list[bool]:
        """Which of a list need a gradient; what belongs to an output that nobody used has none."""
        return [w and u for w, u in zip(ctx.needs_input_grad[argument], compress(used, places), strict=True)]

    needs = [bool(ctx.needs_input_grad[0])], need(3, with_lora_input), need(4, with_adapter), need(5, with_adapter)
    found = iter(torch.ops.sloth.lora_linear_backward(
        g, x, weight, lora_input, a, b, list(saved), ctx.scale, ctx.places, needs[0][0], *needs[1:]
    ))  # fmt: skip
    (dx,), dxl, da, db = ([next(found) if wanted else None for wanted in each] for each in needs)
    rows = zip(compress(g, with_bias), ctx.bias_dtypes, need(2, with_bias), strict=True)
    dbias = [as_matrix(gi).sum(0, dtype=dtype) if wanted else None for gi, dtype, wanted in rows]
    return dx, [None] * n, dbias, dxl, da, db, None, None, None, None


torch.library.register_autograd("sloth::lora_linear_forward", _vjp, setup_context=_setup)
torch.library.register_autograd("sloth::lora_linear_backward", raise_on_double_backward)

torch.library.define(
    "sloth::lora_linear",
    "(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor?[] lora_input, Tensor?[] a, Tensor?[] b, float[] scale,"
    " ScalarType? dtype=None, bool side_by_side=False) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("sloth::lora_linear", "CompositeImplicitAutograd")
def lora_linear_composite(x, weight, bias, lora_input, a, b, scale, dtype=None, side_by_side=False):
    _check(x, weight, bias, lora_input, a, b, scale)
    if side_by_side and not can_be_one(x, bias, lora_input, b, scale, dtype or x.dtype):
        raise ValueError(
            "lora_linear: side by side are layers without bias that read x, of one dtype and scale, and of small rank"
        )
    places = [int(v is not None) for values in (bias, lora_input, a) for v in values]
    own = ([v for v in values if v is not None] for values in (bias, lora_input, a, b))
    with without_autocast(x):
        found = torch.ops.sloth.lora_linear_forward(x, weight, *own, scale, places, dtype or x.dtype, side_by_side)
    return found[: 1 if side_by_side else len(weight)]


lora_linear = torch.ops.sloth.lora_linear.default
"""lora_linear(x, weight, bias, lora_input, a, b: lists, scale: list, dtype=None, side_by_side=False) -> [y_i]

side_by_side: of one tensor, [y_1, y_2, …].
"""
