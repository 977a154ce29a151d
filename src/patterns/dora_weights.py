"""PEFT's DoRA asks for its base layer's weight in a way that Dynamo cannot trace: every projection would break the graph.

Dynamo is told to trace `dequantize_module_weight` as the function below, which asks the same questions in words that it knows.
PEFT itself is not changed: outside of compiled code its own function runs.
"""

import contextlib
import sys

import torch


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer as a matrix: its own, or what bitsandbytes keeps of it in 4 or 8 bits, dequantised."""
    weight = module.weight
    four_bit = getattr(weight, "quant_state", None)
    if four_bit is not None:
        return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, four_bit)
    scales = getattr(weight, "SCB", None)
    if scales is None and hasattr(module, "state"):
        scales = module.state.SCB
    if scales is not None:
        return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(weight.data, scales)
    return weight


def teach_dynamo() -> None:
    """Where PEFT is in use, and no package whose weights are known to PEFT only."""
    peft = sys.modules.get("peft.utils.integrations")
    if peft is None or "torchao" in sys.modules or "hqq" in sys.modules or not hasattr(peft, "dequantize_module_weight"):
        return
    with contextlib.suppress(ValueError, TypeError):  # done already, or another signature
        torch._dynamo.decorators.substitute_in_graph(peft.dequantize_module_weight)(weight_of)


teach_dynamo()
