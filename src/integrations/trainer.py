"""Evaluation inside transformers' Trainer runs what training runs: the compiled model.

Trainer evaluates the bare model (`self._wrap_model(self.model, training=False)`), whatever it trains with. Where the compiled one
is sloth's and wraps nothing else, it is given that one: then a loss is computed without logits, there as in training, and layers
that are compiled each by itself are so there too.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from sloth.integrations.accelerate import is_for_sloth
from sloth.integrations.integration import integration


@integration("transformers.trainer", touches="Trainer._wrap_model", why="evaluation runs the compiled model")
def _evaluating_compiled(trainer: ModuleType) -> None:
    wrap = trainer.Trainer._wrap_model

    @wraps(wrap)
    def _wrap_model(self: Any, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        wrapped = wrap(self, model, training, *args, **kwargs)
        if training or wrapped is not self.model or not is_for_sloth(self.accelerator):
            return wrapped
        compiled = self.model_wrapped
        return compiled if getattr(compiled, "_orig_mod", None) is wrapped else wrapped

    trainer.Trainer._wrap_model = _wrap_model
