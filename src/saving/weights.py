"""The weights of a model with adapters merged and nothing quantised, one after the other.

    W = round(dequantised base + Σ s·B·A)        in fp32, rounded once to 16 bits

Each is made when it is written: beside the model, one layer in fp32 and one shard in 16 bits are in memory. PEFT's own `merge`
computes the sum, on a copy of the layer in fp32, so that DoRA, rank-stabilised scales and the rest are as PEFT has them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Weight:
    """One tensor to be written. shape, dtype: as written; make: computes it, on the CPU; held: the parameter that is written as
    it is, None for one that is computed.
    """

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]
    held: Any = None

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def weights_of(model: Any, dtype: torch.dtype) -> dict[str, Weight]:
    """Name in transformers' model → weight. model: of transformers, with or without layers of adapters in it.

    Raises ValueError for layers whose weights cannot be had: quantised by something else than bitsandbytes, or on no device.
    """
    wide = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    merged = _Merged()
    found = {}
    for name, held, make in _tensors(model, "", merged):
        shape, kind = _plain_shape(held), held.dtype
        if kind.is_floating_point or hasattr(held, "quant_state") or hasattr(held, "SCB"):
            kind = torch.float32 if any(re.search(rf"(^|\.){w}(\.|$)", name) for w in wide) else dtype
        if held.device.type == "meta":
            raise ValueError(f"{name} is on no device (offloaded to disk?): load the model onto one, and save from there")
        untouched = held if make is None else None
        found[name] = Weight(shape, kind, partial(_written, make or (lambda t=held: t), kind), untouched)
    return found


def _written(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().detach().to(device="cpu", dtype=dtype).contiguous()


def _plain_shape(held: Tensor) -> torch.Size:
    state = getattr(held, "quant_state", None)
    return held.shape if state is None else torch.Size(state.shape)


def _tensors(module: Any, prefix: str, merged: _Merged) -> Iterator[tuple[str, Tensor, Callable[[], Tensor] | None]]:
    """Name, tensor as the model holds it, and what computes it where that is not what is written."""
    if _is(module, "peft.utils.other", "ModulesToSaveWrapper"):
        adapter = next((a for a in module.active_adapters if a in module.modules_to_save), None)
        chosen = module.original_module if adapter is None else module.modules_to_save[adapter]
        yield from _tensors(chosen, prefix, merged)
        return
    if _is(module, "peft.utils.other", "TrainableTokensWrapper"):
        module = module.token_adapter
    if _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        base = module.get_base_layer()
        for name, held, _ in _tensors(base, "", merged):
            yield prefix + name, held, partial(merged.weight, module, name)
        return
    if (read := _reader(module)) is not None:
        yield prefix + "weight", module.weight, read
        if module.bias is not None:
            yield prefix + "bias", module.bias, None
        return
    for name, p in module.named_parameters(recurse=False):
        yield prefix + name, p, None
    for name, b in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, b, None
    for name, child in module.named_children():
        yield from _tensors(child, f"{prefix}{name}.", merged)


def _is(module: nn.Module, where: str, name: str) -> bool:
    """Is it of that class, or of one made of it? PEFT need not be there."""
    return any((c.__module__, c.__name__) == (where, name) for c in type(module).__mro__)


def _reader(layer: nn.Module) -> Callable[[], Tensor] | None:
    """What dequantises a layer of bitsandbytes to fp32."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return partial(_of_4_bits, weight)
    if type(weight).__name__ == "Int8Params":
        return partial(_of_8_bits, layer)
    return None


def _of_4_bits(weight: Any) -> Tensor:
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32  # codes times scales, not rounded on the way
    return functional.dequantize_4bit(weight.data, state)


def _of_8_bits(layer: Any) -> Tensor:
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return layer.weight.data.float() * (scales.float() / 127)[:, None]


class _Merged:
    """Layers with their adapters merged, in fp32; the last one is kept, for its bias."""

    def __init__(self) -> None:
        self.layer: nn.Module | None = None
        self.base: nn.Module | None = None

    def weight(self, layer: Any, name: str) -> Tensor:
        if self.layer is not layer:
            self.layer, self.base = layer, _merged(layer)
        found: Any = self.base
        for part in name.split("."):
            found = getattr(found, part)
        return found


@torch.no_grad()
def _merged(layer: Any) -> nn.Module:
    """The base layer of a copy in fp32, adapters merged into it. Raises ValueError where a weight is not finite then."""
    base = layer.get_base_layer()
    stand_in: dict[int, Any] = {}
    plain: Any
    if (read := _reader(base)) is not None:
        plain = nn.Linear(base.in_features, base.out_features, device="meta")
        plain.weight = nn.Parameter(read(), requires_grad=False)
        plain.bias = None if base.bias is None else nn.Parameter(base.bias.float(), requires_grad=False)
        stand_in = {id(base): plain}
    fresh = copy.deepcopy(layer, stand_in)
    if _reader(base) is not None:
        _as_plain(fresh)
    fresh.float()
    chain = [fresh]
    while _is(chain[-1].base_layer, "peft.tuners.tuners_utils", "BaseTunerLayer"):
        chain.append(chain[-1].base_layer)
    for one in reversed(chain):
        one.merge(safe_merge=True)
    return fresh.get_base_layer()


def _as_plain(layer: Any) -> None:
    """An adapter's layer over 4 or 8 bits as PEFT's over plain weights. Raises ValueError for adapters that are not LoRA."""
    from peft.tuners import lora

    if not isinstance(layer, lora.LoraLayer):
        raise ValueError(
            f"{type(layer).__name__} over a quantised layer is not merged here: save_method='lora' saves the adapters"
        )
    layer.__class__ = lora.Linear


def refuse_shards(model: torch.nn.Module) -> None:
    """Raises ValueError where a process holds but a part of the parameters (DeepSpeed's ZeRO-3, FSDP, tensor parallelism)."""
    for name, p in model.named_parameters():
        if hasattr(p, "ds_id") or "_fsdp_wrapped_module" in name or type(p.data).__name__ == "DTensor":
            raise ValueError(
                f"{name} is divided among processes: save with the trainer's save_model, which gathers it, and merge it then"
            )
