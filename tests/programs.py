"""Random programs of all constructs, in random spellings, and what they must give: that of eager, or as near to fp64 as eager.

    python -m tests.programs 0 5000      programs of these seeds; what fails is made shorter and printed as Python
    python -m tests.programs 17 --show   one program
    --plain                              short ones, of static sizes, whose rewritten graph runs as it is: seven in a second

A program is straight code of one function: norms, rotations, attention, MLPs, adapters and losses written as models write them,
piece by piece, and between the pieces whatever users do: other readers, views, writes in place, casts, copies, blocks of no_grad
and autocast, checkpoints. Each line is tried on real tensors while it is written; one that torch refuses is left out. How the
program is called belongs to it: dtypes, sizes (coinciding and 1, too), shared inputs, which of them need a gradient, in which
grad mode, how often, with which backward passes, with static or dynamic sizes, and what compiles the rewritten graph.
"""

from __future__ import annotations

import argparse
import linecache
import math
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sloth.rewriter.backend import listening
from sloth.rewriter.match.registry import deferrals, patterns
from sloth.rewriter.report import MATCHED, GraphReport

NAMES = {"torch": torch, "F": F, "math": math, "checkpoint": checkpoint, "nullcontext": nullcontext}
ALWAYS = sorted({e.name for e in (*patterns(), *deferrals())})
WIDTH, VOCABULARY, HEADS = 8, 11, 2
MANY = 2048  # numbers, among which luck averages out
SLACK = 32 * 2.0**-23  # of the norm: for sums in another order
LAYOUTS = ("dense", "dense", "permuted", "strided", "offset", "expanded")

# ---------------------------------------------------------------- programs


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


class Dropped(Exception):
    """torch refuses a line, or nothing fits."""


