"""Tiny random-weight models of every causal LM architecture of transformers, and a sweep of the backend over them.

    python -m tests.zoo --out zoo.json --all              # resumes where it was interrupted
    python -m tests.zoo --out zoo.json --arch llama qwen3+qknorm --dtype bfloat16

A name is a model type of transformers, or "type+branch" for a branch of its configuration that is off by default (VARIANTS).
Configurations are derived, not listed: every field whose name says what it is (TINY) becomes small, dropout becomes 0, and the
depth is such that each kind of layer appears. Each architecture of a sweep runs in a forked child with a time limit: a crash or a
hang costs one row.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sloth.rewriter.backend import listening
from sloth.rewriter.explain import _expected
from sloth.rewriter.registry import constructs
from sloth.rewriter.report import MATCHED, Report

Row = dict[str, Any]
Batch = dict[str, torch.Tensor | bool]
BATCH, SEQ, VOCAB = 2, 33, 256
DEPTH = -1  # stands for the number of layers
MISMATCH = 1e-4  # relative difference of a gradient in fp32 from which on a row is a problem

# ---------------------------------------------------------------- tiny configurations

# Size: fields that get it where a configuration has them with an integer as default. "depth" is the number of layers.
TINY: dict[str, int] = {}
for _line in """
depth: num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers depth num_encoder_layers
depth: num_decoder_layers num_layers_per_stack
64: hidden_size d_model n_embd emb_dim embedding_dim embed_dim lru_width attention_hidden_size
64: hidden_size_per_layer_input backbone_hidden_size embedding_size input_embedding_size output_embedding_size
64: word_embed_proj_dim qk_dim ple_embed_dim d_embed rnn_hidden_size codebook_size
128: intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff d_inner dim_ff ffn_hidden_size
128: feed_forward_size d_ff mlp_dim shared_intermediate_size dense_intermediate_size intermediate_size_mlp mamba_d_ssm
128: ngram_vocab_size_base
256: vocab_size n_token decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size
256: pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab max_position_embeddings n_positions n_ctx
256: max_seq_len context_length max_target_positions seq_length max_sequence_length
32: moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size
32: router_hidden_size moe_latent_size q_lora_rank num_buckets relative_attention_num_buckets prompt_mid_dim
32: base_channels
28: image_size crop_size
16: head_dim dim_head d_head d_kv attention_head_size global_head_dim swa_head_dim swa_v_head_dim attention_head_dim
16: kv_lora_rank v_head_dim qk_head_dim index_head_dim index_topk o_lora_rank sliding_window attention_window_size
16: local_attention window_size attention_chunk_size keep_window_size query_pre_attn_scalar mamba_d_state state_size
16: ssm_state_size mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size linear_key_head_dim
16: linear_value_head_dim num_mel_bins
14: patch_size
8: qk_rope_head_dim qk_nope_head_dim index_block_size rotary_dim gated_norm_rank block_size mamba_n_heads
8: mamba_num_heads n_mamba_heads laurel_rank make_ngram_vocab_size_divisible_by num_filters
4: num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads
4: num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads
4: linear_attn_num_heads num_experts n_routed_experts num_local_experts moe_num_experts mamba_dt_rank time_step_rank
4: linear_num_value_heads linear_conv_kernel_dim
3: mask_token_id unk_token_id
2: num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads swa_num_key_value_heads num_query_groups
2: index_n_heads index_topk_blocks o_groups num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts
2: num_experts_per_token n_group zero_expert_num expert_layer_period attn_layer_period mamba_n_groups mamba_ngroups
2: n_groups linear_num_key_heads altup_num_inputs split_ngram_parts num_codebooks pooling_kernel_size eos_token_id
2: sep_token_id forced_eos_token_id
1: topk_group first_k_dense_replace n_shared_experts moe_layer_interval decoder_sparse_step num_dense_layers
1: expert_layer_offset attn_layer_offset moe_layer_freq interleave_moe_layer_step audio_channels bos_token_id
1: decoder_start_token_id cls_token_id forced_bos_token_id
0: num_kv_shared_layers moe_layer_start_index num_nextn_predict_layers pad_token_id
""".splitlines():
    _size, _, _names = _line.partition(": ")
    TINY |= dict.fromkeys(_names.split(), DEPTH if _size == "depth" else int(_size or 0))

SET_IF_NONE = {"num_key_value_heads", "head_dim"}  # None means: as the large one
KEPT_IF = {  # value of the default → fields that keep it: switched off, or grouped by one
    0: {"first_k_dense_replace", "num_dense_layers"},
    1: {"n_group", "topk_group", "num_kv_heads", "kv_n_heads"},
}
# fmt: off
IN_TOWERS = {  # vision and audio towers are built and not trained
    "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "depth", "num_heads", "image_size",
    "patch_size", "num_layers", "crop_size", "num_mel_bins",
}
TEXT_PARTS = {
    "text_config", "attn_config", "ffn_config", "decoder", "depth_decoder_config", "decoder_config", "encoder_config",
    "global_config", "patcher_config",
}
PER_LAYER = {
    "layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers", "attention_layers", "indexer_types",
}
# fmt: on
DROPOUT = ("dropout", "pdrop", "drop_rate", "layerdrop", "jitter")

# What the table does not say of an architecture; "part.field" is a field of a nested configuration, "depth" the number of layers.
# fmt: off
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_config.hidden_size_global": 128, "decoder_config.hidden_size_global": 128, "global_config.hidden_size": 128,
            "global_config.head_dim": 32},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"],
                            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"audio_config.adapter_input_size": 64, "audio_config.adapter_out_dim": 64,
                   "vision_config.adapter_in_dim": 64, "vision_config.adapter_out_dim": 64},
    "dots3_note_text": {"swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8,
                        "num_key_value_heads": 4, "shared_experts_intermediate_size": 32},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
                       "indexer_compress_ratio": 4},
    "reformer": {"axial_pos_embds": False, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4,
                 "attn_layers": ["local", "lsh"], "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"depth": 3, "attention_hidden_size": 128, "attention_head_dim": 32,
              "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
# fmt: on


def _rope(kind: str, **how: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **how}}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama+llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "llama+dynamic": _rope("dynamic", factor=2.0),
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+tied": {"tie_word_embeddings": True},
    "qwen2+yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    "qwen2+sliding": {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3+longrope": _rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=64)
    | {"original_max_position_embeddings": 64},
    "mistral+sliding": {"sliding_window": 16},
    "cohere+qknorm": {"use_qk_norm": True},
    "stablelm+parallel": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    "phi+qknorm": {"qk_layernorm": True},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon+alibi": {"alibi": True},
    "gpt_neox+sequential": {"use_parallel_residual": False},
    "doge+moe": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "mixtral+router_loss": {"output_router_logits": True},
    "granitemoeshared+shared": {"shared_intermediate_size": 64},
    "falcon_h1+norm": {"mamba_rms_norm": True},
}


def architectures() -> list[str]:
    """Every model type that has a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(arch: str, **changes: Any) -> Any:
    """A small configuration of this architecture in which every kind of layer occurs."""
    kind = arch.split("+")[0]
    return _shrunk(CONFIG_MAPPING[kind], OVERRIDES.get(kind, {}) | VARIANTS.get(arch, {}) | changes)


