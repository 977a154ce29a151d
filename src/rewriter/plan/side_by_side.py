"""Results that one call makes side by side, for a reader that takes them so: gate and up of an MLP.

Two results of a product with the same operand, of matrices that lie one below the other in memory, are one product. So are their
gradients' products, where the reader's backward pass gives both in one buffer. Made apart, each is memory of its own, and may be
let go by itself; what reads both at once, and nothing else does, has no use for that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from sloth.compat.dispatch import OpOverload
from sloth.rewriter.match.matcher import Match

Makes = Callable[[dict[str, Any], list[Match]], bool]
_MAKERS: dict[OpOverload, tuple[str, Makes]] = {}
_READERS: dict[OpOverload, tuple[OpOverload, Callable[[Any, Any, tuple], tuple]]] = {}


def made_side_by_side(op: OpOverload, argument: str, where: Makes) -> None:
    """`op` gives a list, or with `argument=True` one tensor in it, its results along the last dimension. `where` is asked of a
    call's arguments, by their names, and of the matches that it stands for.
    """
    _MAKERS[op] = argument, where


def read_side_by_side(op: OpOverload, packed: OpOverload, arguments: Callable[[Any, bool, tuple], tuple]) -> None:
    """`packed` is `op` for first operands that lie in one tensor: `arguments(tensor, swapped, rest)` are its arguments, where
    `op` has the two, or the second first, and then the rest.
    """
    _READERS[op] = packed, arguments


def put_side_by_side(calls: Mapping[fx.Node, list[Match]]) -> None:
    """Of these calls of a graph, with what they stand for."""
    for reader in [n for n in calls if n.target in _READERS]:
        first, second, *rest = reader.args
        if not all(isinstance(n, fx.Node) and n.target is operator.getitem and [*n.users] == [reader] for n in (first, second)):
            continue
        maker, places = first.args[0], [first.args[1], second.args[1]]
        if (
            maker is not second.args[0]
            or len(maker.users) != 2
            or sorted(places) != [0, 1]
            or maker not in calls
            or maker.target not in _MAKERS
        ):
            continue
        argument, where = _MAKERS[maker.target]
        given = dict(zip((a.name for a in maker.target._schema.arguments), maker.args, strict=True))
        if where(given, calls[maker]):
            maker.args = tuple((given | {argument: True}).values())
            _read_packed(reader, first, second, tuple(rest))


def _read_packed(reader: fx.Node, first: fx.Node, second: fx.Node, rest: tuple) -> None:
    packed, arguments = _READERS[reader.target]
    swapped = first.args[1] == 1
    kept, dropped = (second, first) if swapped else (first, second)
    example: torch.Tensor = kept.meta["example_value"]
    kept.meta["example_value"] = example.new_empty(*example.shape[:-1], 2 * example.shape[-1])
    reader.target, reader.args = packed, arguments(kept, swapped, rest)
    dropped.graph.erase_node(dropped)