class Writer:
    """Writes a program; `values` holds what each of its names is, when its tensors have some sizes."""

    def __init__(self, seed: int):
        self.dice = random.Random(seed)
        self.program = Program(seed)
        self.dtype = self.dice.choice([torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16])
        self.sizes = {"B": self.dice.choice([1, 2, 3]), "S": self.dice.choice([1, 2, 4, 5, 8])}
        self.values: dict[str, Any] = {}
        self.statements = self.program.statements
        self.count = 0
        self.trainable = self.dice.choice([0.0, 0.5, 0.8, 1.0])

    # what lines are made of

    def chance(self, p: float) -> bool:
        return self.dice.random() < p

    def one(self, *choices: Any) -> Any:
        return self.dice.choice(choices)

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def do(self, statement: str) -> None:
        """Adds a statement, if torch runs it."""
        names = {**NAMES, **self.values}
        try:
            exec(statement, names)
        except Exception as e:
            raise Dropped(statement) from e
        self.values |= {n: v for n, v in names.items() if n not in NAMES and not n.startswith("__") and not callable(v)}
        self.statements.append(statement)

    def let(self, expression: str, disturbed: float = 0.04) -> str:
        name = self.name()
        self.do(f"{name} = {expression}")
        if self.chance(disturbed):
            with suppress(Dropped):
                self.one(self.write, self.reader, self.reader, self.view)(name)
        return name

    def step(self, expression: str) -> str:
        """Perhaps a line of its own, perhaps a part of the next."""
        return self.let(expression) if self.chance(0.6) else f"({expression})"

    def input(self, kind: str, *shape: Any, dtype: torch.dtype | None = None, grad: bool | None = None) -> str:
        same = [n for n, i in self.program.inputs.items() if i.kind == kind and i.shape == shape]
        if same and self.chance(0.3):
            return self.dice.choice(same)
        name = f"{kind[0]}{len(self.program.inputs)}"
        dtype = dtype or (self.one(torch.float32, self.dtype) if kind == "w" and self.chance(0.2) else self.dtype)
        if grad is None:
            grad = kind in "xw" and self.chance(self.trainable)
        layout = (
            self.dice.choice(LAYOUTS if kind == "x" else LAYOUTS[:-1])
            if kind == "x" or kind == "w" and self.chance(0.2)
            else "dense"
        )
        self.program.inputs[name] = made = Input(kind, shape, dtype, grad, layout, kind != "x" or self.chance(0.5))
        self.values[name] = called([name], {name: made}, self.sizes, 1, grad=torch.is_grad_enabled())[1][0]
        return name

    def pick(self, fits: Callable[[torch.Tensor], bool]) -> str:
        found = [n for n, v in self.values.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and fits(v)]
        if not found:
            raise Dropped
        return self.dice.choice(found[-4:] if self.chance(0.7) else found)

    def stream(self) -> str:
        """An activation [B, S, WIDTH]."""
        wanted = (self.sizes["B"], self.sizes["S"], WIDTH)
        return self.pick(lambda v: v.shape == wanted) if not self.chance(0.1) else self.input("x", "B", "S", WIDTH)

    # constructs

    def norm(self, x: str | None = None) -> str:
        x = x or self.stream()
        width = self.values[x].shape[-1]
        w = self.input("w", width)
        eps = self.one("1e-6", "1e-6", "1e-5", "0.1")
        if self.chance(0.2):
            return self.let(f"F.rms_norm({x}, ({width},), {self.one(w, w, 'None')}, {eps})")
        h = self.step(self.one(f"{x}.float()", f"{x}.float()", f"{x}.to(torch.float32)", x))
        squares = self.one(f"{h}.pow(2)", f"{h} * {h}", f"{h}.square()", f"{h} ** 2")
        dim = self.one("-1", "-1", "-1", "-1", "2", "1")
        mean = self.step(
            self.one(
                f"({squares}).mean({dim}, keepdim=True)",
                f"({squares}).mean(dim={dim}, keepdim=True)",
                f"torch.mean({squares}, dim={dim}, keepdim=True)",
                f"({squares}).sum({dim}, keepdim=True) / {width}",
            )
        )
        v = self.step(self.one(f"{mean} + {eps}", f"{mean} + {eps}", f"{eps} + {mean}", f"{mean}.add({eps})"))
        n = self.step(
            self.one(
                f"{h} * torch.rsqrt({v})",
                f"torch.rsqrt({v}) * {h}",
                f"{h} / torch.sqrt({v})",
                f"{h} * {v} ** -0.5",
                f"{h} * ({v}).rsqrt()",
                f"{h} * (1 / torch.sqrt({v}))",
                f"{h} * ({v}).pow(-0.5)",
            )
        )
        back = self.one(f".to({x}.dtype)", f".to({x}.dtype)", f".type_as({x})", "")
        return self.let(
            self.one(
                f"{w} * {n}{back}",
                f"({w} * {n}){back}",
                f"({w}.float() * {n}){back}",
                f"({n} * (1.0 + {w}.float())){back}",
                f"{n}{back}",
            )
        )

    def add_norm(self) -> str:
        return self.norm(self.let(f"{self.stream()} + {self.stream()}"))

    def layer_norm(self) -> str:
        x, w, b = self.stream(), self.input("w", WIDTH), self.input("w", WIDTH)
        if self.chance(0.6):
            given = self.one(f"{w}, {b}", f"{w}, None", "None, None")
            return self.let(f"F.layer_norm({self.one(x, f'{x}.float()')}, ({WIDTH},), {given}, 1e-5)")
        h = self.step(f"{x}.float()")
        centred = self.let(f"{h} - {h}.mean(-1, keepdim=True)")
        v = self.step(f"{centred}.{self.one('pow(2)', 'square()')}.mean(-1, keepdim=True) + 1e-5")
        return self.let(f"({w}.float() * ({centred} * torch.rsqrt({v}))).to({x}.dtype)")

    def linear(self, x: str | None = None, out: int = WIDTH) -> str:
        x = x or self.stream()
        w = self.input("w", out, self.values[x].shape[-1])
        bias = self.input("w", out) if self.chance(0.2) else "None"
        return self.let(self.one(f"F.linear({x}, {w}, {bias})", f"F.linear({x}, {w}, {bias})", f"{x} @ {w}.t()"))

    def mlp(self) -> str:
        x = self.stream()
        if self.chance(0.3):
            both = self.linear(x, 2 * WIDTH)
            gate, up = self.name(), self.name()
            self.do(f"{gate}, {up} = {both}.{self.one('chunk(2, -1)', f'split({WIDTH}, -1)')}")
            gate, up = self.one((gate, up), (up, gate))
        elif self.chance(0.5):
            gate, up = self.linear(x), self.linear(x)
        else:
            gate, up = x, self.stream()
        act = self.one(
            f"F.silu({gate})",
            f"F.silu({gate})",
            f"{gate} * torch.sigmoid({gate})",
            f"{gate} / (1 + torch.exp(-{gate}))",
            f"F.gelu({gate})",
            f"F.gelu({gate}, approximate='tanh')",
            f"F.silu({gate}.float()).to({gate}.dtype)",
            f"0.5 * {gate} * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * ({gate} + 0.044715 * torch.pow({gate}, 3.0))))",
            f"F.mish({gate})",
        )
        act = self.step(act)
        return self.let(self.one(f"{act} * {up}", f"{up} * {act}", f"torch.mul({act}, {up})"))

    def lora(self) -> str:
        x = self.stream()
        out = self.one(WIDTH, 2 * WIDTH)
        w = self.input("w", out, WIDTH, grad=self.chance(0.2))
        a, b = self.input("w", 2, WIDTH), self.input("w", out, 2)
        base = self.let(f"F.linear({x}, {w})")
        inner = self.one(x, x, f"{x}.to({a}.dtype)", f"{x}.float().to({x}.dtype)", f"{x} * 1.0")
        delta = self.step(f"F.linear({self.step(f'F.linear({inner}, {a})')}, {b})")
        delta = self.one(f"{delta} * 2.0", f"{delta} * 0.5", f"2.0 * {delta}", delta)
        found = self.let(self.one(f"{base} + {delta}", f"{delta} + {base}", f"({base} + {delta}).to({x}.dtype)"))
        return found if out == WIDTH else self.let(f"{found}[..., :{WIDTH}]")

    def heads(self, x: str | None = None, heads: int = HEADS) -> str:
        """[B, heads, S, 4]"""
        x = self.linear(x, heads * 4)
        x = self.step(
            self.one(
                f"{x}.view(*{x}.shape[:2], {heads}, 4)",
                f"{x}.view({x}.shape[0], {x}.shape[1], -1, 4)",
                f"{x}.unflatten(-1, ({heads}, 4))",
            )
        )
        if self.chance(0.2):
            x = self.norm(self.let(x))
        return self.let(f"{x}.transpose(1, 2)")

    def tables(self, like: str, width: int) -> tuple[str, str]:
        angle = self.let(
            f"torch.outer(torch.arange({like}.shape[2]).float(), 10000 ** (-torch.arange(0, {width}, 2) / {width}))", 0
        )
        return self.turned_tables(angle, like)

    def turned_tables(self, angle: str, like: str) -> tuple[str, str]:
        cast = self.one("", f".to({like}.dtype)", f".to({like}.dtype)")
        angle = self.let(
            self.one(f"torch.cat(({angle}, {angle}), -1)[None, None]", f"{angle}.repeat_interleave(2, -1)[None, None]"), 0
        )
        expanded = self.let(f"{angle}.expand({like}.shape[0], 1, -1, -1)", 0) if self.chance(0.6) else angle
        return self.let(f"{expanded}.cos(){cast}", 0.02), self.let(f"{expanded}.sin(){cast}", 0.02)

    def turn(self, x: str, cos: str, sin: str, spelling: float, width: int) -> str:
        whole = x
        x = self.let(f"{x}[..., :{width}]") if width < self.values[x].shape[-1] else x
        back = ""
        if spelling > 0.7:
            back = f".to({x}.dtype)"
            x = self.step(f"{x}.float()") if spelling > 0.85 else x
        if spelling % 0.1 < 0.07:
            a, b = self.name(), self.name()
            self.do(f"{a}, {b} = {x}.chunk(2, -1)")
            rotated = self.step(f"torch.cat((-{b}, {a}), -1)")
        else:
            rotated = self.step(f"torch.stack((-{x}[..., 1::2], {x}[..., ::2]), -1).flatten(-2)")
        y = self.let(
            self.one(
                f"({x} * {cos} + {rotated} * {sin}){back}",
                f"({x} * {cos} + {sin} * {rotated}){back}",
                f"({rotated} * {sin} + {x} * {cos}){back}",
            )
        )
        return (
            y
            if x == whole or width == self.values[whole].shape[-1]
            else self.let(f"torch.cat(({y}, {whole}[..., {width}:]), -1)")
        )

    def rotation(self, q: str | None = None, k: str | None = None) -> tuple[str, str]:
        q, k = q or self.heads(), k or self.heads(heads=self.one(1, 2))
        width, spelling = self.one(4, 4, 2), self.dice.random()
        cos, sin = self.tables(q, width)
        out = self.turn(q, cos, sin, spelling, width)
        other = self.dice.random() if self.chance(0.1) else spelling
        return out, self.turn(k, cos, sin, other, width) if self.chance(0.8) else k

    def merged(self, out: str) -> str:
        return self.let(
            self.one(
                f"{out}.transpose(1, 2).flatten(2)",
                f"{out}.transpose(1, 2).reshape(*{out}.transpose(1, 2).shape[:2], -1)",
                f"{out}.transpose(1, 2).contiguous().flatten(2)",
            )
        )

    def turned(self) -> str:
        q, k = self.rotation()
        return self.merged(q if self.values[k].shape[1] == 1 or self.chance(0.5) else k)

    def mask(self, like: str) -> str:
        """True where a key is seen, [1 or B, 1, S, S]."""
        i = self.let(f"torch.arange({like}.shape[2])", 0)
        m = self.let(
            self.one(
                f"({i}[None, :] <= {i}[:, None])[None, None]",
                f"({i}[:, None] >= {i}[None])[None, None]",
                f"torch.ones({like}.shape[2], {like}.shape[2], dtype=torch.bool).tril()[None, None]",
                f"({i}[None, :] < {i}[:, None] + 1)[None, None]",
            ),
            0,
        )
        if self.chance(0.3):
            m = self.let(f"{m} & ({i}[None, :] > {i}[:, None] - {self.one(1, 2, 3)})[None, None]", 0)
        if self.chance(0.3):
            m = self.let(f"{m} & {self.input('valid', 'B', 'S', dtype=torch.bool)}[:, None, None, :]", 0)
        if self.chance(0.2):
            d = self.input("documents", "B", "S", dtype=torch.int64)
            m = self.let(f"{m} & ({d}[:, None, :, None] == {d}[:, None, None, :])", 0)
        return m

    def attention(self) -> str:
        groups = self.one(1, 2, 2)
        q, k, v = self.heads(), self.heads(heads=groups), self.heads(heads=groups)
        if self.chance(0.4):
            q, k = self.rotation(q, k)
        if groups != HEADS:
            k, v = (
                self.let(
                    f"{t}[:, :, None].expand({t}.shape[0], {groups}, {HEADS // groups}, {t}.shape[2], 4)"
                    f".reshape({t}.shape[0], {HEADS}, {t}.shape[2], 4)"
                )
                for t in (k, v)
            )
        if self.chance(0.4):
            given = self.one("is_causal=True", f"attn_mask={self.mask(q)}", f"attn_mask={self.mask(q)}", "scale=0.3")
            return self.merged(self.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, {given})"))
        scores = self.step(f"{q} @ {k}.{self.one('transpose(2, 3)', 'transpose(-1, -2)', 'mT')}")
        scores = self.step(self.one(f"{scores} * 0.5", f"{scores} * 0.3", f"{scores} / 2.0", f"{scores} / math.sqrt(4)"))
        if self.chance(0.15):
            scores = self.step(f"torch.tanh({scores} / 3.0) * 3.0")
        if self.chance(0.8):
            m, least = (
                self.mask(q),
                self.one(f"torch.finfo({q}.dtype).min", "-1e9" if self.dtype is not torch.float16 else "-6e4"),
            )
            if self.chance(0.3):
                scores = self.step(f"{scores}.masked_fill(~{m}, {least})")
            else:
                added = self.let(
                    self.one(
                        f"torch.where({m}, 0.0, {least})", f"torch.zeros_like({m}, dtype={q}.dtype).masked_fill(~{m}, {least})"
                    ),
                    0,
                )
                scores = self.step(f"{scores} + {added}")
        weights = self.step(
            self.one(
                f"F.softmax({scores}, -1, dtype=torch.float32).to({q}.dtype)",
                f"F.softmax({scores}, -1)",
                f"torch.softmax({scores}, dim=-1)",
            )
        )
        return self.merged(self.let(f"{weights} @ {v}"))

    def loss(self) -> str:
        x, labels = self.stream(), self.input("labels", "B", "S", dtype=torch.int64)
        logits = self.linear(x, VOCABULARY)
        flat = self.chance(0.3)
        reduction = self.one("mean", "mean", "sum", "none")
        how = f", reduction='{reduction}'" + self.one("", "", "", ", label_smoothing=0.1")
        if self.chance(0.2) and self.sizes["S"] > 1:
            z, t = self.step(f"{logits}[:, :-1]"), self.step(f"{labels}[:, 1:]")
        else:
            z, t = logits, self.let(f"F.pad({labels}, (0, 1), value=-100)[..., 1:]", 0) if self.chance(0.3) else labels
        z = self.step(f"{z}.float()") if self.chance(0.6) else z
        if self.chance(0.3):
            z = self.step(self.one(f"{z} * 0.5", f"{z} / 2.0", f"torch.tanh({z} / 3.0) * 3.0"))
        if flat:
            return self.let(f"F.cross_entropy({z}.transpose(1, 2), {t}{how})")
        end = self.one("", "", " / 7", f" / {self.input('x', 1, dtype=torch.float32)}.abs().sum()") if reduction != "none" else ""
        view = self.one("reshape", "reshape", "view")
        return self.let(f"F.cross_entropy({z}.{view}(-1, {z}.shape[-1]), {t}.{view}(-1){how}){end}")

    # what is done between the constructs

    def any(self) -> str:
        return self.pick(lambda v: v.dim() > 1)

    def reader(self, t: str | None = None) -> str:
        t = t or self.any()
        return self.let(
            self.one(
                f"{t} * 2",
                f"{t}.tanh()",
                f"{t} + 1",
                f"-{t}",
                f"{t}.float().sigmoid().to({t}.dtype)",
                f"{t} * {t}",
                f"{t} + 0",
                f"{t} * 1",
                f"{t} - {t}.mean(-1, keepdim=True)",
            ),
            0.02,
        )

    def view(self, t: str | None = None) -> str:
        t = t or self.any()
        return self.let(
            self.one(
                f"{t}.view({t}.shape)",
                f"{t}.reshape({t}.shape)",
                f"{t}.transpose(0, 1)",
                f"{t}.transpose(0, 1).transpose(0, 1)",
                f"{t}.flatten(0, 1)",
                f"{t}[..., :4]",
                f"{t}[:1]",
                f"{t}.unsqueeze(0).squeeze(0)",
                f"{t}.mT.contiguous().mT",
                f"{t}.view_as({t})",
                f"{t}.expand_as({t})",
                f"torch.cat(({t}[..., 4:], {t}[..., :4]), -1)",
            ),
            0.02,
        )

    def copy(self) -> str:
        t = self.any()
        return self.let(
            self.one(
                f"{t}.clone()",
                f"{t}.contiguous()",
                f"{t}.double().to({t}.dtype)",
                f"{t}.float()",
                f"{t}.detach()",
                f"{t}.detach().clone()",
                f"{t}.to(torch.bfloat16)",
                f"{t}.to({t}.dtype)",
                f"{t}.data",
                f"{t}.bfloat16().to({t}.dtype)",
            ),
            0.1,
        )

    def residual(self) -> str:
        return self.let(
            self.one(
                f"{self.stream()} + {self.stream()}",
                f"{self.stream()} + {self.stream()} * 0.5",
                f"torch.lerp({self.stream()}, {self.stream()}, 0.5)",
                f"{self.stream()} - {self.stream()}",
            )
        )

    def write(self, t: str | None = None) -> None:
        t = t or self.any()
        if any(v is self.values[t] for n, v in self.values.items() if n in self.program.inputs and self.program.inputs[n].leaf):
            raise Dropped
        statement = self.one(
            f"{t}.mul_(1.5)",
            f"{t}.add_(1)",
            f"{t}[..., :2].mul_(3)",
            f"{t}[:, :1] = 0.5",
            f"{t}.detach().mul_(1.5)",
            f"{t}.view(-1)[::2].add_(0.5)",
            f"{t}.mT.mul_(2)",
            f"{t}.copy_({t}.flip(0))",
            f"{t} += 1",
        )
        self.do(statement)

    def in_block(self, enter: str, context: Any, lines: int) -> None:
        outer, self.statements = self.statements, []
        try:
            with context:
                for _ in range(lines):
                    self.fragment()
        finally:
            inner, self.statements = self.statements, outer
        if inner:
            self.statements.append(f"{enter}:\n" + "\n".join(f"    {line}" for s in inner for line in s.splitlines()))

    def without_gradients(self) -> None:
        self.in_block("with torch.no_grad()", torch.no_grad(), 1)

    def in_autocast(self) -> None:
        how = self.one("'cpu', torch.bfloat16", "'cpu', torch.bfloat16", "'cpu', enabled=False")
        self.in_block(f"with torch.autocast({how})", torch.autocast("cpu", torch.bfloat16, "enabled" not in how), self.one(1, 2))

    def checkpointed(self) -> None:
        """A function of all inputs and some values of this program, run as a checkpoint; perhaps with another within."""
        name = f"f{self.count}"
        outer, values, self.statements = self.statements, dict(self.values), []
        before = set(values)
        try:
            for _ in range(self.one(1, 2, 3)):
                self.fragment(deeper=0.5)
        finally:
            inner, self.statements = self.statements, outer
            made, self.values = self.values, values
        self.values |= {n: v for n, v in made.items() if n in self.program.inputs}
        new = [n for n, v in made.items() if n not in before and n not in self.program.inputs and isinstance(v, torch.Tensor)]
        if not new or any(re.search(r"\b(t\d+)\b.*(_\(| = 0\.5|\+=)", s) for s in inner):
            raise Dropped
        body = "\n".join(inner)
        read = [n for n in self.values if re.search(rf"\b{n}\b", body)]
        given = [n for n in new if self.values.get(n) is None][-self.one(1, 1, 2) :]
        text = "\n".join(f"    {line}" for s in inner for line in s.splitlines())
        reentrant = "use_reentrant=False"
        outs = [self.name() for _ in given]
        self.do(
            f"def {name}({', '.join(read)}):\n{text}\n    return {', '.join(given)},\n"
            f"{', '.join(outs)}, = checkpoint({', '.join([name, *read])}, {reentrant})"
        )

    def fragment(self, deeper: float = 1.0) -> None:
        kinds = {
            self.norm: 4,
            self.add_norm: 3,
            self.layer_norm: 2,
            self.mlp: 4,
            self.lora: 3,
            self.turned: 4,
            self.attention: 4,
            self.loss: 2,
            self.linear: 1,
            self.reader: 1,
            self.view: 1.5,
            self.copy: 2,
            self.residual: 2,
            self.write: 1.2,
            self.without_gradients: 0.5 * deeper,
            self.in_autocast: 0.7 * deeper,
            self.checkpointed: 1.2 * deeper,
        }
        (kind,) = self.dice.choices(list(kinds), list(kinds.values()))
        with suppress(Dropped):
            kind()

    def written(self, plain: bool) -> Program:
        p, dice = self.program, self.dice
        self.input("x", "B", "S", WIDTH)
        for _ in range(dice.choice([1, 1, 2] if plain else [1, 2, 2, 3, 4])):
            self.fragment()
        made = [n for n, v in self.values.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and n not in p.inputs]
        made = [n for n in made if self.values[n].numel()] or list(p.inputs)[:1]
        p.results = list(dict.fromkeys([*made[-1:], *dice.sample(made, min(len(made), dice.choice([0, 0, 1, 2, 3])))]))
        dynamic = not plain and dice.choice([False, False, False, True, None])
        sizes = [self.sizes] + [{"B": dice.randint(2, 4), "S": dice.randint(2, 7)} for _ in range(0 if dynamic is False else 2)]
        xs = [n for n, i in p.inputs.items() if i.kind == "x" and i.shape == ("B", "S", WIDTH)]
        ws = [n for n, i in p.inputs.items() if i.kind == "w" and i.shape == (WIDTH,)]
        same = tuple(tuple(group[:2]) for group in (xs, ws) if len(group) > 1 and self.chance(0.15))
        same = tuple((a, b) for a, b in same if p.inputs[a].dtype == p.inputs[b].dtype)
        p.how = How(
            tuple(sizes),
            dice.choice(["train"] * 8 + ["no_grad", "inference"]),
            torch.bfloat16 if self.dtype is not torch.float16 and self.chance(0.15) else None,
            dice.choice(["once"] * 4 + ["retained", "twice", "some", "partial"]),
            dynamic,
            "eager" if plain else dice.choice(["eager"] * 5 + ["aot_eager", "aot_eager", "aot_eager_decomp_partition"]),
            self.chance(0.75),
            same,
        )
        return p


