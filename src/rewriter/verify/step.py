"""The whole step: the compiled model beside eager, its loss, its logits and each parameter's gradient, judged in fp64.

fp64 is the model whose parameters and buffers are widened, run under `Exactly`. Rounding of one step is one draw: whatever lies
beyond the limit is drawn again with other embeddings, of the words that are read and of those that are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch

from sloth.compat.dispatch import pytree
from sloth.rewriter.graph.ambient import OFF, under
from sloth.rewriter.verify.report import GOOD, NOT_CHECKED, WRONG, Checked, Result
from sloth.rewriter.verify.run import WIDE, Exactly, NotExact, same_random_numbers, widened
from sloth.rewriter.verify.tally import LIMIT, Tally

DRAWS = 6  # at most
APART = 2.0**-6  # by which the numbers of a draw differ, times a normal number
LOGITS = 1 << 27  # elements: more are not compared

Found = dict[str, torch.Tensor]  # by "loss", "logits", "gradient of PARAMETER"


def check_step(model: torch.nn.Module, compiled: Callable[..., Any], batch: Mapping[str, Any]) -> Checked:
    """model: not compiled. Its gradients must be None. ValueError where it gives nothing that a gradient could be of."""
    told = Checked("the whole step", "", "", 0, 0, GOOD)
    try:
        _check(model, compiled, batch, told)
    except (NotExact, torch.OutOfMemoryError) as e:
        what = (
            "out of memory: take a smaller batch, or fewer layers" if isinstance(e, torch.OutOfMemoryError) else f"no fp64: {e}"
        )
        told.status, told.reason = NOT_CHECKED, what
        told.results.clear()
    return told


def _check(model: torch.nn.Module, compiled: Callable[..., Any], batch: Mapping[str, Any], told: Checked) -> None:
    calls = (_run(model, model._call_impl, batch, seed, backward=False)["loss"] for seed in (0, 1))
    if not torch.allclose(*calls, rtol=0, atol=0, equal_nan=True):
        told.status, told.reason = NOT_CHECKED, "two calls of the model differ: random numbers; set dropout to 0"
        return
    tallies: dict[tuple[str, str], Tally] = {}
    for number in range(DRAWS):
        with _apart(model, number):
            eager = _run(model, model._call_impl, batch)
            exact = _exactly(model, batch)
            try:
                ours = _run(model, compiled, batch)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:
                told.status, told.reason = WRONG, f"the compiled model raises {type(e).__name__}: {e}".split("\n")[0][:300]
                return
        _compare("varied" if number else "real", (ours, eager, exact), tallies, told)
        told.results = [Result(what, inputs, tally.judged()) for (inputs, what), tally in tallies.items()]
        beyond = (r.ratio.ratio > LIMIT if r.inputs == "real" and not number else r.ratio.open for r in told.results)
        if told.status == WRONG or any(r.ratio.worse for r in told.results) or not any(beyond):
            break
    if worse := [r for r in told.results if r.ratio.worse]:
        worst = max(worse, key=lambda r: r.ratio.ratio)
        told.status = WRONG
        told.reason = told.reason or f"the error of the {worst.what} is {worst.ratio.ratio:.3g} times eager's"


def _compare(inputs: str, found: tuple[Found, Found, Found], tallies: dict[tuple[str, str], Tally], told: Checked) -> None:
    ours, eager, exact = found
    for what, e in exact.items():
        if what not in eager:
            raise NotExact(f"eager has no {what}")
        if what not in ours:
            if bool(torch.count_nonzero(e)):
                told.status, told.reason = WRONG, f"the {what} is lost"
        elif ours[what].dtype != eager[what].dtype or ours[what].shape != eager[what].shape:
            told.status, told.reason = WRONG, f"the {what} is {ours[what].dtype} {list(ours[what].shape)}"
        else:
            tallies.setdefault((inputs, what), Tally(single=inputs == "real")).add(ours[what], eager[what], e)
    for what in ours.keys() - exact.keys():
        if bool(torch.count_nonzero(ours[what])):
            told.status, told.reason = WRONG, f"there is a {what}, which eager does not have"


def _run(
    model: torch.nn.Module, call: Callable[..., Any], batch: Mapping[str, Any], seed: int = 0, backward: bool = True
) -> Found:
    """One call, and its backward pass."""
    with same_random_numbers(seed), torch.set_grad_enabled(backward):
        out = call(**batch)
        loss = _loss(out)
        found = {"loss": loss.detach()}
        if not backward:
            return found
        if not loss.requires_grad:
            raise ValueError("no parameter of the model gets a gradient from its loss, so there is no step to verify")
        logits = getattr(out, "logits", None)
        if isinstance(logits, torch.Tensor) and logits is not loss and logits.numel() <= LOGITS:
            found["logits"] = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device).copy_(logits.detach())
        cotangent = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        loss.backward(torch.ones_like(loss) if loss.dim() == 0 else cotangent.to(loss.device, loss.dtype))
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[f"gradient of {name}"], p.grad = p.grad, None
    return found


def _loss(out: Any) -> torch.Tensor:
    loss = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    if loss is None and isinstance(out, Mapping):
        loss = out.get("loss")
    if loss is None and isinstance(out, tuple | list) and out:
        loss = out[0]
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        raise ValueError("verify needs a model that gives a loss: its output, its output's `loss`, or the first of a tuple")
    return loss


def _exactly(model: torch.nn.Module, batch: Mapping[str, Any]) -> Found:
    """The model itself, its numbers in fp64 meanwhile: a copy would not be what its closures and hooks hold."""
    narrow = {t: t.data for t in (*model.parameters(), *model.buffers()) if t.dtype in WIDE}
    try:
        for t, data in narrow.items():
            t.data = widened(data)
        with Exactly(), under(OFF):
            return _run(model, model._call_impl, pytree.tree_map(widened, dict(batch)))
    except (NotExact, torch.OutOfMemoryError):
        raise
    except Exception as e:  # an operation that takes no fp64; eager ran
        raise NotExact(f"there it raises {type(e).__name__}: {e}".split("\n")[0][:200]) from e
    finally:
        for t, data in narrow.items():
            t.data = data


@contextmanager
def _apart(model: torch.nn.Module, number: int) -> Iterator[None]:
    """For each number but 0 the model has other embeddings and another head, larger ones too: what is computed of numbers that
    are all alike is rounded alike. Of a model that does not say what these are, the first parameter is another.
    """
    changed = dict.fromkeys(p for p in _ends(model) if p.is_floating_point()) if number else {}
    before = {p: p.detach().clone() for p in changed}
    try:
        with torch.no_grad():
            for i, p in enumerate(changed):
                generator = torch.Generator(p.device).manual_seed(100 * number + i)
                noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=torch.float32)
                p.mul_((1 + APART * noise) * 2.0 ** (number % 4))
        yield
    finally:
        with torch.no_grad():
            for p, values in before.items():
                p.copy_(values)


def _ends(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    known = [get() for name in ("get_input_embeddings", "get_output_embeddings") if (get := getattr(model, name, None))]
    for module in known:
        yield from module.parameters() if module is not None else ()
    if not known:
        yield from islice(model.parameters(), 1)


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """And without gradients: those that there were come back."""
    changed: list[tuple[Any, str, Any]] = []

    def change(of: Any, name: str, value: Any) -> None:
        changed.append((of, name, getattr(of, name)))
        setattr(of, name, value)

    with ExitStack() as stack:
        stack.callback(lambda: [setattr(of, name, value) for of, name, value in reversed(changed)])
        for module in model.modules():
            if module._compiled_call_impl is not None:
                change(module, "_compiled_call_impl", None)
            for name, value in vars(module).items():
                if isinstance(value, float) and (name == "p" and "Dropout" in type(module).__name__ or "dropout" in name):
                    change(module, name, 0.0)
        for p in model.parameters():
            if p.grad is not None:
                change(p, "grad", None)
        yield
