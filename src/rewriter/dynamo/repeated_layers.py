"""Equal layers are traced once: what Dynamo found of the first is stamped out for the others.

Dynamo takes half a second to two seconds for each layer of a model with adapters and quantised weights, since it follows every
line of their Python. For graphs of sloth a layer (an item of an `nn.ModuleList`) whose call was traced becomes a template: the
nodes that it added to the graph, and the guards on what was read of it. A later layer takes its place in the template if

    its arguments are of the same kinds (constants equal, tensors of equal sizes, strides, dtype and need of a gradient),
    the ambient modes are the same (gradients, autocast, inference),
    and every guard on the first layer holds for the later one: each value that was read is of the same type, equal, or the
    same object, as the guard asks.

So its trace would have been the same, but for its own tensors. They become inputs of the graph as always, and the later layer
gets guards of its own, the same as if it had been traced. A guard of a kind that is not known here, a side effect, or a result
that is more than tensors: it is traced. (torch 2.12 has the like for `nested_compile_region`; the idea of judging by the guards
is that one's, Note [invoke_subgraph subgraph reuse].)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence, Set
from functools import wraps
from itertools import takewhile
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from sloth.compat.dispatch import HigherOrderOperator, TracingContext, pytree
from sloth.compat.dynamo import (
    ConstantVariable,
    Guard,
    LazyVariableTracker,
    ListVariable,
    Source,
    SymNodeVariable,
    TensorVariable,
    TupleVariable,
    UnspecializedNNModuleVariable,
    ValueMutationNew,
    VariableTracker,
    get_fake_value,
    install_guard,
    is_ours,
    wrap_fx_proxy,
)
from sloth.integrations.integration import integration
from sloth.rewriter.dynamo.called_modules import called_in
from sloth.rewriter.dynamo.guards_of_layers import NotAlike, Place, core, tensor_kind, without_implied
from sloth.rewriter.graph.aliasing import tensors
from sloth.rewriter.graph.ambient import current
from sloth.rewriter.notices import log

ITEM = re.compile(r"_modules\['\d+'\]\)*$")  # of a ModuleList, as the name of its source ends
BODIES = ("wrap_body", "fwd_body", "bwd_body")  # as Dynamo calls those of checkpoints and autograd functions
VALUES = (int, float, str, bytes, tuple, frozenset, torch.dtype, torch.device, torch.Size)
MOST = 4  # templates of one class, in one graph: dense and sparse layers, the first of a model
TEMPLATES = "sloth_templates"  # attribute of Dynamo's OutputGraph: by class and modes


@dataclasses.dataclass
class Template:
    """What one call of a layer added to a graph."""

    module: torch.nn.Module
    source: Source
    arguments: list[Any]  # as `leaves` gives them
    nodes: list[fx.Node]
    result: Any  # a pytree of nodes and constants
    called: list[torch.nn.Module]  # the layer, and what it calls
    guards: list[Guard] | None = None  # on what was read of the layer


# ---------------------------------------------------------------- the hook


def _once(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's `trace` of a module's call."""

    @wraps(trace)
    def call_function(self: UnspecializedNNModuleVariable, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not _is_layer(self, tx):
            return trace(self, tx, args, kwargs)
        key = type(self.value), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), current()
        known = vars(tx.output).setdefault(TEMPLATES, {}).setdefault(key, [])
        try:
            arguments = leaves((tuple(args), kwargs))
        except NotAlike:
            return trace(self, tx, args, kwargs)
        for template in known:
            try:
                return stamp(template, self, arguments, tx)
            except NotAlike as why:
                log.debug("sloth: %s is traced: %s", self.source.name, why)
        return _recorded(trace, self, tx, args, kwargs, arguments, known)

    return call_function


def _is_layer(module: UnspecializedNNModuleVariable, tx: Any) -> bool:
    if not is_ours(tx) or module.source is None or tx.output.current_tracer.parent is not None or tx.output.export:
        return False
    return ITEM.search(module.source.name) is not None and any(module.value.children()) and _is_plain(module)


