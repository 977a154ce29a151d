"""One decoder layer of a Llama-3-8B shape on one GPU over growing sequences: what its mask costs, in time and memory.

    python benchmarks/attention.py [--out FILE.json] [--lengths 2048,4096,…] [--batches causal,padded,…]

The layer is transformers' own, random weights in bf16, with the model around it that makes positions and masks; forward and
backward over inputs_embeds, 1 sequence (2 where they are padded). causal: no mask given; padded: an attention_mask, the second
sequence a quarter shorter; packed: position_ids that restart four times; window: Mistral's layer, which sees 1024 tokens back.
Of the same sizes, with attention that transformers spells out: spelled, Llama's own; softcap, Gemma 2's layer; sinks, gpt-oss's
layer without its experts. "eager" is transformers (SDPA where it is not spelled out), "inductor" and "sloth" torch.compile of the
same, "flex" Inductor with FlexAttention, where that is the way to a fast kernel. Peak memory is what is allocated beyond the
weights and inputs. The floor is the arithmetic of the matmuls and of attention where the mask is true, three times the forward
pass's, over the measured rate of a large matmul. The loss is recorded beside: it must be the same for all.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from measuring import device_us, l2_flush, machine, matmul_rate, parse, parser, peak_mib, write
from torch import nn
from transformers import AutoModel, Gemma2Config, GptOssConfig, LlamaConfig, MistralConfig

SIZES = {
    "hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 64, "max_position_embeddings": 131072, "use_cache": False,
}  # fmt: skip
WINDOW = 1024
WIDTH = SIZES["hidden_size"] // SIZES["num_attention_heads"]
FULL = {"layer_types": ["full_attention"], "head_dim": WIDTH}
MODELS = {
    "causal": (LlamaConfig, {}),
    "padded": (LlamaConfig, {}),
    "packed": (LlamaConfig, {}),
    "window": (MistralConfig, {"sliding_window": WINDOW}),
    "spelled": (LlamaConfig, {}),
    "softcap": (Gemma2Config, {**FULL, "query_pre_attn_scalar": WIDTH, "hidden_activation": "silu"}),
    "sinks": (GptOssConfig, {**FULL, "num_local_experts": 1, "num_experts_per_tok": 1}),
}
SPELLED = ("spelled", "softcap", "sinks")
EAGER_UP_TO = 32768  # beyond, a mask of S² and what is made of it fill the GPU


class Nothing(nn.Module):
    """In the place of experts: what they add, and their router's scores."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(x), None


def make(batch: str) -> nn.Module:
    config, more = MODELS[batch]
    with torch.device("cuda"):
        model = AutoModel.from_config(config(**SIZES, **more), dtype=torch.bfloat16)
    if batch == "sinks":
        model.layers[0].mlp = Nothing()
        nn.init.normal_(model.layers[0].self_attn.sinks)
    return model.cuda()


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


def floor_flops(batch: str, tokens: int, pairs: int) -> int:
    H, I = SIZES["hidden_size"], 0 if batch == "sinks" else SIZES["intermediate_size"]
    KV = WIDTH * SIZES["num_key_value_heads"]
    return 3 * (2 * tokens * (2 * H * H + 2 * H * KV + 3 * H * I) + 4 * pairs * H)


def measure(call: Callable[..., Any], given: dict[str, torch.Tensor], leaves: list[torch.Tensor], flush: torch.Tensor) -> dict:
    def step() -> torch.Tensor:
        loss = call(**given).last_hidden_state.float().square().mean()
        torch.autograd.grad(loss, leaves, allow_unused=True)  # a norm in front of experts that add nothing
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
        model = make(batch)
        for S in map(int, args.lengths.split(",")):
            given, pairs = inputs(batch, S)
            given["inputs_embeds"].requires_grad_()
            leaves = [given["inputs_embeds"], *(p for n, p in model.named_parameters() if "layers" in n)]
            for name in ("eager", "inductor", "sloth", *(["flex"] if batch in ("softcap", "sinks") else [])):
                if name in ("eager", "inductor") and S > EAGER_UP_TO:
                    continue
                torch._dynamo.reset()
                model.set_attn_implementation("flex_attention" if name == "flex" else "eager" if batch in SPELLED else "sdpa")
                backend = "inductor" if name == "flex" else name
                call = model if name == "eager" else torch.compile(model, backend=backend, dynamic=False)
                row = {"batch": batch, "tokens": S, "contender": name}
                try:
                    row |= measure(call, given, leaves, flush)
                    tokens = given["inputs_embeds"].shape[0] * S
                    row["floor_fraction"] = floor_flops(batch, tokens, pairs) / rate * 1e3 / row["ms"]
                except Exception as e:  # out of memory is a result too
                    row["error"] = f"{type(e).__name__}: {e}"[:200]
                torch.cuda.empty_cache()
                rows.append(row)
                print(json.dumps(row), flush=True)
                write(results, args.out)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536", help="comma-separated")
    options.add_argument("--batches", default=",".join(MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    args = parse(options)
    if unknown := set(args.batches.split(",")) - set(MODELS):
        options.error(f"unknown: {', '.join(sorted(unknown))}")
    run(args)


if __name__ == "__main__":
    main()
