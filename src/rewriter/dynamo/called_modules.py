"""The modules whose calls Dynamo traced for a graph: how many sites it should have, whatever the matcher sees of it.

A count of the matcher's own is always complete: of a layer that it cannot look into it finds no site, and misses none.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from types import ModuleType
from typing import Any

from torch.nn import Module

from sloth.compat.dynamo import is_ours
from sloth.integrations.integration import integration
from sloth.rewriter.match.pattern import Construct

CALLED = "sloth_called"  # attribute of Dynamo's OutputGraph: the modules, in the order of their calls
_tracing = threading.local()


def called_in(tx: Any) -> list[Module]:
    """The modules called so far in the graph that Dynamo traces."""
    _tracing.output = weakref.ref(tx.output)
    return vars(tx.output).setdefault(CALLED, [])


def _counting(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's `trace` of a module's call."""

    @wraps(trace)
    def call_function(self: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if is_ours(tx):
            called_in(tx).append(self.value)
        return trace(self, tx, args, kwargs)

    return call_function


def expected_sites(compile_id: Any, constructs: Iterable[Construct]) -> dict[str, int]:
    """By construct, sites that the modules called in this compilation have; only models of transformers are known so well."""
    output = getattr(_tracing, "output", lambda: None)()
    called = getattr(output, CALLED, []) if output is not None and output.dynamo_compile_id == compile_id else []
    if not any(type(m).__module__.startswith("transformers.") for m in called):
        return {}
    found: Counter[str] = Counter()
    for module in called:
        for c in constructs:
            found[c.name] += _sites(c, module)
    return {name: n for name, n in found.items() if n}


def _sites(construct: Construct, module: Module) -> int:
    try:
        return construct.module(module, {})
    except Exception:  # somebody's count; what it costs is told where sites are missed
        return 0


@integration(
    "torch._dynamo.variables.nn_module",
    touches="UnspecializedNNModuleVariable.call_function",
    why="modules that are called are counted",
)
def _count_calls(module: ModuleType) -> None:
    module.UnspecializedNNModuleVariable.call_function = _counting(module.UnspecializedNNModuleVariable.call_function)