def _is_plain(module: UnspecializedNNModuleVariable) -> bool:
    """Hooks, and forward functions of one module, do things that no guard tells of."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any("forward" in vars(m) or any(vars(m)[h] for h in hooks) for m in module.value.modules())


def _recorded(trace, self, tx, args, kwargs, arguments, known):
    graph, effects = tx.output.current_tracer.graph, tx.output.side_effects
    last, before, called = next(iter(reversed(graph.nodes))), _effects(effects), len(called_in(tx))
    result = trace(self, tx, args, kwargs)
    if len(known) < MOST and tx.output.current_tracer.graph is graph and _effects(effects, before[0].keys()) == before:
        try:
            known.append(_template(self, arguments, graph, last, result, called_in(tx)[called:]))
        except NotAlike as why:
            log.debug("sloth: no template of %s: %s", self.source.name, why)
    return result


def _effects(effects: Any, known: Set[Any] | None = None) -> Any:
    """What Python would see when the graph has run: changes of objects that there were, or that are `known` from before."""
    changed = effects.store_attr_mutations.items()
    seen = {o: {k: id(v) for k, v in attrs.items()} for o, attrs in changed if known is None or o in known or _was_there(o)}
    modified = sum(
        _was_there(o) and bool(getattr(o.mutation_type, "is_modified", False)) for o in effects.id_to_variable.values()
    )
    return seen, len(effects.save_for_backward), len(effects.tensor_hooks), modified


def _was_there(variable: Any) -> bool:
    return "Existing" in type(getattr(variable, "mutation_type", None)).__name__


# ---------------------------------------------------------------- arguments and results


def leaves(a: Any) -> list[Any]:
    """Arguments as a flat list: ("tensor", node), ("constant", value), and how they are nested. Raises NotAlike."""
    if isinstance(a, LazyVariableTracker):
        a = a.realize()
    if isinstance(a, TensorVariable | SymNodeVariable):
        return [("tensor", a.as_proxy().node)]
    if isinstance(a, ConstantVariable):
        return [("constant", type(a.value), a.value, repr(a.value) if isinstance(a.value, float) else "")]  # -0.0
    if isinstance(a, TupleVariable | ListVariable):
        return [(type(a), len(a.items)), *(leaf for x in a.items for leaf in leaves(x))]
    if isinstance(a, tuple):
        return [("tuple", len(a)), *(leaf for x in a for leaf in leaves(x))]
    if isinstance(a, dict):
        return [("dict", *a), *(leaf for x in a.values() for leaf in leaves(x))]
    if isinstance(a, VariableTracker) and a.source is not None:
        return [("source", a.source)]
    raise NotAlike(f"an argument is a {type(a).__name__}")


def _nodes_of(result: Any) -> Any:
    if isinstance(result, LazyVariableTracker):
        result = result.realize()
    if type(result) is TensorVariable:
        return result.as_proxy().node
    if isinstance(result, ConstantVariable):
        return result
    if type(result) in (TupleVariable, ListVariable):
        return type(result), [_nodes_of(x) for x in result.items]
    raise NotAlike(f"its result holds a {type(result).__name__}")


def _paired(template: Template, arguments: list[Any]) -> dict[fx.Node, fx.Node]:
    """For each node among the template's arguments, the one in its place: itself, or what was computed since. What all layers are
    given (masks, tables of positions) is one and the same, so that what is known of it holds in all of them.
    """
    if len(arguments) != len(template.arguments):
        raise NotAlike("it is called with other arguments")
    found: dict[fx.Node, fx.Node] = {}
    for old, new in zip(template.arguments, arguments, strict=True):
        if old[0] != "tensor" or new[0] != "tensor":
            if old != new:
                raise NotAlike(f"an argument is {new}, not {old}")
        elif old[1] is not new[1] and (new[1] < template.nodes[0] or _described(old[1]) != _described(new[1])):
            raise NotAlike(f"{new[1]} is another one than {old[1]}")
        elif found.setdefault(old[1], new[1]) is not new[1]:
            raise NotAlike(f"{new[1]} and {found[old[1]]} in the place of {old[1]}")
    if len(set(found.values())) < len(found):
        raise NotAlike("two arguments are one")
    return found


def _described(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    return tensor_kind(value) if isinstance(value, torch.Tensor) else str(value)


# ---------------------------------------------------------------- templates


def _template(
    layer: Any, arguments: list[Any], graph: fx.Graph, last: fx.Node, result: Any, called: list[torch.nn.Module]
) -> Template:
    nodes = list(takewhile(lambda n: n is not last, reversed(graph.nodes)))[::-1]
    nodes = [n for n in nodes if n.op != "placeholder"]
    for n in nodes:
        if n.op not in ("call_function", "call_method") and not (n.op == "get_attr" and n.target.startswith(BODIES)):
            raise NotAlike(f"it holds {n.format_node()}")
        if isinstance(n.meta.get("example_value"), torch.SymFloat) or any(map(free_unbacked_symbols, _examples(n))):
            raise NotAlike(f"it holds a number that is known when it runs: {n}")
        higher = isinstance(n.target, HigherOrderOperator)
        if higher and not _memory(n).isdisjoint(m for a in n.all_input_nodes for m in _memory(a)):
            raise NotAlike(f"{n} gives out what it was given")
    if not nodes:
        raise NotAlike("it computes nothing")
    told = _nodes_of(result)
    for n in pytree.tree_leaves(told):
        if isinstance(n, fx.Node) and n not in nodes:
            raise NotAlike("its result is computed elsewhere")
    return Template(layer.value, core(layer.source), arguments, nodes, told, called)


def _examples(node: fx.Node) -> list[torch.Tensor]:
    return list(tensors(node.meta.get("example_value")))


def _memory(node: fx.Node) -> set[int]:
    found = _examples(node)
    return {t.untyped_storage()._cdata for t in found if t.layout == torch.strided}


def stamp(template: Template, layer: UnspecializedNNModuleVariable, arguments: list[Any], tx: Any) -> VariableTracker:
    """The layer's call, made of the template. Raises NotAlike, and has then added nothing but guards that hold and inputs."""
    graph = tx.output.current_tracer.graph
    if any(n.graph is not graph or n._erased for n in template.nodes):
        raise NotAlike("its graph was rolled back")
    paired = _paired(template, arguments)
    place = Place(template.source, core(layer.source), tx)
    if template.guards is None:
        known = TracingContext.get().guards_context.dynamo_guards
        template.guards = without_implied([g for g in known if place.moves(g.originating_source)], known)
    own = place.moved_guards(template.guards)
    inputs: dict[fx.Node, Source] = {}
    for a in dict.fromkeys(a for n in template.nodes for a in n.all_input_nodes):
        source = getattr(a.meta.get("grapharg"), "source", None)
        if a.op == "placeholder" and a not in paired and source is not None and place.moves(source):
            inputs[a] = place.moved(source)
    for guard in own:
        if guard.create_fn_name() == "TENSOR_MATCH":
            place.tensor(guard.originating_source)
        else:
            install_guard(guard)
    env = dict(paired)
    for n, source in inputs.items():
        env[n] = place.tensor(source).as_proxy().node
    last = next(iter(reversed(graph.nodes)))
    try:
        made = _copied(template, env, layer, tx)
    except Exception as e:
        for n in takewhile(lambda n: n is not last, reversed(graph.nodes)):
            graph.erase_node(n)
        raise NotAlike(f"its nodes cannot be copied: {type(e).__name__}: {e}") from e

    called_in(tx).extend(template.called)

    def result(told: Any) -> Any:
        if isinstance(told, fx.Node | ConstantVariable):
            return made[told] if isinstance(told, fx.Node) else told
        kind, items = told
        return kind([result(x) for x in items], mutation_type=ValueMutationNew())

    return result(template.result)


