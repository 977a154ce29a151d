"""Our operators beside eager PyTorch, Inductor and Liger on one GPU: device time in the graph, memory, error against fp64.

    python benchmarks/operators.py [--out benchmarks/results/operators.json] [--rows rms_norm,rope] [--tiny]

Every contender differentiates the same function of the same inputs. "sloth" and "inductor" are torch.compile of the eager
code with that backend, so what is timed is what a model runs. Time is the median of device time between events, launches
hidden behind a sleep of the device and a flush of the L2 before each repetition. Bytes are the fewest that must move (each
input read, each output written once); `copy_fraction` is their rate over the measured rate of a large device-to-device copy.
Peers that are not installed are left out.
"""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from measuring import copy_rate, device_us, l2_flush, machine, optional, parse, parser, peak_mib, write

BF16 = torch.bfloat16
Tensors = list[torch.Tensor]


@dataclass
class Row:
    """One function: `inputs` (leaves), the eager code, and peers' versions of it."""

    name: str
    inputs: Tensors
    eager: Callable[..., Any]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    bytes_forward: int = 0
    bytes_both: int = 0
    check: bool = True  # compare with fp64 (too large otherwise)
    in_place: tuple[str, ...] = ()  # peers that write over their inputs, or compute something else: timed, not compared


# ---------------------------------------------------------------- rows


def randn(*shape: int, grad: bool = True, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_(grad)


def llama_norm(x, w):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rms_norm_rows(T: int, D: int) -> list[Row]:
    out = []
    for name, grad in (("rms_norm dX", False), ("rms_norm dX+dW", True)):
        x, w = randn(T, D), torch.rand(D, device="cuda").to(BF16).requires_grad_(grad)
        peers = {"F.rms_norm": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-5)}
        if liger := optional("liger_kernel.ops.rms_norm"):
            peers["liger"] = lambda x, w, f=liger.LigerRMSNormFunction: f.apply(x, w, 1e-5, 0.0, "llama", False)
            peers["liger in place"] = lambda x, w, f=liger.LigerRMSNormFunction: f.apply(x, w, 1e-5, 0.0, "llama", True)
        out.append(Row(name, [x, w], llama_norm, peers, 2 * nbytes(x), 5 * nbytes(x), in_place=("liger in place",)))
    x, r, w = randn(T, D), randn(T, D), torch.rand(D, device="cuda").to(BF16)

    def add_norm(x, r, w):
        h = x + r
        return h, llama_norm(h, w)

    peers = {}
    if liger := optional("liger_kernel.ops.fused_add_rms_norm"):
        peers["liger"] = lambda x, r, w, f=liger.LigerFusedAddRMSNormFunction: f.apply(x, r, w, 1e-5, 0.0, "llama", False)[::-1]
    out.append(Row("add_rms_norm dX", [x, r, w], add_norm, peers, 4 * nbytes(x), 8 * nbytes(x)))
    return out


def layer_norm_rows(T: int, D: int) -> list[Row]:
    x, w, b = randn(T, D), randn(D), randn(D)
    peers = {}
    if liger := optional("liger_kernel.ops.layer_norm"):
        peers["liger"] = lambda x, w, b, f=liger.LigerLayerNormFunction: f.apply(x, w, b, 1e-5)
    return [
        Row(
            "layer_norm",
            [x, w, b],
            lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b, 1e-5),
            peers,
            2 * nbytes(x),
            5 * nbytes(x),
        )
    ]


def tables(S: int, D: int) -> Tensors:
    """cos and sin [1, S, D]"""
    angle = torch.arange(S, device="cuda")[:, None] / 5e5 ** (torch.arange(0, D, 2, device="cuda") / D)
    angle = torch.cat((angle, angle), -1)[None]
    return [angle.cos().to(BF16), angle.sin().to(BF16)]


def rotate(q, k, cos, sin):
    c, s = cos.unsqueeze(1), sin.unsqueeze(1)

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat((-b, a), -1)

    return q * c + turn(q) * s, k * c + turn(k) * s


def rope_rows(B: int, S: int, H: int, G: int, D: int) -> list[Row]:
    """As in a model: q and k are views of projections [B, S, heads, D], and so is what attention hands back."""
    q, k = randn(B, S, H, D), randn(B, S, G, D)

    def transposed(rotate):
        def call(q, k, cos, sin):
            q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        return call

    peers = {}
    if liger := optional("liger_kernel.transformers.rope"):
        peers["liger"] = transposed(lambda q, k, cos, sin, f=liger.liger_rotary_pos_emb: f(q, k, cos, sin))
    once = nbytes(q) + nbytes(k)
    return [Row("rope", [q, k, *tables(S, D)], transposed(rotate), peers, 2 * once, 4 * once, in_place=("liger",))]


