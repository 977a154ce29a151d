"""Private names of Dynamo, which sloth.integrations and sloth.rewriter.dynamo teach. Where one is gone, that module is off."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

with suppress(ImportError):
    from torch._dynamo import config  # recompile_limit, assume_static_by_default, automatic_dynamic_shapes, …
with suppress(ImportError):
    from torch._dynamo.backends.registry import lookup_backend  # sloth.inner_backend
with suppress(ImportError):
    from torch._dynamo.utils import counters  # graph breaks, for sloth.explain
with suppress(ImportError):
    from torch._dynamo.eval_frame import innermost_backend  # is a call compiled for sloth? then generate() makes it without
with suppress(ImportError):
    from torch._dynamo.variables.misc import GetAttrVariable, SuperVariable  # super().__call__.__self__, of LLaMA-Factory

with suppress(ImportError):
    from torch._dynamo.decorators import skip  # a function's frame is left, what it calls is traced; marks the function itself
with suppress(ImportError):
    from torch._dynamo.exc import RestartAnalysis, SkipFrame  # raised to steer Dynamo, through whatever compiles
    from torch._dynamo.exc import exceptions_allowed_to_be_fallback as breaks_the_graph
with suppress(ImportError):
    from torch._dynamo.callback import callback_handler  # when a compilation ends, Python's collector is as it was

with suppress(ImportError):
    from torch._dynamo import maybe_mark_dynamic  # of static caches, whose lengths are few, but more than one
STATIC_MARK = "_dynamo_static_input_type"  # attribute of a tensor that Dynamo takes for a constant (mark_static_address)

# ---------------------------------------------------------------- equal layers are traced once; a module's floats are constants

with suppress(ImportError):
    from torch._guards import Guard, GuardSource
with suppress(ImportError):
    from torch._dynamo.guards import install_guard
with suppress(ImportError):
    from torch._dynamo.guards import GuardBuilder  # CONSTANT_MATCH
with suppress(ImportError):
    from torch._dynamo.guards import _get_closure_vars as closure_vars  # what the names in a guard's code mean
with suppress(ImportError):
    from torch._dynamo.pgo import FrameStateSizeEntry, process_automatic_dynamic  # "this float changes"
with suppress(ImportError):
    from torch._guards import ChainedSource, Source  # where Dynamo found a value
    from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource, TypeSource
with suppress(ImportError):
    from torch._dynamo.utils import get_fake_value  # of a node, from those of its operands
with suppress(ImportError):
    from torch._dynamo.variables import ConstantVariable, LazyVariableTracker, ListVariable, TensorVariable
with suppress(ImportError):
    from torch._dynamo.variables import TupleVariable, UnspecializedNNModuleVariable
with suppress(ImportError):
    from torch._dynamo.variables.tensor import SymNodeVariable
with suppress(ImportError):
    from torch._dynamo.variables.base import ValueMutationNew, VariableTracker
with suppress(ImportError):
    from torch._dynamo.variables.builder import VariableBuilder, wrap_fx_proxy  # a value as an input; a node as a variable


def is_ours(tx: Any) -> bool:
    """Does Dynamo, whose InstructionTranslator `tx` is, trace for sloth? What it is taught holds for such graphs alone.

    But for two things that it can only be told for all: how to trace a function of PEFT's, and to skip a warning of
    transformers'.
    """
    return getattr(tx.output.compiler_fn, "__name__", None) == "sloth"


def allow_more_graphs() -> None:
    """Twice what Dynamo allows, unless somebody has chosen. Trainers of preferences have a graph for each pass, that of
    the policy, the reference, mismatched pairs; others when they evaluate, and others for a last batch of one row. Layers that
    generate have one of each kind, for one row and for several, with a mask and without.
    """
    if config.recompile_limit == 8:
        config.recompile_limit = 16
