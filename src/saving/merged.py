"""A model of transformers with its adapters merged, written for plain `from_pretrained`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sloth.saving.weights import Weight, weights_of

PATTERN = "model{suffix}.safetensors"


def base_of(model: Any) -> Any:
    """transformers' model in a PeftModel; a model that is one itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def dtype_for(model: Any, given: torch.dtype | None = None) -> torch.dtype:
    """16 bits as the model has them; bf16 of one in fp32. given: of the caller's choice."""
    if given is not None:
        return given
    held = base_of(model).dtype
    return held if held in (torch.bfloat16, torch.float16) else torch.bfloat16


def planned(model: Any, dtype: torch.dtype) -> tuple[dict[str, Weight], bool]:
    """What is to be written, and whether embedding and head are still one tensor."""
    base = base_of(model)
    method = getattr(base, "quantization_method", None)
    if method is not None and getattr(method, "value", method) != "bitsandbytes":
        raise ValueError(
            f"the model is quantised by {getattr(method, 'value', method)}, and merging knows bitsandbytes alone: save adapters"
            " (save_method='lora'), and merge them into the model that was quantised"
        )
    found = weights_of(base, dtype)
    tied = True
    for target, source in getattr(base, "all_tied_weights_keys", {}).items():
        if target in found and source in found:
            if found[target].held is not None and found[target].held is found[source].held:
                del found[target]
            else:
                tied = False
    return found, tied


def write(model: Any, folder: Path, found: dict[str, Weight], tied: bool, dtype: torch.dtype, shard: int | str) -> None:
    """Write config, generation config and shards into an empty folder."""
    base = base_of(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures, config.use_cache = dtype, [type(base).__name__], True
    if not tied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if base.is_remote_code() if hasattr(base, "is_remote_code") else False:
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(base, folder, config=config)
    config.save_pretrained(folder)
    if base.can_generate():
        base.generation_config.save_pretrained(folder)
    _write_shards(folder, _as_checkpoint(base, config, found), shard)


def _as_checkpoint(base: Any, config: Any, found: dict[str, Weight]) -> dict[str, Weight]:
    """By the names that checkpoints of this model have, where those differ from the model's own (experts in one tensor)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not get_model_conversion_mapping(base, add_legacy=False):
        return found
    with torch.device("meta"):
        plain = type(base)._from_config(copy.deepcopy(config))
    tensors = revert_weight_conversion(plain, {name: w.make() for name, w in found.items()})
    return {name: Weight(t.shape, t.dtype, lambda t=t: t.contiguous()) for name, t in tensors.items()}


def _write_shards(folder: Path, found: dict[str, Weight], shard: int | str) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sizes: dict[str, Tensor] = {name: torch.empty(w.shape, dtype=w.dtype, device="meta") for name, w in found.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=PATTERN, max_shard_size=shard)
    for file, names in split.filename_to_tensors.items():
        save_file({name: found[name].make() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        count = sum(w.shape.numel() for w in found.values())
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
