"""Generating on one GPU: a Llama-3-8B shape in NF4 with adapters that are not merged, greedy, tokens/s by batch.

    python benchmarks/decode.py [--out FILE.json] [--contenders sloth,eager,…] [--batches 1,8] [--new 64]
                                [--weights bf16] [--profile]

The model is that of benchmarks/qlora.py: random weights in NF4 (double-quantised), rank 16 on all seven projections. Prompts have
128 tokens. eager: `generate` as it is; static: with cache_implementation="static" (transformers does not compile quantised
models); sloth: for_inference with replay_steps; unsloth: its own, where it is installed. Each in a process of its own. With
--weights bf16 the model is made of random weights in that dtype; sloth-merged: the same with its adapters merged.

tok_s: new tokens of all rows over the time of a whole `generate`, the best of three; ms_token likewise; first_s: the first
`generate`, with everything that is compiled in it; step_ms: one step alone on the device, without transformers' loop; floor_ms:
weights, adapters and head read once at the measured copy rate; same: how many tokens transformers' own code gives too, of how
many; error: of sloth's logits beside the same model in fp32, over that of the model's own code (eager_error, of their norm).
--profile prints what the kernels of a few tokens take.
"""

import argparse
import copy
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measuring import copy_rate, l2_flush, machine, optional, parse, parser, write
from qlora import RANK, SHAPES, TARGETS, write_checkpoint

CONTENDERS = ("sloth", "eager", "static", "unsloth")
PROMPT, COMPARED = 128, 32
SECONDS = 300  # for one contender
MARK = "decode: "


# ---------------------------------------------------------------- one contender


def model_of(contender: str, folder: str) -> Any:
    """The model with adapters that are not zero, ready to generate. folder: a checkpoint, or the config of a model in bf16."""
    torch.manual_seed(1)
    lora = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": TARGETS, "bias": "none"}
    dense = not list(Path(folder).glob("*.safetensors"))
    if contender in ("sloth", "unsloth") and not dense:
        FastLanguageModel = importlib.import_module(contender).FastLanguageModel
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True)
        model = FastLanguageModel.get_peft_model(model, **lora)
    else:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        if dense:
            with torch.device("cuda"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
        model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
        model.config.use_cache = True
    generator = torch.Generator("cuda").manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator, device="cuda") * 0.01)
    if contender == "unsloth":
        FastLanguageModel.for_inference(model)
    if contender == "sloth-merged":
        model = model.merge_and_unload()
    if contender.startswith("sloth"):
        importlib.import_module("sloth").FastLanguageModel.for_inference(model, replay_steps=True)
    return model.eval()


def generate(model: Any, rows: int, new: int, **more: Any) -> Any:
    ids = torch.randint(4, 900, (rows, PROMPT), generator=torch.Generator().manual_seed(rows)).cuda()
    given = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 3}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **more)


def seconds(fn: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bare(model: Any) -> Any:
    """transformers' model, without PEFT's around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def in_fp32(model: Any) -> Any:
    """The same model with its adapters merged, all of it in fp32."""
    import bitsandbytes.functional as B

    base = bare(model)
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)
    with torch.device("cuda"):
        wide = type(base)(config).float().eval()
    state = {name: p.data.float() for name, p in base.named_parameters() if "base_layer" not in name and "lora_" not in name}
    for name, layer in base.named_modules():
        if hasattr(layer, "base_layer"):
            weight, of = layer.base_layer.weight, copy.copy(getattr(layer.base_layer.weight, "quant_state", None))
            a, b = (p["default"].weight.data.float() for p in (layer.lora_A, layer.lora_B))
            if of is not None:
                of.dtype = torch.float32
            w = weight.data.float() if of is None else B.dequantize_4bit(weight.data, of)
            state[f"{name}.weight"] = w.view(b.shape[0], a.shape[1]) + layer.scaling["default"] * b @ a
    wide.load_state_dict(state, assign=True, strict=False)
    return wide


@torch.no_grad()
def compared(model: Any, rows: int) -> dict[str, Any]:
    """sloth's tokens beside transformers' own, and the error of its logits over that of the model's own code, for its tokens."""
    from sloth import FastLanguageModel

    told = {"return_dict_in_generate": True, "output_logits": True}
    ours = generate(model, rows, COMPARED, **told)
    FastLanguageModel.for_training(model)
    model.eval()
    model.config.use_cache = True
    theirs = generate(model, rows, COMPARED)
    same = ours.sequences[:, PROMPT:] == theirs[:, PROMPT:]
    of = slice(PROMPT, PROMPT + COMPARED - 1)  # the first of the logits are the prompt's
    with torch.compiler.set_stance("force_eager"):
        eager = model(input_ids=ours.sequences).logits[:, of].float()
    exact = in_fp32(model)(input_ids=ours.sequences).logits[:, of]
    errors = [(x - exact).norm(dim=-1).mean().item() for x in (torch.stack(ours.logits[1:], 1).float(), eager)]
    FastLanguageModel.for_inference(model, replay_steps=True)
    found = {"error": round(errors[0] / errors[1], 3), "eager_error": round(errors[1] / exact.norm(dim=-1).mean().item(), 4)}
    return {"same": [int(same.int().cumprod(1).sum()), same.numel()], **found}


def step_ms(model: Any, rows: int) -> float | None:
    """A replay by itself; None where there is none. It writes on in the cache of a prompt that has just been read."""
    from sloth.generation import session

    generate(model, rows, 4)
    decoder = session._decoders.get(bare(model))
    kinds = [] if decoder is None else [k for of in decoder._known.values() for k in of.kinds.values() if k._replay is not None]
    kinds = [k for k in kinds if k._places[0].shape[0] == rows]
    if not kinds:
        return None
    replay, n = kinds[-1]._replay, 20
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        replay()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / n, 3)