def written(seed: int, plain: bool = False) -> Program:
    return Writer(seed).written(plain)


# ---------------------------------------------------------------- runs


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


Outcome = dict[str, torch.Tensor | str | None]


def outcome(p: Program, run: Callable[..., tuple], sizes: dict, salt: int, exact: bool = False) -> Outcome:
    """Results, gradients and inputs afterwards of one step."""
    how, found = p.how, {}
    leaves, given = called(list(p.inputs), p.inputs, sizes, salt, exact, shared=how.shared)
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "train": nullcontext}
    with ExitStack() as stack:
        stack.enter_context(modes[how.mode]())
        if how.mode == "inference":
            given = [t.clone() if t.is_floating_point() else t for t in given]
        if how.autocast and not exact:
            stack.enter_context(torch.autocast("cpu", how.autocast))
        results = list(run(*given))
        again = list(run(*given)) if how.backward == "twice" else []
    for i, t in enumerate([*results, *again]):
        found[f"result {i}"] = t.detach().clone()
        found[f"result {i} needs a gradient"] = str(t.requires_grad)
        if not exact:
            found[f"result {i} is"] = f"{t.dtype} {tuple(t.shape)}"
    for name, t in zip(p.inputs, given, strict=True):
        if t.is_floating_point():
            found[f"{name} afterwards"] = t.detach().clone()
    wanting = [t for t in [*results, *again] if t.requires_grad]
    wanting = wanting[:1] if how.backward == "some" else wanting
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    if how.backward == "partial":
        wanted = dict(list(wanted.items())[::2])
    if wanting and wanted and how.mode == "train":
        for turn in range(2 if how.backward == "retained" else 1):
            loss = sum((t.double() * weights(t, 2 * salt + turn)).sum() for t in wanting)
            grads = torch.autograd.grad(loss, list(wanted.values()), retain_graph=how.backward == "retained", allow_unused=True)
            found |= {f"gradient {turn} of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return found


def weights(t: torch.Tensor, salt: int) -> torch.Tensor:
    """Of the elements in the loss. Not all alike, so that a sum over a normalised axis keeps its gradient."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(salt + 7), dtype=torch.float64)


class Wrong(AssertionError):
    """What differs from eager."""


@dataclass
class Errors:
    """Of one tensor, over all draws: squares of the distances from fp64."""

    ours: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    rounding: list[float] = field(default_factory=list)
    size: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        at = [t.double().nan_to_num(0, 0, 0) for t in (ours, eager, exact.to(eager.dtype))]
        good = exact.isfinite() & eager.isfinite()
        exact = exact.where(good, 0)
        for to, t in zip((self.ours, self.eager, self.rounding), at, strict=True):
            to.append((t.where(good, 0) - exact).square().sum().item())
        self.size.append(exact.square().sum().item())
        self.count += exact.numel()

    def ratio(self) -> float:
        """Ours beside eager's: of all together, or of most draws, whichever says less."""
        few = torch.tensor([self.ours, self.eager, self.rounding, self.size]).double()
        below = torch.maximum(few[1], few[2]).sqrt() + SLACK * few[3].sqrt() + 1e-30
        total = few.sum(1)
        all_of_them = total[0].sqrt() / (torch.maximum(total[1], total[2]).sqrt() + SLACK * total[3].sqrt() + 1e-30)
        return min(all_of_them.item(), (few[0].sqrt() / below).median().item())

    def cancel(self) -> bool:
        """Is what eager gives half rounding errors? It is a sum of large terms that ends near 0, and says little."""
        return sum(self.eager) > 0.25 * sum(self.size)


def told_apart(ours: Outcome, eager: Outcome) -> None:
    """Raises Wrong where more than rounding differs."""
    if ours.keys() != eager.keys():
        raise Wrong(f"only one has {sorted(ours.keys() ^ eager.keys())}")
    for name, theirs in eager.items():
        found = ours[name]
        if (theirs is None) != (found is None) and name.startswith("gradient"):
            if (found if theirs is None else theirs).any():  # what compiles the graph gives zeros to what no result depends on
                raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
            continue
        if isinstance(theirs, str) or theirs is None:
            if theirs is not found and theirs != found:
                raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
            continue
        if (found.shape, found.dtype) != (theirs.shape, theirs.dtype):
            raise Wrong(f"{name}: {_said(found)}, eager {_said(theirs)}")
        if not torch.equal(found.isfinite(), theirs.isfinite()):
            raise Wrong(f"{name} is not finite where eager is, or the contrary")


def _said(t: Any) -> str:
    return f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else str(t)


LIMIT, CANCELLED = 1.05, 4.0
# A loss, and logits that are read beside it and hand back a gradient too: each rounds its own, and eager rounds the sum.
BESIDE_A_LOSS = 1.75


def compare(p: Program, sloth: bool = True) -> list[GraphReport] | None:
    """Raises Wrong where sloth does not give what eager gives, or is further from fp64 than 1.05 times eager. None: torch itself
    cannot run the program; else the reports of its graphs. Without sloth: what compiles the rewritten graph, by itself.
    """
    try:
        for sizes in p.how.sizes:
            outcome(p, p.function(), sizes, 1)
    except Exception:
        return None  # a write to what a gradient needs, …
    options = {"sloth.inner_backend": p.how.inner} | ({"sloth.always": ALWAYS} if p.how.always else {})
    with listening() as reports:
        how = {"backend": "sloth", "options": options} if sloth else {"backend": p.how.inner}
        run = torch.compile(p.function(), dynamic=p.how.dynamic, **how)
        for sizes in p.how.sizes:
            _compare(p, run, sizes, lambda: BESIDE_A_LOSS if any(r.deferred for r in reports) else LIMIT)
    for report in reports:
        if report.untouched or report.guards or any(s.status == "error" for s in report.sites):
            raise Wrong(report.untouched or f"guards {report.guards}" if report.untouched or report.guards else str(report.sites))
    return reports


def _compare(p: Program, run: Callable[..., tuple], sizes: dict, limit: Callable[[], float]) -> None:
    errors: dict[str, Errors] = {}
    for draw in range(40):
        salt = draw + 1
        eager, exact = outcome(p, p.function(), sizes, salt), outcome(p, p.function(exact=True), sizes, salt, exact=True)
        ours = outcome(p, run, sizes, salt)
        told_apart(ours, eager)
        for name, theirs in eager.items():
            truth = exact.get(name)
            if isinstance(theirs, torch.Tensor) and isinstance(truth, torch.Tensor) and ours[name] is not None:
                errors.setdefault(name, Errors()).add(ours[name], theirs, truth)
        far = {n: e for n, e in errors.items() if e.ratio() > (CANCELLED if e.cancel() else limit())}
        if not far:
            return
        if draw > 7 and all(e.count >= MANY for e in far.values()):
            break
    raise Wrong("; ".join(f"{n}: {e.ratio():.3f} times eager's error" for n, e in far.items()))


# ---------------------------------------------------------------- what fails


def failure(p: Program, sloth: bool = True) -> str:
    """What is wrong, in a line; empty if nothing is."""
    torch._dynamo.reset()
    try:
        compare(p, sloth)
    except Wrong as e:
        return f"wrong: {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def by_torch(p: Program) -> bool:
    """Does it fail without sloth, too?"""
    return bool(failure(p, sloth=False))


def shorter(p: Program, kind: str) -> Program:
    """The same failure in fewer statements, results and conditions."""

    def fails(q: Program) -> bool:
        with suppress(Exception):
            return failure(q)[:6] == kind[:6]
        return False

    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(p.statements))):
            q = replace(p, statements=[s for j, s in enumerate(p.statements) if j != i])
            if fails(q):
                p, changed = q, True
        for r in p.results if len(p.results) > 1 else ():
            q = replace(p, results=[x for x in p.results if x != r])
            if len(p.results) > 1 and fails(q):
                p, changed = q, True
    for simple in (
        {"shared": ()},
        {"backward": "once"},
        {"mode": "train"},
        {"autocast": None},
        {"dynamic": False, "sizes": p.how.sizes[:1]},
        {"dynamic": False, "sizes": p.how.sizes[1:2]},
        {"inner": "eager"},
        {"always": False},
    ):
        if not (simple.get("sizes") == () or all(getattr(p.how, k) == v for k, v in simple.items())):
            q = replace(p, how=replace(p.how, **simple))
            p = q if fails(q) else p
    text = p.source()
    return replace(p, inputs={n: i for n, i in p.inputs.items() if re.search(rf"\b{n}\b", text.split("\n", 1)[1])} or p.inputs)


