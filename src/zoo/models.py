"""Tiny random-weight models of every causal LM architecture of transformers.

A name is a model type of transformers, or "type+branch" for a branch of its configuration that is off by default (VARIANTS).
Configurations are derived, not listed: every field whose name says what it is (TINY) becomes small, dropout becomes 0, and the
depth is such that each kind of layer appears.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sloth.zoo.sizes import (
    DEPTH,
    DROPOUT,
    IN_TOWERS,
    KEPT_IF,
    OVERRIDES,
    PER_LAYER,
    SET_IF_NONE,
    TEXT_PARTS,
    TINY,
    VARIANTS,
    VOCAB,
)

Batch = dict[str, torch.Tensor | bool]
BATCH, SEQ = 2, 33


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
