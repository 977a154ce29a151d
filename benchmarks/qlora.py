"""QLoRA steps of a Llama-3-8B shape on one GPU, beside peers: time, tokens/s, peak memory, first step, fraction of the floor.

    python benchmarks/qlora.py [--out FILE.json] [--contenders sloth,eager,…] [--workloads W1,W2] [--projection] [--together]

The model has random weights in NF4 (double-quantised), rank 16 on all seven projections, adapters in bf16, fused AdamW; it is
written once as a checkpoint to a temporary folder, and every contender trains it in a process of its own on the same batches
(labels = inputs). W1: 2 x 2048 tokens with checkpointing; W2: the same without; W4: 1 x 16384 with.
ms: a step that is waited for, by events; in_a_row_ms: where only the last is waited for; host_ms: until the host has started all.
The floor is the arithmetic of the matmuls and of causal attention over the measured rate of a large bf16 matmul.
One after the other; with `--together` all load and compile side by side, each workload on a GPU of its own where there are
several, and then wait for their turn: first steps are slower then, steps are timed on an idle host.
`--projection` times one layer alone (x [4096, 4096] to 14336), and its dequantisation. Peers that are not installed are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import device_us, l2_flush, machine, matmul_rate, optional, parse, parser, write

SHAPES = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256},
    "llama2-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                  "intermediate_size": 11008, "vocab_size": 32000},
    "mistral-7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                   "intermediate_size": 14336, "vocab_size": 32000},
    "codellama-34b": {"hidden_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8,
                      "intermediate_size": 22016, "vocab_size": 32000},
    "tiny": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 512, "vocab_size": 1024},
}  # fmt: skip
WORKLOADS = {"W1": (2, 2048, True), "W2": (2, 2048, False), "W4": (1, 16384, True)}  # batch, sequence, checkpointing
CONTENDERS = ("sloth", "eager", "inductor", "liger", "unsloth")
REGIONS = "sloth-regions"  # each layer by itself, through accelerate: if asked for
GRAPHS = "sloth-graphs"  # replayed as CUDA graphs, mode="reduce-overhead": if asked for
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, BLOCK = 16, 64


# ---------------------------------------------------------------- the model


def write_checkpoint(folder: Path, shape: str, layers: int) -> None:
    """A random Llama in the format that transformers reads NF4 models from."""
    import bitsandbytes.functional as B
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(
        **sizes, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=500000.0, pad_token_id=3, dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": ["lm_head", "score"],
    }  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator("cuda").manual_seed(0)
    weights: dict[str, torch.Tensor] = {}

    def random(*size: int) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device="cuda") * 0.02).to(torch.bfloat16)

    def linear(name: str, rows: int, columns: int) -> None:
        packed, state = B.quantize_4bit(random(rows, columns), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        weights[name] = packed.cpu()
        weights.update({f"{name}.{k}": v.cpu().contiguous() for k, v in state.as_dict(packed=True).items()})

    H, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    KV = H // config.num_attention_heads * config.num_key_value_heads
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        for name, rows in (("q", H), ("k", KV), ("v", KV), ("o", H)):
            linear(f"{at}self_attn.{name}_proj.weight", rows, H)
        for name, rows, columns in (("gate", I, H), ("up", I, H), ("down", H, I)):
            linear(f"{at}mlp.{name}_proj.weight", rows, columns)
        for name in ("input", "post_attention"):
            weights[f"{at}{name}_layernorm.weight"] = torch.ones(H, dtype=torch.bfloat16)
    weights["model.norm.weight"] = torch.ones(H, dtype=torch.bfloat16)
    weights["model.embed_tokens.weight"], weights["lm_head.weight"] = random(V, H).cpu(), random(V, H).cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"t{i}": i for i in range(4, 64)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>", bos_token="<s>",
        eos_token="</s>", pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip


def load(contender: str, folder: str, checkpointing: bool, longest: int) -> torch.nn.Module:
    """The model with fresh adapters, as a user of the contender would set it up."""
    torch.manual_seed(1)
    if contender == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            model_name=folder, max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True
        )
        return FastLanguageModel.get_peft_model(
            model, r=RANK, target_modules=TARGETS, lora_alpha=RANK, lora_dropout=0, bias="none",
            use_gradient_checkpointing=checkpointing,
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if contender == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
    model.config.use_cache = False
    for p in model.parameters():
        p.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


# ---------------------------------------------------------------- one contender


def floor_flops(config: Any, adapters: int, batch: int, sequence: int, checkpointing: bool) -> int:
    """Matmuls and causal attention that a step cannot do without: no weight gradients of the base, one more forward pass of the
    layers where they are checkpointed.
    """
    H, I, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    KV = H // config.num_attention_heads * config.num_key_value_heads
    base = layers * (2 * H * H + 2 * H * KV + 3 * H * I)
    again = int(checkpointing)
    attention = layers * 2 * batch * sequence * sequence * H
    per_token = (4 + 2 * again) * base + 4 * H * config.vocab_size + (6 + 2 * again) * adapters
    return batch * sequence * per_token + attention * (3 + again)


def train(contender: str, workload: str, folder: str, steps: int, profile: str, turn: Path | None) -> dict[str, Any]:
    """Steps of one contender on one workload, in this process; timed once the file `turn` is there."""
    batch, sequence, checkpointing = WORKLOADS[workload]
    model = load(contender, folder, checkpointing, sequence)
    model.train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4, weight_decay=0.0, fused=True)
    called = torch.compile(model, backend=contender) if contender in ("sloth", "inductor") else model
    if contender == GRAPHS:
        called = torch.compile(model, backend="sloth", mode="reduce-overhead")
    if contender == REGIONS:
        from accelerate.utils import compile_regions

        called = compile_regions(model, backend="sloth")
    generator = torch.Generator().manual_seed(1234)
    data = [torch.randint(4, model.config.vocab_size, (batch, sequence), generator=generator).cuda() for _ in range(4)]
    result: dict[str, Any] = {"workload": workload, "contender": contender, "trainable": sum(p.numel() for p in adapters)}

    def step(i: int) -> torch.Tensor:
        x = data[i % len(data)]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=contender == "unsloth"):
            loss = called(input_ids=x, labels=x).loss
        loss.backward()
        if i == 0:
            result["grad_norm"] = float(torch.nn.utils.get_total_norm([p.grad for p in adapters if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    start = time.perf_counter()
    result["loss"] = float(step(0))
    torch.cuda.synchronize()
    result["first_step_s"] = time.perf_counter() - start
    for i in range(1, 4):
        step(i)
    torch.cuda.synchronize()
    if turn:
        torch.cuda.empty_cache()
        turn.with_suffix(".ready").touch()
        while not turn.exists():
            time.sleep(0.05)
        step(4)
        torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, host = [], []
    for i in range(steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start = time.perf_counter()
        begin.record()
        step(i)
        end.record()
        host.append((time.perf_counter() - start) * 1e3)
        end.synchronize()
        times.append(begin.elapsed_time(end))
    start = time.perf_counter()
    for i in range(steps):
        step(i)
    torch.cuda.synchronize()
    in_a_row = (time.perf_counter() - start) / steps * 1e3
    flops = floor_flops(model.config, result["trainable"], batch, sequence, checkpointing)
    result |= {
        "ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "flops": flops,
        "in_a_row_ms": in_a_row, "host_ms": statistics.median(host),
        "tokens_s": batch * sequence / statistics.median(times) * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "graphs": torch._dynamo.utils.counters["stats"].get("unique_graphs", 0),
    }  # fmt: skip
    if profile:
        result["device_ms"] = profiled(step, Path(profile) / f"{workload}_{contender}.txt")
    return result


def profiled(step: Callable[[int], Any], file: Path) -> float:
    """Device milliseconds of one step; its kernels, longest first, go to `file`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        step(1)
        torch.cuda.synchronize()
    kernels = sorted((e for e in seen.key_averages() if e.self_device_time_total), key=lambda e: -e.self_device_time_total)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{e.self_device_time_total:10.0f} us x{e.count:5d}  {e.key[:140]}\n" for e in kernels[:80]))
    return sum(e.self_device_time_total for e in kernels) / 1e3


