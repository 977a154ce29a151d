"""Writes a random program, line by line: each is tried on real tensors, and left out where torch refuses it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from tests.program import HEADS, LAYOUTS, NAMES, VOCABULARY, WIDTH, How, Input, Program, called


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