def _shrunk(cls: type, changes: dict[str, Any], tower: bool = False) -> Any:
    default = cls()
    held = vars(default)  # not getattr: some configurations refuse fields that differ between layers
    declared = {f.name: f.default for f in dataclasses.fields(cls)}
    kinds = {k: list(dict.fromkeys(v)) for k, v in held.items() if k in PER_LAYER and isinstance(v, list | tuple) and v}
    depth = changes.get("depth") or max(2, *map(len, kinds.values()), 2)
    given: dict[str, Any] = {}
    for name in sorted({n for n in declared | held if not n.startswith("_")}):
        current, low = held.get(name), name.lower()
        if hasattr(current, "to_dict"):
            if name in cls.sub_configs or name in declared:
                part = {k.split(".", 1)[1]: v for k, v in changes.items() if k.startswith(name + ".")}
                part = OVERRIDES.get(current.model_type, {}) | part if name in TEXT_PARTS else part
                given[name] = _shrunk(type(current), part, tower or name not in TEXT_PARTS)
        elif name not in declared and not isinstance(current, float) or isinstance(current, bool):
            continue
        elif isinstance(current, int | float) and any(word in low for word in DROPOUT):
            given[name] = 0.0 if isinstance(declared.get(name, 0.0), float) else 0
        elif name in kinds:
            given[name] = type(current)(kinds[name][i % len(kinds[name])] for i in range(depth))
        elif name in TINY and (isinstance(current, int) or current is None and name in SET_IF_NONE):
            if not tower or name in IN_TOWERS:
                given[name] = _tiny(name, current, depth, "kv_lora_rank" in declared)
        elif low.endswith(("_token_id", "_token_index", "_index")) and isinstance(current, int) and current >= VOCAB:
            given[name] = 4
        elif low.endswith("_token_id") and isinstance(current, list):
            given[name] = [2]
    given |= {"is_decoder": True} if "is_decoder" in declared and not tower else {}
    given |= {"use_cache": False} if "use_cache" in declared else {}
    return cls(**given | {k: v for k, v in changes.items() if "." not in k and k != "depth"})


