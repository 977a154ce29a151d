"""Adapters that are put around a model compiled in place (`SFTTrainer(peft_config=…)`) are compiled with it.

PEFT calls the `forward` of the model within, so a compiled call of that model (`model.compile(…)`, FastLanguageModel) would not
be made again, and training would go on without a compiler and without a word. The PeftModel is compiled instead, as the model
was, and has the functions for saving that FastLanguageModel gave it. Prompts that are learned come before a model that PEFT does
call: there all stays as it is.
"""

from __future__ import annotations

from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch

from sloth.integrations.generation import backend_of
from sloth.integrations.integration import integration


@integration("peft.peft_model", touches="PeftModel.__init__", why="adapters around a compiled model are compiled with it")
def _compile_outside(peft_model: ModuleType) -> None:
    begin = peft_model.PeftModel.__init__

    @wraps(begin)
    def __init__(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        begin(self, model, *args, **kwargs)
        backend = backend_of(getattr(model, "_compiled_call_impl", None))
        if backend is None or self.base_model is model:
            return
        model._compiled_call_impl = None
        self.compile(backend=backend.compiler_fn, dynamic=backend.dynamic, **backend.kwargs)
        for name, function in vars(model).copy().items():
            if isinstance(function, partial) and function.args and function.args[0] is model:
                setattr(self, name, partial(function.func, self))

    peft_model.PeftModel.__init__ = __init__
