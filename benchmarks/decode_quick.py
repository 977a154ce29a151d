"""What a token takes, in a minute on one GPU: kernels by shape, then two layers of a Llama-3-8B shape, replayed.

    python benchmarks/decode_quick.py [--seconds 58] [--tiles]

Made in memory, nothing is written to disk. Every line says how many seconds it came after the start. Ends by itself, and says
then where it was. us: device time of one call, cold L2; gb_s: bytes of packed weights and scales over it.
--tiles: others too.
"""

import argparse
import faulthandler
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

START = time.perf_counter()


def say(*words: Any) -> None:
    print(f"{time.perf_counter() - START:6.1f}", *words, flush=True)


def kernels(tiles: bool) -> None:
    """Shapes of one layer: q, k and v; o; gate and up; down."""
    import bitsandbytes.functional as B
    import torch
    from measuring import device_us, l2_flush

    from sloth.kernels.linear import linear_4bit_rows as module

    shapes = {"qkv": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "gate_up": (4096, [14336] * 2), "down": (14336, [4096])}
    flush, made = l2_flush(), {}
    for name, (k, sizes) in shapes.items():
        made[name] = []
        for n in sizes:
            w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02
            packed, s = B.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
            a, b = (torch.randn(size, device="cuda", dtype=torch.bfloat16) * 0.02 for size in ((16, k), (n, 16)))
            made[name].append((packed, s.state2.absmax, s.absmax, s.state2.code, s.offset, n, a, b, s))
    say("weights made")

    def run(name: str, m: int, adapted: bool) -> tuple[Callable[[], Any], Any]:
        x = torch.randn(m, shapes[name][0], device="cuda", dtype=torch.bfloat16)
        weights, none = [of[:6] for of in made[name]], [None] * len(made[name])
        a, b = ([of[i] if adapted else None for of in made[name]] for i in (6, 7))
        return lambda: module._triton(x, weights, none, a, b, [1.0] * len(weights), 64, "nf4", x.dtype), x

    def check(name: str, m: int) -> str:
        """Its error beside eager's, of the first layer."""
        call, x = run(name, m, True)
        y, (packed, *_, a, b, state) = call()[0], made[name][0]
        w = B.dequantize_4bit(packed, state)
        exact = x.double() @ w.double().t() + x.double() @ a.double().t() @ b.double().t()
        eager = x @ w.t() + (x @ a.t()) @ b.t()
        ours, theirs = ((t.double() - exact).norm().item() for t in (y, eager))
        return f"error {ours / theirs:.3f} of eager's"

    for m in (1, 8):
        held = [module.ELEMENT] if m == 1 else [module.TENSOR_FEW, module.TENSOR_MANY]
        before = [dict(of) for of in held]
        few, many = [(8, 32, 4, 1), (4, 16, 2, 1), (4, 64, 8, 1)], [(16, 8, 4, 3), (32, 4, 4, 3), (32, 8, 4, 4), (16, 4, 2, 4)]
        for tile in [None, *(few if m == 1 else many)] if tiles else [None]:
            for of in held if tile else ():
                of.update(zip(("BN", "BLOCKS", "num_warps", "num_stages"), tile, strict=True))
            module._constants.cache_clear()
            try:
                found = []
                for name in ("qkv", "gate_up", "down") if tile else shapes:
                    size = sum(n * shapes[name][0] * (0.5 + 1 / 64) for n in shapes[name][1])
                    whole = device_us(run(name, m, True)[0], flush, 9)
                    found.append(f"{name} {whole:.1f} us {size / whole / 1e3:.0f} gb_s")
                say("rows", m, tile or "as they are", "with adapters:", "; ".join(found), "|", check("o", m))
            except Exception as e:
                say("rows", m, tile, type(e).__name__, str(e).split("\n")[0][:300])
        for of, was in zip(held, before, strict=True):
            of.update(was)
        module._constants.cache_clear()


def model_of(layers: int) -> Any:
    """A base in NF4 with adapters, made on the device."""
    import bitsandbytes as bnb
    import torch
    from peft import LoraConfig, get_peft_model
    from qlora import RANK, SHAPES, TARGETS
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        config = LlamaConfig(**SHAPES["8b"] | {"num_hidden_layers": layers, "vocab_size": 32000}, dtype=torch.bfloat16)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in TARGETS:
                of = child.in_features, child.out_features
                four = bnb.nn.Linear4bit(*of, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
                four.weight = bnb.nn.Params4bit(child.weight.data.cpu(), False, quant_type="nf4", compress_statistics=True).cuda()
                setattr(module, name, four)
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=TARGETS, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.01)
    return model.eval()


def steps(layers: int) -> None:
    import torch
    from decode import compared, generate, step_ms
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from sloth import FastLanguageModel
    from sloth.rewriter.backend import listening

    model = model_of(layers)
    model.config.use_cache = True
    say("model made")
    FastLanguageModel.for_inference(model, replay_steps=True)
    with listening() as reports:
        generate(model, 1, 16)
    for r in reports:
        say(
            "compiled",
            dict(Counter(site.variant for site in r.sites)),
            {k: round(v, 1) for k, v in r.seconds.items()},
            r.untouched,
        )
    say("first generate")
    say(compared(model, 1))
    generate(model, 1, 32)

    def timed() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(model, 1, 32)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    say("ms a token with transformers' loop", round(statistics.median(timed() for _ in range(5)) / 32 * 1e3, 3))
    say("ms a step alone", step_ms(model, 1))
    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        generate(model, 1, 6)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60), flush=True)
    say("profiled: 5 steps and a prompt of 128")
    generate(model, 8, 8)
    generate(model, 8, 8)
    say("8 rows: ms a step alone", step_ms(model, 8))


if __name__ == "__main__":
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seconds", type=int, default=58)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--tiles", action="store_true")
    args = made.parse_args()
    faulthandler.dump_traceback_later(args.seconds, exit=True, file=sys.stdout)
    for part in (lambda: kernels(args.tiles), lambda: steps(args.layers)):
        try:
            part()
        except Exception:
            say(traceback.format_exc()[-2500:])
    say("done")
    sys.stdout.flush()
