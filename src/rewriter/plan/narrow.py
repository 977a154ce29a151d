"""What is widened only to be narrowed again stays narrow.

Under autocast with weights in fp32 (what PEFT's preparation for k-bit training leaves), a quantised layer gives bf16 results out
in fp32, the activation of a gated MLP is computed of them, and the next layer casts it to bf16. In memory these are the largest
tensors of a layer, twice as wide as what they hold. Where a producer can round its result once, a consumer computes in fp32
whatever it reads, and everybody reads the consumer's result as bf16, the tensors between them are bf16: rounded as often as
before, the producer's before instead of behind the widening.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from sloth.rewriter.graph.aliasing import tensors

_ROUNDS_ONCE: set[torch._ops.OpOverload] = set()
_COMPUTES_WIDE: set[torch._ops.OpOverload] = set()
NARROW = (torch.bfloat16, torch.float16)


def rounds_once(op: torch._ops.OpOverload) -> None:
    """The operator adds up in fp32 and rounds each result once, to its argument `dtype`."""
    _ROUNDS_ONCE.add(op)


def computes_wide(op: torch._ops.OpOverload) -> None:
    """The operator reads its tensors, all of one dtype, as fp32 and rounds its result once to that dtype."""
    _COMPUTES_WIDE.add(op)


def keep_narrow(graph: fx.Graph) -> None:
    """Change such producers and consumers of a rewritten graph."""
    consumers = {n: dtype for n in graph.nodes if n.target in _COMPUTES_WIDE and (dtype := _read_as(n)) is not None}
    for producer in graph.nodes:
        if producer.target in _ROUNDS_ONCE and (dtype := _narrow(producer, consumers)) is not None:
            consumed = {c for out in producer.users for c in out.users}
            if all(_producer(a) is producer for c in consumed for a in c.all_input_nodes):
                _set_dtype(producer, dtype)
                for n in (*producer.users, *consumed):
                    n.meta["example_value"] = n.meta["example_value"].to(dtype)


def _producer(n: fx.Node) -> fx.Node | None:
    return n.all_input_nodes[0] if n.all_input_nodes else None


def _narrow(producer: fx.Node, consumers: dict[fx.Node, torch.dtype]) -> torch.dtype | None:
    """The dtype that all its operands have and its results can have: if only `consumers` read them."""
    readers = [c for out in producer.users for c in out.users]
    if not readers or not all(c in consumers for c in readers) or any(not _is_wide(out) for out in producer.users):
        return None
    found = {consumers[c] for c in readers}
    dtype = found.pop()
    return dtype if not found and _operands(producer.all_input_nodes) <= {dtype} else None


def _read_as(n: fx.Node) -> torch.dtype | None:
    """The narrow dtype that all readers cast it to."""
    found = {_cast_to(user) for user in n.users}
    dtype = found.pop() if len(found) == 1 else None
    return dtype if dtype in NARROW and _is_wide(n) else None


def _cast_to(n: fx.Node) -> torch.dtype | None:
    if n.target not in ("to", torch.ops.aten.to.dtype) or len(n.args) + len(n.kwargs) != 2:
        return None
    dtype = (*n.args[1:], *n.kwargs.values())[0]
    return dtype if isinstance(dtype, torch.dtype) else None


def _is_wide(n: fx.Node) -> bool:
    value = n.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _operands(nodes: Iterable[fx.Node]) -> set[torch.dtype]:
    """Of what is no node that a rewrite made, the dtypes; those have no example, but say in their arguments what they give."""
    found: set[torch.dtype] = set()
    for n in nodes:
        examples = list(tensors(n.meta.get("example_value")))
        given = {a for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.dtype)} if not examples else set()
        found |= {t.dtype for t in examples} | given or {torch.float32}
    return found


def _set_dtype(producer: fx.Node, dtype: torch.dtype) -> None:
    at = [a.name for a in producer.target._schema.arguments].index("dtype")
    args = [*producer.args, *[None] * (at + 1 - len(producer.args))]
    args[at] = dtype
    producer.args = tuple(args)
