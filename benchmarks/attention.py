"""One decoder layer of a Llama-3-8B shape on one GPU over growing sequences: what its mask costs, in time and memory.

    python benchmarks/attention.py [--out FILE.json] [--lengths 2048,4096,…] [--batches causal,padded,packed,window]

The layer is transformers' own, random weights in bf16, with the model around it that makes positions and masks; forward and
backward over inputs_embeds, 1 sequence (2 where they are padded). causal: no mask given; padded: an attention_mask, the second
sequence a quarter shorter; packed: position_ids that restart four times; window: Mistral's layer, which sees 1024 tokens back.
"eager" is transformers with SDPA, "inductor" and "sloth" torch.compile of the same. Peak memory is what is allocated beyond the
weights and inputs. The floor is the arithmetic of the matmuls and of attention where the mask is true, three times the forward
pass's, over the measured rate of a large matmul. The loss is recorded beside: it must be the same for all.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from measuring import device_us, l2_flush, machine, matmul_rate, parse, parser, peak_mib, write
from transformers import AutoModel, LlamaConfig, MistralConfig, PreTrainedConfig

SIZES = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 64, "max_position_embeddings": 131072, "use_cache": False,
}  # fmt: skip
WINDOW = 1024
BATCHES = ("causal", "padded", "packed", "window")
EAGER_UP_TO = 32768  # beyond, a mask of S² and what is made of it fill the GPU


def config(batch: str) -> PreTrainedConfig:
    return MistralConfig(**SIZES, sliding_window=WINDOW) if batch == "window" else LlamaConfig(**SIZES)


def inputs(batch: str, S: int) -> tuple[dict[str, torch.Tensor], int]:
    """What the model is called with, and how many pairs of a query and a key see each other."""
    rows = 2 if batch == "padded" else 1
    given = {"inputs_embeds": torch.randn(rows, S, SIZES["hidden_size"], device="cuda", dtype=torch.bfloat16)}
    pairs = S * (S + 1) // 2
    if batch == "padded":
        short = S - S // 4
        given["attention_mask"] = torch.ones(2, S, dtype=torch.long, device="cuda")
        given["attention_mask"][1, short:] = 0
        pairs += short * (short + 1) // 2
    elif batch == "packed":
        given["position_ids"] = torch.arange(S // 4, device="cuda").repeat(4)[None]
        pairs = 4 * (S // 4) * (S // 4 + 1) // 2
    elif batch == "window":
        pairs = sum(min(i + 1, WINDOW) for i in range(S))
    return given, pairs


def floor_flops(tokens: int, pairs: int) -> int:
    H, I, heads = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
    KV = H // heads * SIZES["num_key_value_heads"]
    return 3 * (2 * tokens * (2 * H * H + 2 * H * KV + 3 * H * I) + 4 * pairs * H)


def measure(call: Callable[..., Any], given: dict[str, torch.Tensor], leaves: list[torch.Tensor], flush: torch.Tensor) -> dict:
    def step() -> torch.Tensor:
        loss = call(**given).last_hidden_state.float().square().mean()
        torch.autograd.grad(loss, leaves)
        return loss.detach()

    loss = step().item()
    peak = peak_mib(step)
    return {"ms": device_us(step, flush, 7) / 1e3, "peak_mib": peak, "loss": loss}


def run(args: argparse.Namespace) -> None:
    flush = l2_flush()
    rate = matmul_rate(flush)
    rows: list[dict[str, Any]] = []
    results = {"machine": machine(args.commit), "matmul_tflops": rate / 1e12, "rows": rows}
    for batch in args.batches.split(","):
        torch.manual_seed(0)
        model = AutoModel.from_config(config(batch), dtype=torch.bfloat16).cuda()
        for S in map(int, args.lengths.split(",")):
            given, pairs = inputs(batch, S)
            given["inputs_embeds"].requires_grad_()
            leaves = [given["inputs_embeds"], *(p for n, p in model.named_parameters() if "layers" in n)]
            for name in ("eager", "inductor", "sloth"):
                if name != "sloth" and S > EAGER_UP_TO:
                    continue
                torch._dynamo.reset()
                call = model if name == "eager" else torch.compile(model, backend=name, dynamic=False)
                row = {"batch": batch, "tokens": S, "contender": name}
                try:
                    row |= measure(call, given, leaves, flush)
                    tokens = given["inputs_embeds"].shape[0] * S
                    row["floor_fraction"] = floor_flops(tokens, pairs) / rate * 1e3 / row["ms"]
                except Exception as e:  # out of memory is a result too
                    row["error"] = f"{type(e).__name__}: {e}"[:200]
                torch.cuda.empty_cache()
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(results, args.out)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536", help="comma-separated")
    options.add_argument("--batches", default=",".join(BATCHES), help=f"comma-separated, of {', '.join(BATCHES)}")
    args = parse(options)
    if unknown := set(args.batches.split(",")) - set(BATCHES):
        options.error(f"unknown: {', '.join(sorted(unknown))}")
    run(args)


if __name__ == "__main__":
    main()
