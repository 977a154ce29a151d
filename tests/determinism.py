"""Same seed, same bits: a model trained for some steps, and a digest of its losses and weights.

    python tests/determinism.py [--inner aot_eager] [--strict] [--runs 2]

A line for each run of this process: static and dynamic lengths. --strict: under torch.use_deterministic_algorithms(True).
"""

from __future__ import annotations

import argparse
import hashlib
import os

import torch

STEPS = 3


def model(device: str) -> torch.nn.Module:
    """A small Llama: norms, rotation, grouped attention with padding, gated MLPs, loss; dropout of attention is off, as usual."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = 4 if device == "cuda" else 1  # large enough for several programs to add up one result
    config = LlamaConfig(
        hidden_size=64 * wide, intermediate_size=176 * wide, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1001 * wide, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, torch.bfloat16)


def trained(device: str, dynamic: bool, options: dict) -> str:
    """A digest of the losses and of the weights."""
    torch.compiler.reset()
    net = model(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    compiled = torch.compile(net, backend="sloth", dynamic=dynamic, options=options)
    digest = hashlib.sha256()
    wide = 64 if device == "cuda" else 8
    for step in range(STEPS):
        length = wide * 3 + 5 * step if dynamic else wide * 3
        ids = torch.randint(1, 1000, (3, length), generator=torch.Generator().manual_seed(step)).to(device)
        mask = torch.ones_like(ids)
        mask[1, : length // 3] = 0
        loss = compiled(input_ids=ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digest.update(loss.detach().float().cpu().numpy().tobytes())
    for p in net.parameters():
        digest.update(p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--runs", type=int, default=2)
    given = parser.parse_args()
    if given.strict:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {} if given.inner == "inductor" else {"sloth.inner_backend": given.inner}
    for _ in range(given.runs):
        print("bits", *[trained(device, dynamic, options) for dynamic in (False, True)], flush=True)


if __name__ == "__main__":
    main()
