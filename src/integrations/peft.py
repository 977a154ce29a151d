"""PEFT's DoRA asks for its base layer's weight in a way that Dynamo cannot trace: every projection would break the graph.

Dynamo is told to trace `dequantize_module_weight` as the function below, which asks the same questions in words that it knows.
PEFT itself is not changed: outside of compiled code its own function runs.

Layers say in lists which adapters are active. PEFT gives all of them one list when it makes adapters, and each one of its own
when they are switched, as TRL does for the reference's pass. Dynamo guards on lists being one, so that a model that was switched
there and back was compiled anew. Each layer has its own from the beginning.
"""

import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from sloth.integrations.integration import integration


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer as a matrix: its own, or what a quantiser keeps of it, dequantised."""
    if hasattr(module, "W_q"):  # HQQ
        return module.dequantize()
    weight = module.weight
    if "torchao.utils" in sys.modules and isinstance(weight, sys.modules["torchao.utils"].TorchAOBaseTensor):
        return weight.dequantize()
    four_bit = getattr(weight, "quant_state", None)
    if four_bit is not None:
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, four_bit)
    scales = getattr(weight, "SCB", None)
    if scales is None and hasattr(module, "state"):
        scales = module.state.SCB
    if scales is not None:
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, scales)
    return weight


@integration("peft.utils.integrations", touches="dequantize_module_weight", why="DoRA is traced without a break of the graph")
def teach_dynamo(peft: ModuleType) -> None:
    """Dynamo alone is told."""
    torch.compiler.substitute_in_graph(peft.dequantize_module_weight)(weight_of)


def lists_of_their_own(model: torch.nn.Module) -> None:
    """For layers that have adapters already."""
    for module in model.modules():
        if isinstance(active := vars(module).get("_active_adapter"), list):
            vars(module)["_active_adapter"] = [*active]


def _with_own_list(set_adapter: Callable[..., None]) -> Callable[..., None]:
    @wraps(set_adapter)
    def set_own(self: Any, adapter_names: Any, *args: Any, **kwargs: Any) -> None:
        set_adapter(self, adapter_names if isinstance(adapter_names, str) else [*adapter_names], *args, **kwargs)

    return set_own


@integration(
    "peft.tuners.tuners_utils", touches="BaseTunerLayer.set_adapter",
    why="adapters are switched, and back, without another graph",
)  # fmt: skip
def _give_own_lists(module: ModuleType) -> None:
    module.BaseTunerLayer.set_adapter = _with_own_list(module.BaseTunerLayer.set_adapter)
