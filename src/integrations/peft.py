"""PEFT's DoRA asks for its base layer's weight in a way that Dynamo cannot trace: every projection would break the graph.

Dynamo is told to trace `dequantize_module_weight` as the function below, which asks the same questions in words that it knows.
PEFT itself is not changed: outside of compiled code its own function runs.
"""

import sys
from types import ModuleType

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
