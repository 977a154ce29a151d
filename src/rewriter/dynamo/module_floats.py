"""A float that a module holds is a constant, as long as it does not change in that module.

Dynamo makes a float a symbol when it finds another value under the same name: `scaling['default']` of a second model, with
another alpha, in the same process. A symbol has no value to match by (a scale of 1 is the identity, and most models' trace has
no product there), and torch's own eager execution of a checkpoint fails on it. So in graphs of sloth such a float becomes a
symbol only once it changed in the very object that is compiled, which is what schedules do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from sloth.compat.dynamo import (
    ChainedSource,
    ConstantVariable,
    FrameStateSizeEntry,
    GuardBuilder,
    LocalSource,
    VariableBuilder,
    is_ours,
    process_automatic_dynamic,
)
from sloth.integrations.integration import integration

ITEM = re.compile(r"\['?\d+'?\]")  # of a list of layers


@dataclass
class _Floats:
    """Of one object that is compiled: values by name, and which names, whatever the layer's number, had another one."""

    values: dict[str, float] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


_floats: WeakKeyDictionary[Any, _Floats] = WeakKeyDictionary()


def _keeping(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's choice of what a float is."""

    @wraps(wrap)
    def wrap_symfloat(self: VariableBuilder, value: float) -> Any:
        known = _of_its_module(self) if is_ours(self.tx) else None
        if known is None:
            return wrap(self, value)
        name = self.source.name
        alike = ITEM.sub("[]", name)
        if not _same(known.values.setdefault(name, value), value):
            known.changed.add(alike)  # and those of equal layers, which were stamped and never seen here
        if alike in known.changed:
            known.values[name] = value
            _say_that_it_changes(self, value)
            return wrap(self, value)
        self.install_guards(GuardBuilder.CONSTANT_MATCH)
        return ConstantVariable.create(value=value, source=self.source)

    return wrap_symfloat


def _of_its_module(builder: VariableBuilder) -> _Floats | None:
    """What is known of the floats of the object that is compiled; None where this one is not held by a module in it."""
    source = builder.source
    if not source.guard_source.is_unspecialized_nn_module():
        return None
    while isinstance(source, ChainedSource):
        source = source.base
    if not isinstance(source, LocalSource):
        return None
    try:
        return _floats.setdefault(builder.tx.output.root_tx.f_locals.get(source.local_name), _Floats())
    except TypeError:  # nothing that can be remembered without keeping it alive
        return None


def _same(a: float, b: float) -> bool:
    return a == b and math.copysign(1, a) == math.copysign(1, b) or math.isnan(a) and math.isnan(b)


def _say_that_it_changes(builder: VariableBuilder, value: float) -> None:
    """Dynamo was not asked about the value of before, and would take this one for the first."""
    other = FrameStateSizeEntry.make_scalar(value + 1.0)
    process_automatic_dynamic(builder.tx, builder.source.name, other, is_unspecialized_nn_module=True)


@integration("torch._dynamo.variables.builder", touches="VariableBuilder.wrap_symfloat", why="a module's floats are constants")
def _keep_floats(module: ModuleType) -> None:
    module.VariableBuilder.wrap_symfloat = _keeping(module.VariableBuilder.wrap_symfloat)
