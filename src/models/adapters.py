"""Adapters of PEFT on a model, by the arguments that scripts for Unsloth have."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch

from sloth.models.arguments import refuse_unknown
from sloth.models.checkpointing import checkpoint, kind_of
from sloth.models.load import drawn_from
from sloth.rewriter.notices import did_you_mean

LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION, MLP = ("attn", "attention", "mixer"), ("mlp", "feed_forward", "ffn", "expert", "moe")  # in the names of their modules


def known_arguments() -> set[str]:
    """Those of LoraConfig."""
    from peft import LoraConfig

    return {f.name for f in fields(LoraConfig) if f.init} - {"task_type", "peft_type", "auto_mapping", "base_model_name_or_path"}


def add_adapters(
    model: Any, *, r: int, target_modules: Any, seed: int, checkpointing: Any, attention: bool, mlp: bool, last: int | None,
    loftq: Any, config: dict[str, Any],
) -> Any:  # fmt: skip
    """A PeftModel. The base is frozen, the adapters are in fp32 and drawn from `seed`; the caller's random state stays as it is.

    Raises TypeError for arguments of LoRA that do not exist, ValueError for what cannot be honoured.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import PreTrainedModel

    if hasattr(model, "peft_config"):
        raise ValueError("this model has adapters already: train those, or load the model anew")
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        raise TypeError(
            f"model is a {kind}: give what FastLanguageModel.from_pretrained returned, or another model of transformers"
        )
    refuse_unknown("get_peft_model", config, known_arguments())
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} is no rank: give a whole number above 0, such as 16")
    checkpointed, _ = kind_of(checkpointing)
    config = {k: v for k, v in config.items() if v is not None}
    if loftq:
        config |= _loftq(model, loftq, config.get("init_lora_weights"))
    layers = config.get("layers_to_transform")
    if last is not None:
        config["layers_to_transform"] = layers = _last_layers(model, last, layers)
    targets = targets_in(model, target_modules, attention, mlp, bool(config.get("target_parameters")))
    if layers is not None and not config.get("layers_pattern") and _names_all(targets):
        del config["layers_to_transform"]  # PEFT knows layers of names that end alike, and of no others
        targets = _in_layers(model, targets, [layers] if isinstance(layers, int) else layers)
    model.requires_grad_(False)
    with drawn_from(seed):
        adapted = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM", **config))
    checkpoint(model, checkpointed)
    return adapted.train()


def targets_in(model: torch.nn.Module, given: Any, attention: bool = True, mlp: bool = True, may_be_none: bool = False) -> Any:
    """What PEFT is given as target_modules: the names given, or of the model's linear layers those of attention and MLP.

    Raises ValueError for a name that no module ends with, which PEFT would leave out without a word, and where names are given
    and kinds of layers excluded.
    """
    linear = _linear(model)
    if given is not None and not (attention and mlp):
        raise ValueError("target_modules says which layers get adapters: leave finetune_attention_modules/mlp_modules out, or it")
    if given is None:
        usual = [n for n in LLAMA if any(name.endswith("." + n) for name in linear)]
        wanted = [*(ATTENTION if attention else ()), *(MLP if mlp else ())]
        if len(usual) == len(LLAMA) and attention and mlp:
            return list(LLAMA)
        if attention and mlp:
            return "all-linear"
        found = sorted(n for n in linear if any(w in n.lower() for w in wanted))
        if not found and not may_be_none:
            raise ValueError(
                "no linear layers are left for adapters: give target_modules, or finetune_attention_modules/mlp_modules=True"
            )
        return found
    if isinstance(given, str):  # "all-linear", or a regular expression: PEFT says if nothing matches
        return given
    modules = [name for name, _ in model.named_modules()]
    for target in given:
        if not any(name == target or name.endswith("." + target) for name in modules):
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            hint = did_you_mean(target, leaves)
            raise ValueError(f"target_modules names {target}, and {type(model).__name__} has none.{hint} Its linear layers are"
                             f" {', '.join(leaves)}; target_modules='all-linear' takes all but the head")  # fmt: skip
    return list(given)


def _names_all(targets: Any) -> bool:
    """Is it every linear layer, or modules by their whole names?"""
    return targets == "all-linear" or (not isinstance(targets, str) and any("." in name for name in targets))


def _in_layers(model: Any, targets: Any, layers: list[int]) -> list[str]:
    """Of these, by their whole names, what is in the layers of these numbers, whatever the model calls its layers."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    wanted = tuple(f"{name}.{i}." for name in lists for i in range(count) if i in layers)
    named = _linear(model) if targets == "all-linear" else [
        n for n, _ in model.named_modules() if any(n == t or n.endswith("." + t) for t in targets)
    ]  # fmt: skip
    found = [name for name in named if name.startswith(wanted)]
    if not found:
        raise ValueError(f"none of the linear layers is in layers {layers} of {count}: give others, or target_modules by name")
    return found


def _linear(model: Any) -> list[str]:
    """Names of linear layers, whatever they are quantised to, but for the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds = (torch.nn.Linear, *_conv1d())
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and m is not head]


def _conv1d() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


def _last_layers(model: Any, last: int, layers: Any) -> list[int]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if layers is not None:
        raise ValueError("finetune_last_n_layers and layers_to_transform both say which layers get adapters: give one of them")
    if count is None or isinstance(last, bool) or not isinstance(last, int) or not 0 < last <= count:
        raise ValueError(f"finetune_last_n_layers={last!r}: the model has {count} layers; give a number of them")
    return list(range(count - last, count))


def _loftq(model: Any, loftq: Any, weights: Any) -> dict[str, Any]:
    """LoftQ (Li et al., 2023) starts adapters as what quantising takes away; for that it needs the weights before."""
    if getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            "loftq_config: the model is quantised already, and what that took away is not known any more. Load it with"
            " load_in_4bit=False, or leave loftq_config out"
        )
    if weights not in (None, True, "loftq"):
        raise ValueError(f"loftq_config and init_lora_weights={weights!r} both say how adapters start: give one of them")
    if find_spec("scipy") is None:
        raise ImportError("loftq_config: PEFT's LoftQ needs scipy: pip install scipy")
    return {"loftq_config": loftq, "init_lora_weights": "loftq"}
