"""A float that a module holds is a constant, as long as it does not change in that module.

Dynamo makes a float a symbol when it finds another value under the same name: `scaling['default']` of a second model, with
another alpha, in the same process. A symbol has no value to match by (a scale of 1 is the identity, and most models' trace has
no product there), and torch's own eager execution of a checkpoint fails on it. So in graphs of sloth such a float becomes a
symbol only once it changed in the very object that is compiled, which is what schedules do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import ChainedSource, LocalSource
from torch._dynamo.variables import ConstantVariable
from torch._dynamo.variables.builder import VariableBuilder

from sloth.compat import is_ours
from sloth.integrations.integration import integration

_seen: WeakKeyDictionary[Any, dict[str, float]] = WeakKeyDictionary()  # by the object that is compiled and the float's name


def _keeping(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's choice of what a float is."""

    @wraps(wrap)
    def wrap_symfloat(self: VariableBuilder, value: float) -> Any:
        if not is_ours(self.tx) or not _is_constant(self, value):
            return wrap(self, value)
        self.install_guards(GuardBuilder.CONSTANT_MATCH)
        return ConstantVariable.create(value=value, source=self.source)

    return wrap_symfloat


def _is_constant(builder: VariableBuilder, value: float) -> bool:
    source = builder.source
    if not torch._dynamo.config.assume_static_by_default or not source.guard_source.is_unspecialized_nn_module():
        return False  # dynamic=True asks for symbols
    while isinstance(source, ChainedSource):
        source = source.base
    if not isinstance(source, LocalSource):
        return False
    root = builder.tx.output.root_tx.f_locals.get(source.local_name)
    try:
        values = _seen.setdefault(root, {})
    except TypeError:  # nothing that can be remembered without keeping it alive
        return False
    return values.setdefault(builder.source.name, value) == value


@integration("torch._dynamo.variables.builder", touches="VariableBuilder.wrap_symfloat", why="a module's floats are constants")
def _keep_floats(module: ModuleType) -> None:
    module.VariableBuilder.wrap_symfloat = _keeping(module.VariableBuilder.wrap_symfloat)