def norm_rope_rows(B: int, S: int, H: int, G: int, D: int) -> list[Row]:
    """Qwen3: the heads of q and k are normalised as the projections give them, then transposed and turned."""
    out, eager = [], norm_rotate(llama_norm)
    apart = torch.compile(eager, backend="sloth", options={"sloth.disable": "norm_rope"}, dynamic=False)
    for name, grad in (("norm_rope dX", False), ("norm_rope dX+dW", True)):
        q, k = randn(B, S, H, D), randn(B, S, G, D)
        weights = [torch.rand(D, device="cuda").to(BF16).requires_grad_(grad) for _ in range(2)]
        once = nbytes(q) + nbytes(k)
        out.append(Row(name, [q, k, *weights, *tables(S, D)], eager, {"sloth, apart": apart}, 2 * once, 5 * once))
    return out


def norm_rotate(norm):
    def call(q, k, wq, wk, cos, sin):
        q, k = rotate(norm(q, wq).transpose(1, 2), norm(k, wk).transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


def attention_rows(B: int, S: int, H: int, G: int, D: int) -> list[Row]:
    """The mask is made in the function, as transformers does; or it is given, and nothing is proven of it."""
    q, k, v = randn(B, S, H, D), randn(B, S, G, D), randn(B, S, G, D)
    lengths = torch.linspace(S, S // 4, B, device="cuda").long()[:, None]
    at = torch.arange(S, device="cuda")[None]
    positions, padding = (at % (S // 4)).expand(B, -1), at < lengths
    below, image = at <= at.mT, (at > S // 4) & (at < S // 2)
    blocks = (below | (image & image.mT)).expand(B, 1, S, S)
    chosen = below & (torch.rand(B, 1, S, S, device="cuda") < 0.1)

    def attend(q, k, v, mask, window=S):
        at = torch.arange(S, device=q.device)
        i, j = at[None, None, :, None], at[None, None, None, :]
        return given(q, k, v, mask & (j <= i) & (j > i - window))

    def given(q, k, v, mask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(B, H, S, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=D**-0.5).transpose(1, 2)

    def windowed(q, k, v, p):
        return attend(q, k, v, torch.ones(B, 1, 1, 1, dtype=torch.bool, device=q.device), S // 4)

    def padded(q, k, v, valid):
        return attend(q, k, v, valid[:, None, None, :])

    def packed(q, k, v, p):
        ids = (p == 0).cumsum(-1)
        return attend(q, k, v, ids[:, None, :, None] == ids[:, None, None, :])

    def causal(q, k, v, _):  # the whole triangle by torch's kernels: the time to stay under
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    peers, sizes = {"flash causal": causal}, (2 * (nbytes(q) + nbytes(k)), 7 * nbytes(q) + 6 * nbytes(k))
    rows = ("window", windowed, positions), ("padding", padded, padding), ("packed", packed, positions)
    rows += ("given blocks", given, blocks), ("given keys", given, chosen)
    return [Row(f"attention {name}", [q, k, v, data], fn, peers, *sizes, in_place=tuple(peers)) for name, fn, data in rows]


def gated_rows(T: int, I: int) -> list[Row]:
    g, u = randn(T, I), randn(T, I)
    peers, geglu = {}, {}
    if liger := optional("liger_kernel.ops.swiglu"):
        peers["liger"] = lambda g, u, f=liger.LigerSiLUMulFunction: f.apply(g.view_as(g), u.view_as(u))
    if liger := optional("liger_kernel.ops.geglu"):
        geglu["liger"] = lambda g, u, f=liger.LigerGELUMulFunction: f.apply(g.view_as(g), u.view_as(u))
    sizes = 3 * nbytes(g), 8 * nbytes(g)
    return [
        Row("swiglu", [g, u], lambda g, u: F.silu(g) * u, peers, *sizes, in_place=("liger",)),
        Row(
            "geglu tanh",
            [randn(T, I), randn(T, I)],
            lambda g, u: F.gelu(g, approximate="tanh") * u,
            geglu,
            *sizes,
            in_place=("liger",),
        ),
        Row("swiglu packed", [randn(T, 2 * I)], lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], {}, *sizes),
    ]


def cross_entropy_rows(T: int, V: int) -> list[Row]:
    logits, target = (torch.randn(T, V, device="cuda") * 1.3).to(BF16).requires_grad_(), torch.randint(0, V, (T,), device="cuda")
    peers = {}
    if liger := optional("liger_kernel.ops.cross_entropy"):
        peers["liger"] = lambda z, y, f=liger.LigerCrossEntropyFunction: f.apply(z.view_as(z), y, None)[0]
    eager = lambda z, y: F.cross_entropy(z.float(), y)  # noqa: E731
    return [
        Row(
            "cross_entropy",
            [logits, target],
            eager,
            peers,
            nbytes(logits),
            3 * nbytes(logits),
            check=V < 40000,
            in_place=("liger",),
        )
    ]


def all_rows(tiny: bool) -> dict[str, Callable[[], list[Row]]]:
    T, D, I, V, B, S = (64, 256, 512, 1000, 2, 32) if tiny else (8192, 4096, 14336, 128256, 4, 2048)
    return {
        "rms_norm": lambda: rms_norm_rows(T, D),
        "layer_norm": lambda: layer_norm_rows(T, D),
        "rope": lambda: rope_rows(B, S, 32, 8, 128),
        "norm_rope": lambda: norm_rope_rows(B, S, 32, 8, 128),
        "attention": lambda: attention_rows(B, S, 32, 8, 128),
        "gated_act": lambda: gated_rows(T, I),
        "cross_entropy": lambda: cross_entropy_rows(T, V),
    }


# ---------------------------------------------------------------- measuring


def measure(row: Row, name: str, fn: Callable[..., Any], flush: torch.Tensor, rate: float, exact: Any) -> dict[str, Any]:
    wanted = [x for x in row.inputs if x.requires_grad]
    upstream: Tensors = []

    def forward():
        y = fn(*row.inputs)
        return list(y) if isinstance(y, tuple | list) else [y]

    def both():
        y = forward()
        return torch.autograd.grad(y, wanted, upstream if y[0].dim() else None)

    start = time.perf_counter()
    torch.manual_seed(1)
    upstream += [torch.randn_like(y) for y in forward()]
    grads = both()
    torch.cuda.synchronize()
    result: dict[str, Any] = {"row": row.name, "contender": name, "first_s": time.perf_counter() - start}
    if exact is not None and name not in row.in_place:
        values, true_grads = exact
        result["error_y"] = max(error(a, b) for a, b in zip(forward(), values, strict=True))
        result["error_grad"] = [error(a, b) for a, b in zip(grads, true_grads, strict=True)]
    del grads
    torch.cuda.empty_cache()
    result["peak_mib"] = peak_mib(both)
    result["forward_us"], result["both_us"] = device_us(forward, flush), device_us(both, flush)
    result["forward_copy_fraction"] = row.bytes_forward / result["forward_us"] * 1e6 / rate
    result["both_copy_fraction"] = row.bytes_both / result["both_us"] * 1e6 / rate
    return result


def truth(row: Row) -> tuple[Tensors, Tensors]:
    """Values and gradients in fp64, for the same upstream gradients."""
    inputs = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in row.inputs]
    with torch.no_grad():
        shapes = row.eager(*row.inputs)
    shapes = list(shapes) if isinstance(shapes, tuple) else [shapes]
    torch.manual_seed(1)
    upstream = [torch.randn_like(y).double() for y in shapes]
    y = EXACT.get(row.name, row.eager)(*inputs)
    y = list(y) if isinstance(y, tuple) else [y]
    grads = torch.autograd.grad(y, [x for x in inputs if x.requires_grad], upstream if y[0].dim() else None)
    return [t.detach() for t in y], list(grads)


def exact_norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


# rows whose eager code casts to fp32 on its own
EXACT = {
    "rms_norm dX": exact_norm,
    "rms_norm dX+dW": exact_norm,
    "norm_rope dX": norm_rotate(exact_norm),
    "norm_rope dX+dW": norm_rotate(exact_norm),
    "add_rms_norm dX": lambda x, r, w: (x + r, exact_norm(x + r, w)),
    "cross_entropy": lambda z, y: F.cross_entropy(z, y),
}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b).norm() / b.norm().clamp_min(1e-300))


def nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def run(wanted: list[str], tiny: bool, commit: str) -> dict[str, Any]:
    flush = l2_flush()
    rate = copy_rate(flush)
    print(f"copy rate {rate / 1e9:.0f} GB/s")
    results: list[dict[str, Any]] = []
    for group, rows in all_rows(tiny).items():
        if wanted and group not in wanted:
            continue
        torch.manual_seed(0)
        for row in rows():
            exact = truth(row) if row.check else None
            contenders = {
                "eager": row.eager,
                "inductor": torch.compile(row.eager, dynamic=False),
                "sloth": torch.compile(row.eager, backend="sloth", dynamic=False),
                **row.peers,
            }
            for name, fn in contenders.items():
                try:
                    results.append(measure(row, name, fn, flush, rate, exact))
                except Exception as e:  # a peer that does not run is a row of its own
                    traceback.print_exc()
                    results.append({"row": row.name, "contender": name, "error": f"{type(e).__name__}: {e}"[:300]})
                print(show(results[-1]), flush=True)
                torch.cuda.empty_cache()
            torch._dynamo.reset()
            del row, exact, contenders
            torch.cuda.empty_cache()
    return {"machine": machine(commit), "copy_gb_s": rate / 1e9, "rows": results}


def show(r: dict[str, Any]) -> str:
    if "error" in r:
        return f"{r['row']:16} {r['contender']:15} {r['error'][:90]}"
    errors = f"{r['error_y']:.2e} {max(r['error_grad']):.2e}" if "error_y" in r else ""
    return (
        f"{r['row']:16} {r['contender']:15} fwd {r['forward_us']:8.1f} us ({r['forward_copy_fraction']:.2f})  "
        f"fwd+bwd {r['both_us']:8.1f} us ({r['both_copy_fraction']:.2f})  peak {r['peak_mib']:7.1f} MiB  {errors}"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--rows",
        default="",
        help="comma-separated groups: rms_norm, layer_norm, rope, norm_rope, attention, gated_act, cross_entropy",
    )
    options.add_argument("--tiny", action="store_true", help="small shapes, to see that it runs")
    args = parse(options)
    write(run([r for r in args.rows.split(",") if r], args.tiny, args.commit), args.out)


if __name__ == "__main__":
    main()