def _tiny(name: str, current: int | None, depth: int, latent: bool) -> int:
    if current is not None and name in KEPT_IF.get(current, ()):
        return current
    if name == "num_key_value_heads" and latent:  # latent attention has no grouped heads
        name = "num_attention_heads"
    return depth if TINY[name] == DEPTH else TINY[name]


def tiny_model(arch: str, dtype: torch.dtype = torch.float32, *, attention: str | None = None, **changes: Any) -> torch.nn.Module:
    """A model in training mode whose parameters are nowhere symmetric, zero or one, so that each gradient tells something."""
    config = tiny_config(arch, **changes)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch.split("+")[0]])
    wanted = getattr(cls, "config_class", None)
    if wanted is not None and type(config) is not wanted:  # the decoder inside of a larger model
        config = next((part for part in vars(config).values() if type(part) is wanted), config)
    how = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    known = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM.from_config if known else cls._from_config)(config, **how).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
    return model.train()


def tiny_batch(model: torch.nn.Module, arch: str = "", batch: int = BATCH, seq: int = SEQ) -> Batch:
    """The keyword arguments of one training call."""
    config, g = model.config, torch.Generator().manual_seed(2)
    if arch == "reformer":
        seq = 32
    ids = torch.randint(5, VOCAB, (batch, seq), generator=g)
    out: Batch = {"input_ids": ids, "labels": ids.clone()}
    if arch.startswith("musicgen"):
        books = torch.randint(5, VOCAB, (batch, seq, config.num_codebooks), generator=g)
        out = {"input_ids": books.permute(0, 2, 1).reshape(-1, seq), "labels": books}
    if arch == "git":
        out["pixel_values"] = torch.randn(batch, 3, *[config.vision_config.image_size] * 2, generator=g)
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or "past_key_values" in accepted and any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        out["use_cache"] = False
    return out


# ---------------------------------------------------------------- one training call