def matches(reports: list[GraphReport]) -> Iterator[str]:
    for r in reports:
        yield from (s.variant.split("[")[0] for s in r.sites if s.status == MATCHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--show", action="store_true", help="print the programs alone")
    parser.add_argument("--long", action="store_true", help="print what fails as it is, not made shorter")
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    ends, found = Counter(), Counter()
    for seed in range(given.first, given.last or given.first + 1):
        p = written(seed, given.plain)
        if given.show:
            print(p)
            continue
        torch._dynamo.reset()
        try:
            reports = compare(p)
        except Exception as e:
            kind = f"wrong: {e}" if isinstance(e, Wrong) else f"{type(e).__name__}: {e}"
            theirs = by_torch(p)
            ends["torch's" if theirs else "failed"] += 1
            if not theirs:
                if not isinstance(e, Wrong):
                    traceback.print_exc(limit=-4)
                p = p if given.long else shorter(p, kind)
                print(f"{'=' * 40}\n{kind[:600]}\n{failure(p)[:600]}\n{p}", flush=True)
            continue
        ends["not a program" if reports is None else "fine"] += 1
        found.update(matches(reports or []))
        if seed % 100 == 99:
            print(f"-- {seed + 1}: {dict(ends)}, {dict(found)}", file=sys.stderr, flush=True)
    print(dict(ends), dict(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
