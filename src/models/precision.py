"""Where a model lies, in which dtype, and in how many bits."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from sloth.models.arguments import needed


def is_bfloat16_supported() -> bool:
    """Does the GPU compute in bfloat16? False where there is none."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def dtype_of(given: Any) -> torch.dtype:
    """The dtype of weights that are not quantised. None: bf16 on a GPU that has it, else fp16; fp32 on a CPU.

    Raises ValueError for what is no floating dtype of 16 or 32 bits.
    """
    if given is None:
        if not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if is_bfloat16_supported() else torch.float16
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype={given!r} is none of torch.bfloat16, torch.float16, torch.float32 and None")
    if found is torch.bfloat16 and torch.cuda.is_available() and not is_bfloat16_supported():
        raise ValueError(f"{torch.cuda.get_device_name()} has no bfloat16: give dtype=None (then it is float16) or torch.float16")
    return found


def device_map_of(given: Any) -> Any:
    """transformers' device_map. None, and names of strategies where there are not several GPUs: all on one device."""
    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if given is None or (isinstance(given, str) and torch.cuda.device_count() < 2):
        if isinstance(given, str) and given not in ("auto", "balanced", "balanced_low_0", "sequential"):
            return {"": given}
        return {"": here}
    return given


class Bits(NamedTuple):
    """load_in_4bit, load_in_8bit and load_in_16bit as the caller gives them; four is None where he does not say."""

    four: bool | None
    eight: bool
    sixteen: bool


def quantisation_of(config: Any, bits: Bits, full: bool, given: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any] | None]:
    """transformers' quantization_config for from_pretrained, and what is to be written into the one that a checkpoint has.

    config: the model's. full: do all weights train? given: the caller's own quantization_config. Raises ValueError where they
    contradict each other or what the checkpoint is.
    """
    four, eight, sixteen = bits
    if sixteen and (four or eight):
        raise ValueError("load_in_16bit=True and 4 or 8 bits: choose one")
    if full and (four or eight):
        raise ValueError("full_finetuning=True trains the weights, which in 4 or 8 bits it cannot: leave load_in_4bit/8bit out")
    if four and eight:
        raise ValueError("load_in_4bit=True and load_in_8bit=True: choose one")
    if given is not None and (eight or sixteen or four is not None):
        raise ValueError("quantization_config says how the model is quantised: leave load_in_4bit/8bit/16bit out, or it")
    held = getattr(config, "quantization_config", None)
    if held is not None:
        return None, _of_checkpoint(held if isinstance(held, dict) else held.to_dict(), bits, full, given, dtype)
    if given is not None:
        if full:
            raise ValueError(
                "full_finetuning=True trains the weights, which a quantised model cannot: leave quantization_config out"
            )
        return given, None
    if full or sixteen or not (eight or four or four is None):
        return None, None
    needed("bitsandbytes")
    from transformers import BitsAndBytesConfig

    if eight:
        return BitsAndBytesConfig(load_in_8bit=True), None
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return nf4, None


def _of_checkpoint(held: dict[str, Any], asked: Bits, full: bool, given: Any, dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint that was quantised before is loaded as it is, with products in `dtype`."""
    bits = "4 bits" if held.get("load_in_4bit") else "8 bits" if held.get("load_in_8bit") else held.get("quant_method")
    told = f"this checkpoint is quantised already ({bits})"
    if full:
        raise ValueError(f"full_finetuning=True: {told}, and its weights cannot be trained. Give the model that it was made from")
    if given is not None:
        raise ValueError(f"quantization_config: {told}. Leave it out, or give the model that it was made from")
    four, eight, sixteen = asked
    if sixteen or (four and bits != "4 bits") or (eight and bits != "8 bits") or (four is False and bits == "4 bits"):
        what = "load_in_16bit=True" if sixteen else "load_in_8bit=True" if eight else f"load_in_4bit={four}"
        raise ValueError(f"{what}: {told}. Leave it out, or give the model that it was made from")
    if bits == "4 bits":
        return held | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    return held


def settle(model: torch.nn.Module) -> None:
    """On a CPU, refuse rows that bitsandbytes gets wrong there: it takes each for whole blocks, and reads other scales.

    And keep it from repacking weights for good when a CPU with bf16 instructions first evaluates: their scales become bf16, and
    training behind it lacks the gradients through these layers. Raises ValueError that names the layer.
    """
    layer: Any
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None:
            continue
        if layer.weight.device.type == "cpu" and layer.in_features % state.blocksize:
            raise ValueError(
                f"{name} has rows of {layer.in_features}, and NF4 on a CPU needs multiples of {state.blocksize}: give"
                " load_in_4bit=False, or run on a GPU"
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
