"""Head and loss of a language model on one GPU, forward and backward, beside peers: device time and peak memory.

    python benchmarks/loss.py [--out FILE.json] [--tokens 8192] [--hidden 4096] [--vocabulary 128256]

Hidden states and head in bf16, labels random. "frozen": gradients of the hidden states alone, as with adapters; "trained": of the
head too. "sloth" and "inductor" are torch.compile of the same eager code; sloth's rows with a budget set
`sloth.linear_cross_entropy.budget`. Peak memory is what is allocated beyond the inputs, their gradients included. The floor is
the arithmetic of the matmuls, two (frozen) or three, over the measured rate of a large one. The loss and the norm of every
gradient are recorded beside. Peers that are not installed are left out.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import device_us, l2_flush, machine, matmul_rate, optional, parse, parser, peak_mib, write

MIB = 2**20


def eager(h, w, y):
    return F.cross_entropy(F.linear(h, w).float(), y)


def compiled(backend: str, **options: Any) -> Callable[..., torch.Tensor]:
    return torch.compile(eager, backend=backend, options=options or None, dynamic=False)


def contenders() -> dict[str, Callable[..., torch.Tensor]]:
    found = {
        "sloth": compiled("sloth"),
        "sloth, 80 MiB": compiled("sloth", **{"sloth.linear_cross_entropy.budget": 80 * MIB}),
        "sloth, 320 MiB": compiled("sloth", **{"sloth.linear_cross_entropy.budget": 320 * MIB}),
        "inductor": compiled("inductor"),
        "eager": eager,
    }
    if liger := optional("liger_kernel.ops.fused_linear_cross_entropy"):
        found["liger"] = lambda h, w, y, f=liger.LigerFusedLinearCrossEntropyFunction: f.apply(h, w, y)[0]
    if cce := optional("cut_cross_entropy"):
        found["cut cross-entropy"] = lambda h, w, y: cce.linear_cross_entropy(h, w, y)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda h, w, y: F.linear_cross_entropy(h, w, y)
    return found


def measure(fn: Callable[..., torch.Tensor], h, w, y, flush: torch.Tensor) -> dict[str, Any]:
    """Device time of forward + backward, and what is allocated beyond the inputs at the most."""
    wanted = [t for t in (h, w) if t.requires_grad]
    both = lambda: torch.autograd.grad(fn(h, w, y), wanted)  # noqa: E731
    norms = [d.float().norm().item() for d in both()]
    peak = peak_mib(both)
    with torch.no_grad():
        loss = fn(h, w, y).item()
    return {"ms": device_us(both, flush, 11) / 1e3, "peak_mib": peak, "loss": loss, "gradient_norms": norms}


def run(args: argparse.Namespace) -> dict[str, Any]:
    N, H, V = args.tokens, args.hidden, args.vocabulary
    flush = l2_flush()
    rate = matmul_rate(flush)
    torch.manual_seed(0)
    h = torch.randn(N, H, device="cuda").to(torch.bfloat16).requires_grad_()
    w = (torch.randn(V, H, device="cuda") * 0.02).to(torch.bfloat16)
    y = torch.randint(0, V, (N,), device="cuda")
    rows = []
    for head in ("frozen", "trained"):
        w = w.detach().requires_grad_(head == "trained")
        floor = (2 + (head == "trained")) * 2 * N * H * V / rate * 1e3
        for name, fn in contenders().items():
            torch._dynamo.reset()
            try:
                row = {"head": head, "contender": name, **measure(fn, h, w, y, flush)}
                row["floor_fraction"] = floor / row["ms"]
            except Exception as e:  # a peer's failure is a result too
                row = {"head": head, "contender": name, "error": f"{type(e).__name__}: {e}"[:300]}
            torch.cuda.empty_cache()
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {
        "machine": machine(args.commit),
        "matmul_tflops": rate / 1e12,
        "tokens": N,
        "hidden": H,
        "vocabulary": V,
        "rows": rows,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--vocabulary", type=int, default=128256)
    args = parse(options)
    write(run(args), args.out)


if __name__ == "__main__":
    main()
