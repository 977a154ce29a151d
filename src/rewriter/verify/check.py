"""One rewrite that was cut out, run as often as it takes to tell: original, replacement, and the original in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sloth.rewriter.graph.aliasing import may_write
from sloth.rewriter.graph.ambient import OFF, under
from sloth.rewriter.graph.value import Symbol
from sloth.rewriter.verify.cut import Cut
from sloth.rewriter.verify.draws import cotangents, random_inputs
from sloth.rewriter.verify.report import GOOD, WRONG, Checked, Result
from sloth.rewriter.verify.run import Exactly, Found, NotExact, Run, RunExactly, evaluate, widened
from sloth.rewriter.verify.tally import Tally

AT_LEAST, DRAWS = 2, 24  # of random inputs; as many as it takes to tell


class Check:
    """Fills `told`. tallies: by inputs ("real", "random") and result."""

    def __init__(self, made: Cut, told: Checked):
        self.cut, self.told = made, told
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.as_it_is: set[str] = set()

    def run(self, values: list[Any] | None, why: str = "") -> None:
        """values: of the inputs, in their order; or None, and why. Raises NotExact where fp64 cannot judge, and what the original
        raises.
        """
        given = list(_like_examples(self.cut)) if values is None else values
        self.told.status, self.told.reason = GOOD, ""
        if values is not None:
            self.draw("real", given, 0)
            self.judge()
        else:
            self.told.notes.append(f"random inputs alone: {why}")
        for number in range(1, DRAWS + 1):
            if self.told.status == WRONG or number > AT_LEAST and not self.is_open():
                break
            self.draw("random", random_inputs(self.cut, given, number), number)
            self.judge()
        if self.as_it_is:
            self.told.notes.append(f"what {', '.join(sorted(self.as_it_is))} gives is a constant, in fp64 too")

    def draw(self, inputs: str, values: list[Any], number: int) -> None:
        made, region = self.cut, self.cut.region
        if any(may_write(n) for n in made.regions):
            values = [x.clone() if isinstance(x, torch.Tensor) else x for x in values]
        original = Run(made.original, made.regions).run
        with under(region.autocast):
            with torch.no_grad():
                given = cotangents(original(*values), number)
            eager = evaluate(original, values, made.grads, made.leaves, given)
            try:
                ours = evaluate(Run(made.replacement).run, values, made.grads, made.leaves, given, region.grad)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:
                return self.wrong(f"it raises {type(e).__name__}: {e}".split("\n")[0][:200])
        mode = Exactly()
        with mode, under(OFF):
            wide = [list(map(widened, kind)) for kind in (values, given)]
            exact = evaluate(RunExactly(made.original, made.regions, mode).run, wide[0], made.grads, made.leaves, wide[1])
        self.as_it_is |= mode.as_it_is
        for (what, a), (_, b), (_, e) in zip(*(_named(found, made) for found in (ours, eager, exact)), strict=True):
            self.compare(inputs, what, a, b, e)
        for i, (a, b) in enumerate(zip(ours[2], eager[2], strict=True)):
            if a != b:
                self.wrong(f"result {i + 1} {'requires' if a else 'does not require'} a gradient, otherwise than in eager")

    def compare(self, inputs: str, what: str, ours: Any, eager: Any, exact: Any) -> None:
        if exact is None:
            if ours is not None and bool(torch.count_nonzero(ours)):
                self.wrong(f"it gives a {what}, which eager does not have")
        elif ours is None:
            if bool(torch.count_nonzero(exact)):
                self.wrong(f"the {what} is lost")
        elif ours.dtype != eager.dtype or ours.shape != eager.shape:
            self.wrong(f"the {what} is {ours.dtype} {list(ours.shape)}, in eager {eager.dtype} {list(eager.shape)}")
        elif exact.is_floating_point():
            self.tallies.setdefault((inputs, what), Tally(single=inputs == "real")).add(ours, eager, exact)
        elif not torch.equal(ours, eager):
            self.wrong(f"the {what} differs")

    def wrong(self, reason: str) -> None:
        self.told.status, self.told.reason = WRONG, reason

    def is_open(self) -> bool:
        return any(t.judged().open for (inputs, _), t in self.tallies.items() if inputs == "random")

    def judge(self) -> None:
        self.told.results = [Result(what, inputs, t.judged()) for (inputs, what), t in self.tallies.items()]
        worse = [r for r in self.told.results if r.ratio.worse]
        if worse and self.as_it_is and any(r.ratio.eager == 0 for r in worse):
            raise NotExact(f"eager's result is what {', '.join(sorted(self.as_it_is))} gives")
        if worse and self.told.status == GOOD:
            worst = max(worse, key=lambda r: r.ratio.ratio)
            self.wrong(f"the error of the {worst.what} is {worst.ratio.ratio:.3g} times eager's")


def _named(found: Found, made: Cut) -> Iterator[tuple[str, Any]]:
    outputs, gradients, _ = found
    for i, out in enumerate(outputs):
        yield "result" if len(outputs) == 1 else f"result {i + 1}", out
    for name, gradient, wanted in zip(made.names, gradients, made.grads, strict=True):
        if wanted:
            yield f"gradient of {name}", gradient


def _like_examples(made: Cut) -> Iterator[Any]:
    """Inputs like those that the graph was traced with. NotExact where their numbers count."""
    for n in made.inputs:
        example = n.meta.get("example_value")
        if not isinstance(example, torch.Tensor):
            yield example.node.hint if isinstance(example, Symbol) else example
        elif not example.is_floating_point():
            raise NotExact(f"{n.name} is {example.dtype}, and there are no real inputs")
        else:
            shape = [s.node.hint if isinstance(s, Symbol) else s for s in example.shape]
            yield torch.randn(shape, device=example.device).to(example.dtype)