def _copied(template: Template, env: dict[fx.Node, fx.Node], layer: Any, tx: Any) -> dict[fx.Node, VariableTracker]:
    """The template's nodes at the end of the graph, and the variables of those that its result is made of."""
    graph = tx.output.current_tracer.graph
    wanted = {n for n in pytree.tree_leaves(template.result) if isinstance(n, fx.Node)}
    renamed = {str(id(old)): str(id(new)) for old, new in zip(template.module.modules(), layer.value.modules(), strict=True)}
    variables = {}
    for n in template.nodes:
        new = env[n] = graph.node_copy(n, lambda a: env.get(a, a))
        new.meta = {k: v for k, v in n.meta.items() if k != "example_value"}
        if stack := new.meta.get("nn_module_stack"):
            new.meta["nn_module_stack"] = type(stack)((renamed.get(str(k), k), v) for k, v in stack.items())
        if n.op == "get_attr":
            new.meta.update({k: v for k, v in n.meta.items() if k == "example_value"})
            continue
        value = _anew(n, tx) if isinstance(n.target, HigherOrderOperator) else get_fake_value(new, tx)
        if n in wanted:
            variables[n] = wrap_fx_proxy(tx, fx.Proxy(new, tx.output.current_tracer), example_value=value)
        else:
            new.meta["example_value"] = value
    return variables


def _anew(node: fx.Node, tx: Any) -> Any:
    """Fakes like those that the node gave, in memory of their own."""

    def like(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return t
        made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device, requires_grad=t.requires_grad)
        return made if t.is_leaf else made.clone()

    with tx.output.fake_mode, torch.enable_grad():
        return pytree.tree_map(like, node.meta["example_value"])


@integration(
    "torch._dynamo.variables.nn_module",
    touches="UnspecializedNNModuleVariable.call_function (layers)",
    why="equal layers are traced once",
)
def _trace_once(module: ModuleType) -> None:
    module.UnspecializedNNModuleVariable.call_function = _once(module.UnspecializedNNModuleVariable.call_function)
