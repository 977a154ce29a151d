"""What a match must satisfy before it may be made. Each rule either passes or refuses with a reason for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import FakeTensorMode, OpOverload, has_kernel, opdef_of, pytree
from sloth.rewriter.graph.aliasing import copies_by_layout, is_plain, may_write, root, storages, writers
from sloth.rewriter.graph.ambient import under
from sloth.rewriter.graph.canonical import ALIASES, POINTWISE, VIEWS
from sloth.rewriter.graph.lower import LoweredGraph
from sloth.rewriter.graph.record import fakes, rebuilt
from sloth.rewriter.graph.scratch import Compared, into, trying
from sloth.rewriter.graph.value import Meta, Symbol, Value, literal_key, same_literal, values_in
from sloth.rewriter.match.domain import outside
from sloth.rewriter.match.matcher import Match, Refused
from sloth.rewriter.match.pattern import ARGUMENTS
from sloth.rewriter.notices import warn_once
from sloth.rewriter.plan.lazy_outputs import deferrable, only_given_out
from sloth.rewriter.plan.materialize import held_results, materialized_values, source_values
from sloth.rewriter.plan.trained import asked_for_nothing

NEVER_CAST = frozenset({"add", "sub", "mul", "div", "neg", "mean", "where", "silu", "sigmoid", "tanh", "relu", "sqrt"})


@dataclass
class LegalityContext:
    """Where matches are judged: a graph's shadow, its nodes that a gradient comes to, fakes to try operators on, and what they
    gave for each signature.
    """

    view: LoweredGraph
    mode: FakeTensorMode
    trained: frozenset[fx.Node]
    tried: dict[Any, Any] = field(default_factory=dict)
    called: tuple[Match, Sequence[torch.Tensor], dict[Value, torch.Tensor]] | None = None  # whose backward is to be tried next

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate(self.view.gm.graph.nodes)}


def check(match: Match, context: LegalityContext) -> None:
    """Raise Refused where the rewrite is not proven legal."""
    with under(match.roots[0].region.autocast):
        for rule in RULES:
            try:
                rule(match, context)
            except Refused:
                raise
            except Exception as e:  # a bug of the entry costs its matches, not the graph
                why = f"{type(e).__name__}: {e}".split("\n")[0]
                warn_once(f"pattern {match.pattern.name!r} is not used where it raises: {why}")
                raise Refused("error", f"{match.pattern.name} raises {why}") from e


def plain(match: Match, context: LegalityContext) -> None:
    """Its tensors are plain ones: a subclass that holds other tensors (DTensor, torchao's) says itself what an operator does."""
    of = [*match.values, *match.roots, *(h for o in operands_of(match) for h in source_values(o))]
    if dressed := [n for v in of for n in v.nodes if not is_plain(n)]:
        raise Refused("subclass", f"`{dressed[0].name}` is a {type(dressed[0].meta['example_value']).__name__}")


def memory(match: Match, context: LegalityContext) -> None:
    """Of memory that somebody writes, it reads only what tensors of the pattern lie in, and when all of it is written; a result
    may be written later, by its readers, like the fresh tensor it is.
    """
    tensors = [h for t in match.tensors.values() for h in source_values(t)]
    others = [h for o in other_operands(match) for h in source_values(o)]
    fresh = {r for r in match.roots if not any(u in match.values for u in r.users)}
    for v in (*match.values - fresh, *others):
        if v.mutated_storage and not (v in match.values and v.op in ALIASES and root(v) in map(root, tensors)):
            raise Refused("mutation", f"{_name(v)} is written in place")
    view, made = context.view, [*match.values, *materialized_values(match.tensors.values())]
    first = min((context.order[v.origin] for v in made if any(i.mutated_storage for i in v.inputs)), default=0)
    for h in (h for h in tensors if h.mutated_storage):
        copies = [context.order[n] for v in _views(h) for n in v.nodes if storages(n, view.gm) != storages(h.nodes[0], view.gm)]
        if any(context.order[w] >= min([first, *copies]) for w in writers(h, view.writes, view.gm)):
            raise Refused("mutation", f"{_name(h)} is written in place after it is read")
    for r in match.roots:  # `contiguous` of a result copies it or does not: its layout says so, and an operator's may be another
        own = storages(r.nodes[0], view.gm) if r.nodes else ()
        for v in _views(r, ALIASES | {"copy"}):
            copied = any(storages(n, view.gm) != own or copies_by_layout(n) for n in v.nodes)
            if copied and (r.mutated_storage or v.mutated_storage):
                raise Refused("mutation", f"{_name(v)} may be a copy of {_name(r)}, and one of them is written in place")


def _views(v: Value, ops: Set[str] = ALIASES) -> list[Value]:
    """It, and what a view of it is."""
    return [v, *(w for u in v.users if u.op in ops and u.args[0] is v for w in _views(u, ops))]


def regions(match: Match, context: LegalityContext) -> None:
    """It does not span a change of grad mode, nor of autocast that would change anything."""
    own = match.roots[0].region
    if any(v.region != own and (v.region._replace(autocast=own.autocast) != own or may_be_cast(v)) for v in match.values):
        raise Refused("region", "it spans a change of grad mode or autocast")
    if match.roots[0].region.transforms:
        raise Refused("region", "it is inside of a transform of torch.func")


def may_be_cast(v: Value) -> bool:
    """Might autocast cast an operand of this operation? Of some it casts to fp32 alone."""
    if v.op in VIEWS | NEVER_CAST:
        return False
    return not (v.op in ("rsqrt", "exp", "sum") and all(x.meta is not None and x.meta.dtype == torch.float32 for x in v.inputs))


def operands(match: Match, context: LegalityContext) -> None:
    """Operands and results are values of the traced graph (operands also what can be written anew of some)."""
    for v in operands_of(match):
        if hidden := [h for h in ([v] if _around(v, context) else source_values(v)) if not h.nodes]:
            raise Refused("hidden", f"operand {hidden[0].op} is computed inside one call")
        if made := [h for h in source_values(v) if h in match.roots]:
            raise Refused("convexity", f"{_name(made[0])} is an operand and a result")
    for v in match.roots:
        if not held_results(v):
            raise Refused("hidden", f"result {v.op} is computed inside one call")


def escapes(match: Match, context: LegalityContext) -> None:
    """What is used elsewhere too is a result, or cheap to have twice, or given out and computed when it is read."""
    cheap: dict[Value, bool] = {}
    own = {n for v in match.values for n in v.nodes}

    def is_cheap(v: Value) -> bool:
        if v not in match.values:
            return True
        if v not in cheap:
            cheap[v] = v.op in VIEWS | POINTWISE and all(map(is_cheap, v.inputs))
        return cheap[v]

    for v in match.values - set(match.roots):
        given_out = any(user.op == "output" for n in v.nodes for user in n.users)
        elsewhere = any(u not in match.values and _alive(u, own) and not only_given_out(match, u, context.view) for u in v.users)
        if not is_cheap(v) and (elsewhere or given_out and not deferrable(match, v, context.view)):
            raise Refused("escape", f"{_name(v)} is used elsewhere too")
        if any(_read_within_and_without(n, match, context.view) for n in v.nodes) and _is_widened(v, match):
            why = f"gradients of {_name(v)}, which is read elsewhere too, are added up in {v.meta.dtype} and rounded once"
            raise Refused("escape", why)


def _is_widened(v: Value, match: Match) -> bool:
    """Do gradients come back through a cast to a wider dtype, between `v` and what the match reads?"""
    if v not in match.values or not v.meta or not v.meta.requires_grad:
        return False
    if v.op == "cast" and torch.promote_types(v.meta.dtype, v.args[0].meta.dtype) == v.meta.dtype:
        return True
    return any(_is_widened(x, match) for x in v.inputs)


def _read_within_and_without(n: fx.Node, match: Match, view: LoweredGraph) -> bool:
    """Is what the node holds read by the match, and by others who hand a gradient back?"""
    read = [list(values_in((view.env.get(u),))) for u in n.users if u.users or u.op == "output"]
    within = [values for values in read if any(v in match.values for v in values)]
    others = [values for values in read if values not in within]
    return bool(within) and any(not values or any(v.meta is None or v.meta.requires_grad for v in values) for values in others)


def domain(match: Match, context: LegalityContext) -> None:
    """Operands and numbers are such that the operator's formula holds for them, as it states itself."""
    names = (a.name for a in match.pattern.op._schema.arguments)
    if why := outside(match.pattern.op, dict(zip(names, match_arguments(match), strict=True))):
        raise Refused("domain", why)


def gradients(match: Match, context: LegalityContext) -> None:
    """An operator without a backward never enters a graph that needs its gradient, nor one that skips a tensor that needs it; no
    result needs a gradient that needed none; and where one comes to some of the results alone, they are made of all that needs
    it.
    """
    if unbound := [v for v in other_operands(match) if v.meta.requires_grad]:
        raise Refused("gradient", f"{_name(unbound[0])} is no operand of the pattern, and needs a gradient")
    wanting = [name for name, v in match.tensors.items() if v.meta.requires_grad]
    if not wanting or not match.roots[0].region.grad:
        return
    if not has_backward(match.pattern.op):
        raise Refused("gradient", f"{match.pattern.op} has no registered backward")
    if skipped := [name for name in wanting if name in match.pattern.no_grad]:
        raise Refused("gradient", f"{match.pattern.op} gives no gradient to {', '.join(skipped)}")
    if frozen := [r for r in match.roots if not r.meta.requires_grad]:
        raise Refused("gradient", f"{_name(frozen[0])} needs no gradient, and would where {', '.join(wanting)} need one")
    if idle := asked_for_nothing(match, context.trained):
        raise Refused("gradient", f"no gradient comes to what {_name(idle[0])} is read for, and one to its other results")


def conditions(match: Match, context: LegalityContext) -> None:
    """What the pattern itself asks."""
    for condition in match.pattern.checks:
        condition(match)


def results(match: Match, context: LegalityContext) -> None:
    """The operator's results have the shapes and dtypes of what they replace."""
    try:
        found = operator_metas(match, context)
    except Compared as e:
        raise Refused("sizes", f"{match.pattern.op}: {e}") from e
    except Exception as e:
        raise Refused("operator", f"{match.pattern.op} does not accept these operands: {type(e).__name__}: {e}"[:300]) from e
    if len(found) < len(match.roots) or any(
        str(r.type) not in ("Tensor", "List[Tensor]") for r in match.pattern.op._schema.returns
    ):
        raise Refused("operator", f"{match.pattern.op} does not return {len(match.roots)} tensors")
    for r, m in zip(match.roots, found, strict=False):
        if r.meta.dtype != m.dtype or not same_literal(r.meta.shape, m.shape):
            raise Refused(
                "dtype", f"{match.pattern.op} gives {m.dtype} {list(m.shape)}, the model {r.meta.dtype} {list(r.meta.shape)}"
            )


def backward(match: Match, context: LegalityContext) -> None:
    """The operator's backward, tried on operands like these, gives a gradient to each that needs one."""
    if not any(r.meta.requires_grad for r in match.roots):
        return
    try:
        given = operator_gradients(match, context)
    except Compared as e:
        raise Refused("sizes", f"the backward of {match.pattern.op}: {e}") from e
    if lost := [name for name, v in match.tensors.items() if v.meta.requires_grad and v not in given]:
        raise Refused("gradient", f"{match.pattern.op} gives no gradient to {', '.join(lost)}")


# The operator is tried last, on operands that its pattern asks for: torch logs what fails on fakes.
RULES: tuple[Callable[[Match, LegalityContext], None], ...] = (
    plain, memory, regions, operands, domain, gradients, escapes, conditions, results, backward
)  # fmt: skip


def has_backward(op: OpOverload) -> bool:
    """Is there an autograd formula for `op`, or is it composed of operators that have one?"""
    if (definition := opdef_of(op)) is not None:  # custom_op and triton_op: an autograd kernel that may only raise
        return definition._backward_fn is not None
    key, has = op.name(), has_kernel
    return any(has(key, k) for k in ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd"))


def takes_many(op: OpOverload) -> bool:
    """Does one call of it stand for several matches? Then it gives a list of results, and takes lists: an element for each."""
    return str(op._schema.returns[0].type) == "List[Tensor]"


def is_list(argument: torch.Argument) -> bool:
    return isinstance(argument.type, torch.ListType)


def match_arguments(match: Match) -> tuple:
    """The operator's arguments for one match in schema order: bound Values, numbers, the variant's options, defaults; None for a
    tensor it lacks.
    """
    options = {n: o(match) if callable(o) else o for n, o in match.variant.options.items()}
    given = {**match.tensors, **match.numbers, **options, **ARGUMENTS.get().get(match.pattern.name, {})}
    return tuple(given.get(a.name, a.default_value) for a in match.pattern.op._schema.arguments)


def operands_of(match: Match) -> list[Value]:
    """Its tensors, and other values of the graph that its options hand to the operator: what a tensor of it is computed from."""
    return list(dict.fromkeys((*match.tensors.values(), *values_in(match_arguments(match)))))


def other_operands(match: Match) -> list[Value]:
    """Those that are no tensors of the pattern."""
    own = set(match.tensors.values())
    return [v for v in operands_of(match) if v not in own]


def call_arguments(matches: Sequence[Match], tensor: Callable[[Value], Any]) -> tuple:
    """The arguments of one call for these matches, its tensors made by `tensor`."""
    op = matches[0].pattern.op
    many = takes_many(op)
    each = zip(op._schema.arguments, *map(match_arguments, matches), strict=True)

    def made(a: Any) -> Any:
        return tensor(a) if isinstance(a, Value) else rebuilt(a, made)

    return tuple(made(list(values) if many and is_list(a) else values[0]) for a, *values in each)


def operator_metas(match: Match, context: LegalityContext) -> list[Meta]:
    """What the operator gives for operands like these."""
    arguments = call_arguments([match], lambda v: v.meta[:3])
    key = (match.pattern.op, literal_key(arguments), match.roots[0].region.autocast)
    if key not in context.tried:
        context.tried[key] = [Meta.of(t) for t in _forward(match, context)]
    return context.tried[key]


def _forward(match: Match, context: LegalityContext) -> Sequence[torch.Tensor]:
    """The operator's results on fakes. With autograd where its backward is to be tried next, so that it is called once for both;
    what that raises, it may not raise without.
    """
    context.called = None
    if any(r.meta.requires_grad for r in match.roots) and _kind_of_call(match) not in _GRADIENTS:
        try:
            context.called = match, *_called(match, context, True)
            return context.called[1]
        except Exception:
            pass
    return _called(match, context, False)[0]


def _called(match: Match, context: LegalityContext, grad: bool) -> tuple[Sequence[torch.Tensor], dict[Value, torch.Tensor]]:
    """Results of the operator, and the fakes that it was called on."""
    leaves = operands_of(match)
    tensors = dict(zip(leaves, fakes([v.meta for v in leaves], context.mode), strict=True))
    for v in leaves if grad else ():
        tensors[v].requires_grad_(v.meta.requires_grad)
    with trying(context.mode), torch.set_grad_enabled(grad):
        out = match.pattern.op(*pytree.tree_map(lambda a: into(a, context.mode), call_arguments([match], tensors.__getitem__)))
    return (out,) if isinstance(out, torch.Tensor) else out, tensors


_GRADIENTS: dict[Any, set[int]] = {}  # for each kind of call, the operands that the operator gives a gradient to


def _kind_of_call(match: Match) -> tuple:
    leaves = operands_of(match)

    def kind(v: Value) -> tuple:
        sizes = tuple(isinstance(s, Symbol) for s in v.meta.shape)
        return leaves.index(v), sizes, v.meta.dtype, v.meta.device.type, v.meta.requires_grad

    given = pytree.tree_map(lambda a: type(a) if isinstance(a, Symbol) else a, call_arguments([match], kind))
    return match.pattern.op, literal_key(given), match.roots[0].region.autocast


def operator_gradients(match: Match, context: LegalityContext) -> set[Value]:
    """The operands that its backward gives a gradient to. Tried on fakes, once in a process for operands of the same dtypes and
    dimensions: it is no question of numbers, nor of sizes, but of which of these are symbols.
    """
    leaves, key = operands_of(match), _kind_of_call(match)
    if key not in _GRADIENTS:
        called, context.called = context.called, None
        out, tensors = called[1:] if called is not None and called[0] is match else _called(match, context, True)
        wanted = [v for v in leaves if v.meta.requires_grad]
        with trying(context.mode), torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            out = [t for t in out[: len(match.roots)] if t.requires_grad]
            of, ones = [tensors[v] for v in wanted], [torch.empty_like(t) for t in out]
            found = torch.autograd.grad(out, of, ones, allow_unused=True) if out else [None] * len(of)
        _GRADIENTS[key] = {leaves.index(v) for v, g in zip(wanted, found, strict=True) if g is not None}
    return {leaves[i] for i in _GRADIENTS[key]}


def _around(v: Value, context: LegalityContext) -> bool:
    """Is it a value of the graph around this body, to be passed in?"""
    return not context.view.shadow.owns(v)


def _alive(v: Value, own: Set[fx.Node]) -> bool:
    """Does anybody but the match's `own` nodes read it in the end? Dead code of the model counts as nobody, and so does what a
    rule made of other values: those read the same, and whoever computes it computes them. A rule may have looked through a value
    (`a / sqrt(x)`, which is `a · rsqrt(x)`): the node that holds it is read by the match alone, and goes with it.
    """
    return any(_is_read(n, own) for n in v.nodes) or not v.replaces and any(_alive(u, own) for u in v.users)


def _is_read(node: fx.Node, own: Set[fx.Node]) -> bool:
    """Few calls lie between what a rule looked through and the match: beyond them, somebody does."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo and len(seen) < 8:
        n = todo.pop()
        readers = [u for u in n.users if u not in own and u not in seen]
        if any(u.op == "output" or u.is_impure() or may_write(u) for u in readers):
            return True
        seen.update(readers)
        todo += readers
    return bool(todo)


def _name(v: Value) -> str:
    node: fx.Node | None = v.nodes[0] if v.nodes else v.origin
    return f"`{node.name}`" if node is not None else v.op