def step(function: Callable[..., Any], model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by parameter name of one call; `model` has no gradients afterwards."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = function(**batch)
    loss = (out["loss"] if "loss" in out else out[0]).mean()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@contextmanager
def same_buffers(model: torch.nn.Module) -> Iterator[None]:
    """Buffers that calls change (running statistics, dynamic tables) are put back."""
    before = {n: b.clone() for n, b in model.named_buffers()}
    yield
    with torch.no_grad():
        for n, b in model.named_buffers():
            if n in before and before[n].shape == b.shape:
                b.copy_(before[n])


def gradient_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest ‖a − b‖ / ‖b‖ over the parameters, and whose it is; infinite where a gradient is missing on one side.

    Norms have a floor of 1e-3 of the largest: some gradients are zero in exact arithmetic (biases of keys), rounding noise in any
    other.
    """
    if strange := ours.keys() ^ theirs.keys():
        return float("inf"), min(strange)
    floor = 1e-3 * max((g.double().norm().item() for g in theirs.values()), default=0.0) + 1e-12
    differences = ((((ours[n] - b).double().norm() / (b.double().norm() + floor)).item(), n) for n, b in theirs.items())
    return max(((d if d == d else float("inf"), n) for d, n in differences), default=(0.0, ""))


def measure(arch: str, dtype: torch.dtype = torch.float32) -> Row:
    """One architecture under eager and under sloth with aot_eager inside; where that goes wrong, under aot_eager alone too."""
    row: Row = {"arch": arch, "dtype": str(dtype).removeprefix("torch."), "phase": "build", "trains": False}
    start = time.perf_counter()
    try:
        model = tiny_model(arch, dtype)
        row |= {"class": type(model).__name__, "phase": "eager"}
        batch = tiny_batch(model, arch)
        with same_buffers(model):
            loss, grads = step(model, model, batch)
        row |= {"trains": bool(torch.isfinite(loss)) and bool(grads), "loss": loss.item(), "gradients": len(grads)}
        if row["trains"]:
            expected = _guarded(row, "expected_error", lambda: _expected(model, batch, constructs())) or {}
            row["phase"] = "compile"
            options = {"options": {"sloth.inner_backend": "aot_eager"}}
            with listening() as graphs:
                row |= _compiled(model, batch, (loss, grads), "sloth", **options)
            row |= _told(Report(graphs, expected=expected, titles={c.name: c.title for c in constructs()}))
            if not agrees(row):
                row["aot_eager"] = _compiled(model, batch, (loss, grads), "aot_eager")
        del row["phase"]
    except Exception as e:
        row["error"] = _short(e)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def agrees(row: Row) -> bool:
    """Did the compiled model give eager's loss and gradients?"""
    limit = MISMATCH if row.get("dtype", "float32") == "float32" else 3e-2
    return "error" not in row and row["loss_difference"] < limit and row["gradient_difference"] < limit


def _compiled(model: torch.nn.Module, batch: Batch, truth: tuple, backend: str, **how: Any) -> Row:
    """The compiled model against eager's loss and gradients."""
    torch._dynamo.reset()
    counters.clear()
    row: Row = {}
    with same_buffers(model):
        found = _guarded(row, "error", lambda: step(torch.compile(model, backend=backend, **how), model, batch))
    row["breaks"] = [reason.strip().split("\n")[0][:200] for reason in counters["graph_break"]]
    if found is not None:
        (loss, grads), (true_loss, true_grads) = found, truth
        difference, name = gradient_difference(grads, true_grads)
        row |= {"loss_difference": abs(loss - true_loss).item() / (abs(true_loss).item() + 1e-6)}
        row |= {"gradient_difference": difference, "worst": name}
    return row


def _told(report: Report) -> Row:
    """What the sweep keeps of a report."""
    missed = Counter(dataclasses.replace(s, file="/".join(s.file.split("/")[-1:])) for s in report.sites if s.status != MATCHED)
    return {
        "graphs": len(report.graphs),
        "constructs": {c: n for c, n in report.constructs.items() if n["expected"]},
        "variants": Counter(f"{s.construct}: {s.variant}" for s in report.sites if s.status == MATCHED),
        "missed": [dataclasses.asdict(s) | {"sites": n} for s, n in missed.items()],
        "untouched": [g.untouched for g in report.graphs if g.untouched],
        "opaque": Counter(why for g in report.graphs for why in g.opaque.values()),
        "sloth_seconds": round(sum(v for k, v in report.seconds.items() if k != "aot_eager"), 2),
    }


def _guarded(row: Row, key: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as e:
        row[key] = _short(e)
        return None


def _short(e: Exception) -> str:
    return f"{type(e).__name__}: {e}"[:600]


# ---------------------------------------------------------------- sweep


def sweep(
    archs: Iterable[str], out: Path, dtype: torch.dtype = torch.float32, jobs: int = 1, limit: float = 300
) -> dict[str, Row]:
    """Measure each architecture in a child of its own; rows go to `out` one by one, and those found there are not repeated."""
    constructs()  # load the patterns once, before forking
    rows: dict[str, Row] = json.loads(out.read_text()) if out.exists() else {}
    todo = [a for a in archs if a not in rows]
    context = multiprocessing.get_context("fork")
    live: dict[str, tuple[Any, Connection, float]] = {}
    while todo or live:
        while todo and len(live) < jobs:
            arch = todo.pop(0)
            here, there = context.Pipe(False)
            child = context.Process(target=_child, args=(there, arch, dtype, max(1, (os.cpu_count() or 1) // jobs)), daemon=True)
            child.start()
            there.close()
            live[arch] = child, here, time.monotonic()
        for arch, (child, here, since) in list(live.items()):
            if here.poll(0.1):
                row = _received(here, child, arch)
            elif time.monotonic() - since > limit:
                row = {"arch": arch, "phase": "child", "trains": None, "error": f"took more than {limit:.0f} s"}
            else:
                continue
            child.join(2)
            if child.is_alive():
                os.killpg(child.pid, signal.SIGKILL)
                child.join()
            del live[arch]
            rows[arch] = row
            out.write_text(json.dumps(rows, indent=1))
            print(summary(row), flush=True)
    return rows


def _child(pipe: Connection, arch: str, dtype: torch.dtype, threads: int) -> None:
    os.setsid()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1), os.dup2(silent, 2)
    torch.set_num_threads(threads)
    pipe.send(measure(arch, dtype))


def _received(pipe: Connection, child: Any, arch: str) -> Row:
    try:
        return pipe.recv()
    except EOFError:
        child.join(5)
        return {"arch": arch, "phase": "child", "trains": None, "error": f"died with exit code {child.exitcode}"}


def summary(row: Row) -> str:
    """One line for people."""
    counts = ", ".join(f"{n['matched']}/{n['expected']} {c}" for c, n in row.get("constructs", {}).items())
    what = f"{row['gradient_difference']:.0e} {counts}" if "gradient_difference" in row else ""
    state = "not trained" if not row["trains"] else "ok" if agrees(row) else "WRONG"
    return f"{row['arch']:26} {state:12} {row.get('seconds', 0):5} s  {what} {row.get('error', '')[:150]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", nargs="*", default=[])
    parser.add_argument("--all", action="store_true", help="every architecture and every branch in VARIANTS")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    archs = [*given.arch, *((*architectures(), *VARIANTS) if given.all else ())]
    rows = sweep(archs, given.out, getattr(torch, given.dtype), given.jobs)
    print(json.dumps(totals(rows.values()), indent=1))


def totals(rows: Iterable[Row]) -> Row:
    """Over all rows: how many train, how many agree, and matched / expected of each construct."""
    rows = [r for r in rows if r["trains"]]
    counted: dict[str, Counter] = {}
    for row in rows:
        for name, n in row.get("constructs", {}).items():
            counted.setdefault(name, Counter()).update(n)
    return {"train": len(rows), "agree": sum(map(agrees, rows)), "constructs": {c: dict(n) for c, n in counted.items()}}


if __name__ == "__main__":
    main()