def profile(model: Any, rows: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        generate(model, rows, 8)
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=70), flush=True)


def measure(contender: str, folder: str, batches: list[int], new: int, profiled: bool) -> list[dict[str, Any]]:
    if contender == "unsloth":
        import unsloth  # noqa: F401  (before transformers)
    model, more = model_of(contender, folder), {"cache_implementation": "static"} if contender == "static" else {}
    print(f"{contender} is loaded", flush=True)
    found = []
    for rows in batches:
        torch.cuda.reset_peak_memory_stats()
        first = seconds(lambda rows=rows: generate(model, rows, new, **more))
        print(f"{contender}: first tokens of {rows} rows after {first:.1f} s", flush=True)
        generate(model, rows, new, **more)
        best = min(seconds(lambda rows=rows: generate(model, rows, new, **more)) for _ in range(3))
        row: dict[str, Any] = {
            "contender": contender,
            "batch": rows,
            "tok_s": round(rows * new / best, 1),
            "ms_token": round(best / new * 1e3, 3),
            "first_s": round(first, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
        if contender.startswith("sloth"):
            row |= {"step_ms": step_ms(model, rows)}
            if profiled:
                profile(model, rows)
            row |= compared(model, rows)
        found.append(row)
        print(MARK + json.dumps(row), flush=True)
    return found


def write_config(folder: Path, shape: str, layers: int) -> None:
    from transformers import LlamaConfig

    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    LlamaConfig(**sizes, rms_norm_eps=1e-5, pad_token_id=3, dtype=torch.bfloat16).save_pretrained(folder)


def floor_ms(shape: str, layers: int, weights: str) -> float:
    """What every token reads: weights, in 4 bits with their scales, adapters, the head."""
    of = SHAPES[shape]
    H, I, V = of["hidden_size"], of["intermediate_size"], of["vocab_size"]
    KV = H // of["num_attention_heads"] * of["num_key_value_heads"]
    sizes = [(H, H), (KV, H), (KV, H), (H, H), (I, H), (I, H), (H, I)]
    element = {"nf4": 0.5 + 1 / 64, "bf16": 2}[weights]  # bytes
    each = sum(n * k * element + 2 * RANK * (n + k) for n, k in sizes)
    return ((layers or of["num_hidden_layers"]) * each + 2 * V * H) / (copy_rate(l2_flush()) / 1e3)


# ---------------------------------------------------------------- all of them


def run(contender: str, folder: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`measure` in a process of its own, with empty caches. What it measures, when it has; and that it failed, if it did."""
    command = [sys.executable, __file__, "--one", contender, folder, args.batches, str(args.new), str(int(args.profile))]
    said = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        offline = {"HF_HUB_OFFLINE": "1", "UNSLOTH_COMPILE_LOCATION": f"{caches}/unsloth", "TOKENIZERS_PARALLELISM": "false"}
        how = {"env": os.environ | places | offline, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(["timeout", str(SECONDS), *command], **how) as process:
            for line in process.stdout or ():
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
                else:
                    said.append(line)
                    print(line, end="", flush=True)
    if process.returncode:
        yield {"contender": contender, "failed": "".join(said)[-1500:] or f"exit code {process.returncode}"}


def main(args: argparse.Namespace) -> None:
    results: dict[str, Any] = {
        "machine": machine(args.commit),
        "shape": args.shape,
        "weights": args.weights,
        "prompt": PROMPT,
        "new": args.new,
        "runs": [],
    }
    results["floor_ms"] = round(floor_ms(args.shape, args.layers, args.weights), 3)
    print("floor_ms", results["floor_ms"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.weights == "nf4":
            write_checkpoint(Path(folder), args.shape, args.layers)
        else:
            write_config(Path(folder), args.shape, args.layers)
        for contender in args.contenders.split(","):
            if contender == "unsloth" and not optional("unsloth"):
                continue
            for row in run(contender, folder, args):
                results["runs"].append(row)
                print(row, flush=True)
                write(results, args.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        contender, folder, batches, new, profiled = sys.argv[2:]
        measure(contender, folder, [int(b) for b in batches.split(",")], int(new), profiled == "1")
    else:
        made = parser(__doc__)
        made.add_argument("--contenders", default=",".join(CONTENDERS))
        made.add_argument("--batches", default="1,8")
        made.add_argument("--new", type=int, default=64, help="tokens")
        made.add_argument("--profile", action="store_true")
        made.add_argument("--weights", choices=("nf4", "bf16"), default="nf4")
        made.add_argument("--shape", choices=SHAPES, default="8b")
        made.add_argument("--layers", type=int, default=0, help="of another number than the shape's")
        main(parse(made))
