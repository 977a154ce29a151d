"""A random program: what it is given, what it says, and how it is called. tests/program_writer.py writes it."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NAMES = {"torch": torch, "F": F, "math": math, "checkpoint": checkpoint, "nullcontext": nullcontext}
WIDTH, VOCABULARY, HEADS = 8, 11, 2
LAYOUTS = ("dense", "dense", "permuted", "strided", "offset", "expanded")


@dataclass(frozen=True)
class Input:
    """kind: "x" an activation, "w" a weight, and integers: "labels", "valid", "documents". Sizes may be "B" and "S"."""

    kind: str
    shape: tuple
    dtype: torch.dtype
    grad: bool = False
    layout: str = "dense"
    leaf: bool = True  # else the result of an operation

    def make(self, sizes: dict[str, int], salt: int) -> torch.Tensor:
        shape = [sizes.get(s, s) for s in self.shape]
        generator = torch.Generator().manual_seed(salt)
        if self.kind == "labels":
            t = torch.randint(0, VOCABULARY, shape, generator=generator)
            return t.where(torch.rand(shape, generator=generator) < 0.8, -100)
        if self.kind == "valid":
            return torch.arange(shape[1])[None] < torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        if self.kind == "documents":
            return (torch.rand(shape, generator=generator) < 0.4).cumsum(1)
        t = self._laid_out(shape, generator) * (0.4 if self.kind == "w" else 1.0)
        return (t + 0.7 if self.kind == "w" and len(shape) == 1 else t).to(self.dtype)

    def _laid_out(self, shape: list[int], generator: torch.Generator) -> torch.Tensor:
        *lead, last = shape
        if self.layout == "permuted" and len(shape) == 3:
            return torch.randn(shape[1], shape[0], last, generator=generator).transpose(0, 1)
        if self.layout == "strided":
            return torch.randn(*lead, 2 * last, generator=generator)[..., ::2]
        if self.layout == "offset":
            return torch.randn(math.prod(shape) + 1, generator=generator)[1:].view(shape)
        if self.layout == "expanded" and lead:
            return torch.randn(*lead[1:], last, generator=generator).expand(shape)
        return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class How:
    """How a program is called, and what is done with its results."""

    sizes: tuple[dict[str, int], ...]  # of each call; several with dynamic sizes
    mode: str = "train"  # no_grad, inference
    autocast: torch.dtype | None = None
    backward: str = "once"  # retained: twice through one graph; twice: of two calls; some: of one output; partial: some inputs
    dynamic: bool | None = False
    inner: str = "eager"
    always: bool = True
    shared: tuple[tuple[str, str], ...] = ()  # inputs that are one tensor


@dataclass
class Program:
    seed: int
    inputs: dict[str, Input] = field(default_factory=dict)
    statements: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    how: How = How(({},))

    def source(self, exact: bool = False) -> str:
        body = "\n".join(f"    {line}" for s in self.statements for line in s.splitlines())
        text = f"def program({', '.join(self.inputs)}):\n{body}\n    return {', '.join(self.results)},\n"
        if exact:
            text = re.sub(r"torch\.autocast\([^)]*\)", "nullcontext()", text.replace(".float()", ".double()"))
            text = re.sub(r"torch\.finfo\([^)]*\)\.min", "-1e30", text)
            text = re.sub(r"torch\.(float32|bfloat16|float16)\b", "torch.float64", text)
        return text

    def function(self, exact: bool = False) -> Callable[..., tuple]:
        name, text = f"<program {self.seed}{' in fp64' if exact else ''}>", self.source(exact)
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        names = dict(NAMES)
        exec(compile(text, name, "exec"), names)
        return names["program"]

    def __str__(self) -> str:
        given = "\n".join(f"#   {n}: {i}" for n, i in self.inputs.items())
        return f"# seed {self.seed}, {self.how}\n{given}\n{self.source()}"


def called(
    names: list[str], inputs: dict[str, Input], sizes: dict, salt: int, exact: bool = False, grad: bool = True, shared: tuple = ()
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """(leaves by name, what the program is given)"""
    leaves, given = {}, []
    other = {b: a for a, b in shared}
    for i, name in enumerate(names):
        if name in other and other[name] in names[:i]:
            given.append(given[names.index(other[name])])
            continue
        how = inputs[name]
        t = how.make(sizes, 1000 * salt + i)
        t = t.double() if exact and t.is_floating_point() else t
        leaves[name] = t = t.requires_grad_(how.grad and grad)
        given.append(
            t if how.leaf or not how.grad or how.layout == "expanded" else t.detach().requires_grad_(t.requires_grad) * 1.0
        )
        if given[-1] is not t:
            leaves[name] = t = t.detach().requires_grad_(t.requires_grad)
            given[-1] = t * 1.0
    return leaves, given
