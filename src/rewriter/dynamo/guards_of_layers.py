"""Guards on one layer, as guards on another: where each of them is, and whether it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Set
from functools import cache, partial
from typing import Any

import torch

from sloth.compat.dispatch import TracingContext
from sloth.compat.dynamo import (
    AttrSource,
    ChainedSource,
    DictGetItemSource,
    Guard,
    Source,
    TypeSource,
    VariableBuilder,
    VariableTracker,
    closure_vars,
    config,
)


class NotAlike(Exception):
    """The call cannot be made of a template; the message says why."""


def tensor_kind(t: torch.Tensor) -> tuple:
    layout = (str((*t.shape, *t.stride(), t.storage_offset())),) if t.layout == torch.strided else ()
    return type(t), t.dtype, t.device, t.requires_grad, t.is_leaf, t.layout, *layout


def core(source: Source) -> Source:
    """Without what only says of which kind the module is."""
    while "NNModuleSource" in type(source).__name__:
        source = source.base
    return source


class Place:
    """Where a later layer stands in for a template's."""

    def __init__(self, old: Source, new: Source, tx: Any):
        self.old, self.new, self.tx = old, new, tx
        self.known: dict[Source, Source | None] = {}
        self.scope = {"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}
        self.helpers, self.values = dict(closure_vars()), {}

    def moved(self, source: Source) -> Source:
        """The same of the later layer."""
        if source == self.old:
            return self.new
        if source not in self.known:
            parts = ((name, getattr(source, name)) for name in _parts(type(source)))
            changed = {k: m for k, v in parts if isinstance(v, Source) and (m := self.moved(v)) is not v}
            self.known[source] = dataclasses.replace(source, **changed) if changed else None
        return self.known[source] or source

    def moves(self, source: Source) -> bool:
        return self.moved(source) is not source

    def value(self, source: Source) -> Any:
        """What is there now. Of the commonest sources without torch's `eval`, which is a tenth of the time that a layer takes."""
        if source not in self.values:
            if isinstance(source, AttrSource):
                self.values[source] = getattr(self.value(source.base), source.member)
            elif type(source) is DictGetItemSource and not isinstance(source.index, Source):
                self.values[source] = self.value(source.base)[source.index]
            else:
                return source.get_value(self.scope, self.helpers, self.values)
        return self.values[source]

    def tensor(self, source: Source) -> VariableTracker:
        """The input of the graph that holds it."""
        return VariableBuilder(self.tx, source)(self.value(source))

    def moved_guards(self, guards: list[Guard]) -> list[Guard]:
        """Guards on the template's layer, on the later one. Raises NotAlike where one would not hold."""
        found, stack = [], TracingContext.extract_stack()  # of all the same
        for guard in guards:
            moved, how = self.moved(guard.originating_source), guard.create_fn
            if guard.create_fn_name() == "DUPLICATE_INPUT":
                how = partial(how.func, source_b=self.moved(_more(guard)[0]))
            try:
                holds = self.holds(guard, moved)
            except Exception as e:
                raise NotAlike(f"{guard.create_fn_name()} on {moved.name}: {type(e).__name__}: {e}") from e
            if not holds:
                raise NotAlike(f"{guard.create_fn_name()} on {moved.name}")
            found.append(Guard(moved, how, user_stack=stack))
        return found

    def holds(self, guard: Guard, moved: Source) -> bool:
        """Does what the guard asks of the template's layer, and what holds there, hold for the later one?"""
        kind, more = guard.create_fn_name(), _more(guard)
        if kind == "HASATTR":
            (a, name), (b, _) = (_attribute(source, more) for source in (guard.originating_source, moved))
            return hasattr(self.value(a), name) == hasattr(self.value(b), name)
        new = self.value(moved)
        if kind == "DUPLICATE_INPUT":
            return self.value(self.moved(more[0])) is new
        old, ask = self.value(guard.originating_source), _ASK.get(kind)
        return ask is not None and type(old) is type(new) and ask(old, new, more)


@cache
def _parts(kind: type[Source]) -> list[str]:
    """What a source of this kind is made of."""
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _attribute(source: Source, more: tuple) -> tuple[Source, str]:
    """The object and the name that the guard HASATTR asks for."""
    source = core(source)
    named = [m for m in more if isinstance(m, str)]
    return (source, named[0]) if named else (source.base, source.member)


def _more(guard: Guard) -> tuple:
    """What its kind is told beside the value."""
    return (*guard.create_fn.args, *guard.create_fn.keywords.values()) if isinstance(guard.create_fn, partial) else ()


def without_implied(guards: list[Guard], known: Iterable[Guard]) -> list[Guard]:
    """But for those that follow from others of `known`, or that torch makes nothing of. Two objects, each of which is guarded to
    be of a type, are of the same one: what is asked of the type (its methods, what it inherits) was asked of the template's
    layer. Whether types are one torch asks in Python, at each call; and nearly half of a layer's guards need not be made again.
    Of each kind one is made, though: where nothing is asked of a module's type, torch looks whether its attributes are those of
    before, and then no further, whatever its class has become.
    """
    typed = {g.originating_source for g in known if g.create_fn_name() == "TYPE_MATCH"}
    asked: dict[Any, Guard] = {}
    for guard in guards:
        kind, sources = guard.create_fn_name(), (guard.originating_source, *_sources(guard))
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT" and config.skip_nnmodule_hook_guards:  # of layers with hooks there is no template
            continue
        ways = [_way_from_type(s, typed) for s in sources]
        if None in ways:
            asked.setdefault(_question(guard), guard)
        elif kind != "DUPLICATE_INPUT":
            asked.setdefault((kind, *ways), guard)
    return list(asked.values())


def _way_from_type(source: Source, typed: Set[Source]) -> tuple | None:
    """The object, and by which kinds of steps this is found from its type. None of what is no part of its type, or where nothing
    guards that it is of it.
    """
    way: list[Any] = []
    while isinstance(source, ChainedSource):
        if isinstance(source, TypeSource):
            return (source.base, *way) if source.base in typed else None
        if any(isinstance(getattr(source, part), Source) for part in _parts(type(source)) if part != "base"):
            return None  # which part of it, another object says
        way.append(type(source))
        source = source.base
    return None


def _sources(guard: Guard) -> list[Source]:
    return [m for m in _more(guard) if isinstance(m, Source)]


def _question(guard: Guard) -> Any:
    """What makes two guards the same: torch asks once for each look that it took at a module."""
    try:
        asked = guard.originating_source, guard.create_fn_name(), tuple((type(m), m) for m in _more(guard))
        hash(asked)
    except TypeError:
        return id(guard)
    return asked


def _same_function(a: Any, b: Any, _: tuple) -> bool:
    return a is b or getattr(a, "__func__", a) is getattr(b, "__func__", b)


def _equal(a: Any, b: Any, _: tuple) -> bool:
    kinds = int | float | str | bytes | tuple | frozenset | torch.dtype | torch.device | torch.Size
    return a is b or isinstance(a, kinds) and a == b and repr(a) == repr(b)  # 0.0 is not -0.0


def _both_contain(a: Any, b: Any, more: tuple) -> bool:
    return (more[0] in a) == (more[0] in b)


def _same_length(a: Any, b: Any, _: tuple) -> bool:
    return len(a) == len(b)


def _same_keys(a: Any, b: Any, _: tuple) -> bool:
    return list(map(_key, a)) == list(map(_key, b))


def _key(k: Any) -> Any:
    return k if isinstance(k, str | int | type) else id(k)


_ASK: dict[str, Callable[[Any, Any, tuple], bool]] = {
    "TENSOR_MATCH": lambda a, b, _: isinstance(a, torch.Tensor) and tensor_kind(a) == tensor_kind(b),
    "TYPE_MATCH": lambda a, b, _: True,
    "NOT_PRESENT_IN_GENERIC_DICT": lambda a, b, more: more[0] not in b.__dict__,
    **dict.fromkeys(("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"), _both_contain),
    "EMPTY_NN_MODULE_HOOKS_DICT": lambda a, b, _: not a and not b,
    "CONSTANT_MATCH": _equal,
    "EQUALS_MATCH": _equal,
    "BOOL_MATCH": _equal,
    "NONE_MATCH": _equal,
    "ID_MATCH": lambda a, b, _: a is b,
    "CLASS_MATCH": lambda a, b, _: a is b,
    "BUILTIN_MATCH": lambda a, b, _: a is b,
    "FUNCTION_MATCH": _same_function,
    "CLOSURE_MATCH": _same_function,
    "SEQUENCE_LENGTH": _same_length,
    "LIST_LENGTH": _same_length,
    "DICT_LENGTH": _same_length,
    "DICT_KEYS_MATCH": _same_keys,
    "DICT_CONST_KEYS": _same_keys,
    "MAPPING_KEYS_CHECK": _same_keys,
}