# ---------------------------------------------------------------- one projection


def projection(flush: torch.Tensor) -> list[dict[str, Any]]:
    """x [4096, 4096] → 14336 with rank 16: forward and backward, device time; and the dequantisation of its weight."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as B

    from sloth.kernels.linear.dequantize_4bit import dequantize_4bit

    torch.manual_seed(0)
    M, K, N = 4096, 4096, 14336
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    packed, state = B.quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    arguments = (packed, state.state2.absmax, state.absmax, state.state2.code, state.offset, BLOCK, "nf4", [N, K], torch.bfloat16)
    ours, theirs = dequantize_4bit(*arguments), B.dequantize_4bit(packed, state)
    rows = [
        {"row": "dequantize 14336 x 4096", "contender": "sloth", "us": device_us(lambda: dequantize_4bit(*arguments), flush),
         "bit_exact": torch.equal(ours, theirs)},
        {"row": "dequantize 14336 x 4096", "contender": "bitsandbytes",
         "us": device_us(lambda: B.dequantize_4bit(packed, state), flush)},
    ]  # fmt: skip
    x = torch.randn(1, M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    a = torch.randn(RANK, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(N, RANK, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(1, M, N, device="cuda", dtype=torch.bfloat16)

    def peft(x, a, b):
        return bnb.matmul_4bit(x, packed, quant_state=state) + F.linear(F.linear(x, a), b) * 0.5

    def matmuls(x, a, b):
        return torch.mm(x[0], theirs.t()), torch.mm(g[0], theirs)

    contenders = {
        "sloth": torch.compile(peft, backend="sloth", dynamic=False),
        "peft eager": peft,
        "inductor": torch.compile(peft, dynamic=False),
    }

    def measured(name: str, fn: Callable[..., Any]) -> None:
        both = device_us(lambda: torch.autograd.grad(fn(x, a, b), (x, a, b), g), flush)
        forward = device_us(lambda: fn(x, a, b), flush)
        rows.append({"row": "projection forward + backward", "contender": name, "us": both, "forward_us": forward})

    for name, fn in contenders.items():
        measured(name, fn)
    with torch.no_grad():
        us = device_us(lambda: matmuls(x, a, b), flush)
    rows.append({"row": "projection forward + backward", "contender": "its two bf16 matmuls alone", "us": us})
    if unsloth := optional("unsloth.kernels.fast_lora"):  # last: importing it changes other packages
        measured("unsloth", lambda x, a, b: unsloth.LoRA_W.apply(x, packed, state, a, b, 0.5))
    return rows


# ---------------------------------------------------------------- the table


def spawn(args: argparse.Namespace, workload: str, contender: str, folder: Path) -> subprocess.Popen:
    """One contender on one workload in a process of its own; what it prints goes to files in `folder`."""
    log = folder / f"{workload}_{contender}"
    one = f"{contender}:{workload}:{folder}:{log if args.together else ''}"
    command = [sys.executable, __file__, "--one", one, "--steps", str(args.steps), "--profile", args.profile]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if args.together:
        devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[list(WORKLOADS).index(workload) % len(devices)]
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as errors:
        return subprocess.Popen(command, stdout=out, stderr=errors, env=environment)


def result(process: subprocess.Popen, workload: str, contender: str, folder: Path) -> dict[str, Any]:
    """What it has measured, when it is done, or why it has not."""
    log = folder / f"{workload}_{contender}"
    log.touch()  # its turn
    process.wait()
    for line in reversed(log.with_suffix(".out").read_text().splitlines()):
        if line.startswith("@@"):
            return json.loads(line[2:])
    reason = (log.with_suffix(".err").read_text().strip().splitlines() or ["no output"])[-1]
    return {"workload": workload, "contender": contender, "error": reason[:300]}


def run(args: argparse.Namespace) -> None:
    flush = l2_flush()
    rate = matmul_rate(flush)
    rows = projection(flush) if args.projection else []
    for r in rows:
        print(json.dumps(r), flush=True)
    about = {"shape": args.shape, "together": args.together}
    results = {"machine": machine(args.commit), "matmul_tflops": rate / 1e12, **about, "rows": rows}
    contenders = [
        c for c in args.contenders.split(",") if c not in ("liger", "unsloth") or optional(c.replace("liger", "liger_kernel"))
    ]
    pairs = [(w, c) for w in filter(None, args.workloads.split(",")) for c in contenders]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if pairs:
            write_checkpoint(folder, args.shape, args.layers)
            torch.cuda.empty_cache()
        started = {pair: spawn(args, *pair, folder) for pair in pairs if args.together}
        while any(p.poll() is None and not (folder / f"{w}_{c}.ready").exists() for (w, c), p in started.items()):
            time.sleep(0.5)
        for pair in pairs:
            row = result(started.get(pair) or spawn(args, *pair, folder), *pair, folder)
            if "flops" in row:
                row["floor_fraction"] = row["flops"] / rate * 1e3 / row["ms"]
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(results, args.out)  # what is measured is kept, whatever comes next
    write(results, args.out)


def main() -> int:
    options = parser(__doc__)
    options.add_argument(
        "--contenders", default=",".join(CONTENDERS), help=f"comma-separated, of {', '.join((*CONTENDERS, REGIONS, GRAPHS))}"
    )
    options.add_argument("--workloads", default="W1,W2", help=f"comma-separated, of {', '.join(WORKLOADS)}; empty for none")
    options.add_argument("--projection", action="store_true", help="time one projection and its dequantisation too")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--shape", choices=SHAPES, default="8b")
    options.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    options.add_argument("--profile", default="", help="a folder for each contender's kernels of one step")
    options.add_argument("--together", action="store_true", help="load and compile side by side, then time one after the other")
    options.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parse(options)
    asked = {*args.contenders.split(","), *filter(None, args.workloads.split(","))}
    if unknown := asked - {*CONTENDERS, REGIONS, GRAPHS, *WORKLOADS}:
        options.error(f"unknown: {', '.join(sorted(unknown))}")
    if not args.one:
        run(args)
        return 0
    contender, workload, folder, turn = args.one.split(":")
    try:
        print("@@" + json.dumps(train(contender, workload, folder, args.steps, args.profile, Path(turn) if turn else None)))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
