"""What callers may give, and what they are told of what they may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from sloth.rewriter.notices import did_you_mean

# Handed on to transformers' from_pretrained, which says what they mean.
OF_TRANSFORMERS = ("cache_dir", "force_download", "local_files_only", "max_memory", "subfolder", "use_safetensors", "variant")
# Of scripts for Unsloth: arguments that mean nothing unless vLLM generates, and one that chooses among copies of a model.
WITHOUT_EFFECT = ("disable_log_stats", "float8_kv_cache", "gpu_memory_utilization", "max_lora_rank", "use_exact_model_name")
# Of scripts for Unsloth: not here, and what to do instead. What is false or None asks for nothing.
INSTEAD = {
    "fast_inference": "vLLM is not built in: leave it out; transformers generates, or vLLM by TRL's GRPOConfig(use_vllm=True)",
    "float32_mixed_precision": "give dtype=torch.float32 and train with bf16=True: then weights are in fp32 and products in bf16",
    "load_in_fp8": "weights in 8 bit floats are not trained here: give load_in_4bit=True or load_in_8bit=True",
    "offload_embedding": "embeddings stay on the device: leave it out",
    "qat_scheme": "quantisation is not trained for here: use torchao's own QAT on the model",
    "unsloth_tiled_mlp": "leave it out, and shorten max_seq_length if memory is short",
}


def refuse_unknown(function: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError that names the arguments that are not known, and what is near to the first."""
    known = sorted(known)
    if strange := sorted(set(given) - set(known)):
        hint = did_you_mean(strange[0], known)
        raise TypeError(f"{function} knows no argument {', '.join(strange)}.{hint} Known are {', '.join(known)}")


def refuse_impossible(function: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument of Unsloth's that asks for what is not here."""
    for name, instead in INSTEAD.items():
        if given.get(name):
            raise ValueError(f"{function}({name}={given[name]!r}) cannot be honoured: {instead}")


def one_of(name: str, value: Any, allowed: Mapping[Any, Any]) -> Any:
    """What `allowed` has for the value. Raises ValueError that lists all there are."""
    for key, meaning in allowed.items():
        if type(key) is type(value) and key == value:
            return meaning
    hint = did_you_mean(str(value), map(str, allowed))
    raise ValueError(f"{name}={value!r} is not known.{hint} It is one of {', '.join(map(repr, allowed))}")


def needed(package: str) -> ModuleType:
    """The package. Raises ImportError that says what to install."""
    try:
        return import_module(package)
    except ModuleNotFoundError as e:
        if e.name != package:
            raise
        raise ImportError(f"FastLanguageModel needs {package}: pip install 'sloth-compile[hf]'", name=package) from e
