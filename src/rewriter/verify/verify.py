"""`sloth.verify(model, batch)`: is what the backend makes of a model as exact as the model?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch

from sloth.compat.dynamo import config
from sloth.options import parse
from sloth.rewriter.backend import listening, sloth
from sloth.rewriter.explain import unchanged
from sloth.rewriter.verify.report import NOT_CHECKED, Checked, Verification
from sloth.rewriter.verify.step import check_step, without_dropout


def verify(model: torch.nn.Module, batch: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Verification:
    """Check what the backend makes of one training call `model(**batch)`, against eager and against fp64.

    First each distinct rewrite: it is cut out and run forward and backward, what it replaces and what replaces it, on the tensors
    of this call and on random ones. Then the whole step: loss, logits and each parameter's gradient. The error ‖· − fp64‖ of each
    result may be 1.05 times eager's (of the same dtypes); what is beyond that beyond its 99.9 % interval is wrong, and so is a
    gradient that is lost. What cannot be checked is listed with the reason, and is not counted as good.

    model: any nn.Module, compiled or not, on the device and under the autocast that are to be checked; dropout is off meanwhile.
    Its parameters, gradients, buffers and mode, and the random state, are left as they were. batch: the keyword arguments of one
    training call. options: of the backend, as for torch.compile. The whole step needs memory for the model, its
    gradients and activations in fp64.

    Raises TypeError for a model that is no nn.Module or a batch that is no mapping, ValueError for a model without a loss or for
    an option that is not known, and whatever the model itself raises.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"verify needs an nn.Module, not {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"verify needs the keyword arguments of one call as a mapping, not {type(batch).__name__}")
    module = getattr(model, "_orig_mod", model)
    given, found = dict(options or {}), Verification()
    parse(given)  # a name that is not known is told now
    unlimited = config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)
    with unchanged(module), without_dropout(module), unlimited, torch.enable_grad():
        with listening() as graphs:
            torch.compile(module, backend=_backend(given | {"sloth.verify": True, "sloth.inner_backend": "eager"}))(**batch)
        found.rewrites = [c for graph in graphs for c in graph.verified]
        found.rewrites += [
            Checked("a graph", "", "", 0, 0, NOT_CHECKED, f"it is left as it was: {graph.untouched}")
            for graph in graphs if graph.untouched
        ]  # fmt: skip
        found.step = check_step(module, torch.compile(module, backend=_backend(given)), batch)
        if (lazy := sum(len(graph.deferred) for graph in graphs)) and not any(r.what == "logits" for r in found.step.results):
            why = "it is computed when it is read, and only `logits` are read here"
            found.rewrites.append(Checked("an output", "", "", 0, lazy, NOT_CHECKED, why))
    return found


def _backend(options: dict[str, Any]) -> Callable[..., Any]:
    """One that Dynamo has not seen: what it traced for another one it would not trace again."""

    @wraps(sloth)  # what Dynamo is taught, it is taught for graphs of a backend of this name
    def backend(gm: Any, example_inputs: Any) -> Any:
        return sloth(gm, example_inputs, options=options)

    return backend
