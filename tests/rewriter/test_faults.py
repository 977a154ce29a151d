"""What fails while a graph is compiled or run costs a rewrite or the compiler, not the run; what is no fault is raised."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.exc import InductorError
from torch.utils.checkpoint import checkpoint
from toys import Call, llama_norm

from sloth import Construct, pattern
from sloth.rewriter import faults, notices
from sloth.rewriter.backend import listening
from sloth.rewriter.compile import inductor
from sloth.rewriter.match.registry import unregister
from sloth.rewriter.plan.apply import Rewriter
from sloth.rewriter.report import MATCHED, GraphReport

ALL = {"sloth.always": "cross_entropy"}
EAGER = ALL | {"sloth.inner_backend": "eager"}


def three(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A norm, a gated MLP and a loss."""
    h = llama_norm(x, m.w)
    return F.cross_entropy((F.silu(h * m.v) * (h + m.v)).flatten(0, 1), torch.arange(6) % 8)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    said: set[str] = set()
    monkeypatch.setattr(notices, "_said", said)
    torch._dynamo.reset()
    yield said
    faults.forget()


def targets(gm: fx.GraphModule) -> str:
    return " ".join(str(n.target) for n in gm.graph.nodes)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], Exception | None]], list[str]]:
    """An Inductor that fails where it is told to, by the graph's operators, and runs all else uncompiled; what it was given."""

    def fails(why: Callable[[str], Exception | None]) -> list[str]:
        given: list[str] = []

        def compile_graph(config: Any, gm: fx.GraphModule, inputs: Any) -> Any:
            given.append(targets(gm))
            if (error := why(given[-1])) is not None:
                raise error
            return gm.forward

        monkeypatch.setattr(inductor, "_inductor", compile_graph)
        return given

    return fails


def step(model: torch.nn.Module, call: Callable[..., Any], x: torch.Tensor = X) -> list[torch.Tensor]:
    model.zero_grad()
    loss = call(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def trains(fn: Callable[..., Any] = three, **options: Any) -> GraphReport:
    """Two steps are eager's."""
    model = Call(fn)
    call = torch.compile(model, backend="sloth", options=ALL | options)
    with listening() as reports:
        for _ in range(2):
            torch.testing.assert_close(step(model, call), step(model, model), rtol=1e-4, atol=1e-5)
    return reports[0]


def matched(report: GraphReport) -> set[str]:
    return {s.construct for s in report.sites if s.status == MATCHED}


# ---------------------------------------------------------------- while it compiles


SHOWN = "%1 = sloth.gated_act.default(%0), %2 = sloth.rms_norm.default(%1)"


@pytest.mark.parametrize("says", ["", "sloth::gated_act_backward", "target: sloth.gated_act.default", SHOWN])
def test_the_guilty_entry_alone_is_left_out(compiler: Any, nothing_said: set[str], says: str) -> None:
    """It is known from the error, or found by leaving out halves of what was used."""
    given = compiler(lambda ops: RuntimeError(f"no {says}\nlines") if "gated_act" in ops else None)
    assert matched(trains()) == {"rms_norm", "cross_entropy"}
    (warning,) = nothing_said
    assert "without gated_mlp, first used at test_faults.py:" in warning and "RuntimeError: no" in warning
    assert "'sloth.disable': 'gated_mlp'" in warning
    assert "sloth" not in given[1] if says in ("", SHOWN) else len(given) == 2


def test_where_two_are_guilty_nothing_is_rewritten(compiler: Any, nothing_said: set[str]) -> None:
    compiler(lambda ops: RuntimeError("no") if "gated_act" in ops or "rms_norm" in ops or "cross_entropy.d" in ops else None)
    assert not matched(trains())
    (warning,) = nothing_said
    assert "'sloth.disable': 'cross_entropy,gated_mlp,rms_norm'" in warning


def test_a_graph_that_inductor_cannot_compile_runs_uncompiled(compiler: Any, nothing_said: set[str]) -> None:
    given = compiler(lambda ops: RuntimeError("no C++ compiler"))
    trains()
    (warning,) = nothing_said
    assert "as the model has it" in warning and "RuntimeError: no C++ compiler" in warning
    assert len(given) == 2, "with rewrites and without"


def test_the_next_sizes_are_compiled_without_it_at_once(compiler: Any, nothing_said: set[str]) -> None:
    given = compiler(lambda ops: RuntimeError("sloth.gated_act") if "gated_act" in ops else None)
    model = Call(lambda m, x: three(m, x) * x.shape[-2])
    call = torch.compile(model, backend="sloth", dynamic=False)
    step(model, call)
    step(model, call, X.transpose(0, 1).contiguous())
    assert ["gated_act" in ops for ops in given] == [True, False, False] and len(nothing_said) == 1


@pytest.mark.nightly
def test_a_backward_pass_that_does_not_compile_is_met_in_time(monkeypatch: pytest.MonkeyPatch, nothing_said: set[str]) -> None:
    """In `backward()` it would be too late: it is compiled with the forward pass."""
    from torch._inductor import compile_fx

    compile_graph = compile_fx.compile_fx_inner

    def compiling(*args: Any, **how: Any) -> Any:
        if how.get("is_backward"):
            raise RuntimeError("no backward pass")
        return compile_graph(*args, **how)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiling)
    x = torch.ones(3, requires_grad=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(lambda x: x.sin().sum(), backend="sloth")(x).backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
    (warning,) = nothing_said
    assert "runs uncompiled: RuntimeError: no backward pass" in warning


def test_a_folder_that_cannot_be_written_is_told(compiler: Any, nothing_said: set[str]) -> None:
    compiler(lambda ops: InductorError(PermissionError(13, "Permission denied", "/cache/locks"), None))
    trains()
    (warning,) = nothing_said
    assert "PermissionError" in warning and "/cache/locks" in warning and "TORCHINDUCTOR_CACHE_DIR" in warning


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), torch._dynamo.exc.SkipFrame("not this one")])
def test_what_is_no_fault_is_passed_on(compiler: Any, nothing_said: set[str], error: Exception) -> None:
    given = compiler(lambda ops: error)
    call = torch.compile(Call(three), backend="sloth")
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(Exception, match="no memory"):
            call(X)
    else:
        call(X)
    assert all("sloth" in ops for ops in given) and not nothing_said, "none is tried again without rewrites"


def test_a_rewrite_that_fails_costs_its_entry(compiler: Any, nothing_said: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = Rewriter.apply

    def apply(self: Rewriter, matches: list[Any]) -> fx.Node:
        node = place(self, matches)
        return node if matches[0].pattern.name != "gated_mlp" else 1 / 0

    monkeypatch.setattr(Rewriter, "apply", apply)
    compiler(lambda ops: None)
    assert matched(trains()) == {"rms_norm", "cross_entropy"}
    (warning,) = nothing_said
    assert warning.startswith("gated_mlp is left out") and "ZeroDivisionError" in warning


def test_another_compiler_raises_what_it_raises(nothing_said: set[str]) -> None:
    """Where it fails on the graph as it was; else it is treated as Inductor."""

    def compiles(gm: fx.GraphModule, _: Any) -> Any:
        if bad(targets(gm)):
            raise ZeroDivisionError("mine")
        return gm.forward

    torch._dynamo.register_backend(compiles, name="sloth_test_compiles")
    bad = lambda ops: "gated_act" in ops  # noqa: E731
    assert matched(trains(**{"sloth.inner_backend": "sloth_test_compiles"})) == {"rms_norm", "cross_entropy"}
    bad = lambda ops: True  # noqa: E731
    torch._dynamo.reset()
    with pytest.raises(Exception, match="mine"):
        torch.compile(Call(three), backend="sloth", options={"sloth.inner_backend": "sloth_test_compiles"})(X)


# ---------------------------------------------------------------- while it runs


@pytest.fixture
def raising() -> Iterator[list[Exception | None]]:
    """An entry for sinh, whose operator raises what stands here."""
    error: list[Exception | None] = [ValueError("my bug")]

    @torch.library.custom_op("sloth_test::sinh", mutates_args=())
    def op(x: torch.Tensor) -> torch.Tensor:
        if error[0] is not None:
            raise error[0]
        return torch.sinh(x)

    op.register_fake(torch.empty_like)
    op.register_autograd(
        lambda ctx, dy: dy * torch.cosh(ctx.saved_tensors[0]),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    @pattern(Construct("sinh", "sinh"), op=op, dims={"x": "B S D"}, name="test_sinh")
    def reference(x: torch.Tensor) -> torch.Tensor:
        return torch.sinh(x)

    yield error
    unregister("test_sinh")


def sinh(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.sinh(llama_norm(x, m.w) * m.v).sum()


def test_a_graph_whose_operator_raises_runs_as_the_model_has_it(raising: Any, nothing_said: set[str]) -> None:
    assert matched(trains(sinh, **EAGER)) == {"sinh", "rms_norm"}
    (warning,) = nothing_said
    assert "raises where the model does not" in warning and "ValueError: my bug" in warning and "rms_norm,test_sinh" in warning


@pytest.mark.parametrize("dynamic", [False, True])
def test_bodies_of_checkpoints_and_sizes_that_vary_run_so_too(raising: Any, nothing_said: set[str], dynamic: bool) -> None:
    """The body was rewritten in place; sizes are arguments."""
    model = Call(lambda m, x: checkpoint(lambda y: sinh(m, y), x * x.shape[0], use_reentrant=False))
    call = torch.compile(model, backend="sloth", options=EAGER, dynamic=dynamic)
    for x in (X, X, torch.cat((X, X)) if dynamic else X):
        torch.testing.assert_close(step(model, call, x), step(model, model, x), rtol=1e-4, atol=1e-5)
    assert len(nothing_said) == 1


def test_what_the_model_raises_too_is_its_own_error(nothing_said: set[str]) -> None:
    model = Call(lambda m, x: F.cross_entropy(llama_norm(x, m.w).flatten(0, 1), torch.arange(6) + 1000 * m.bad))
    model.bad = torch.ones((), dtype=torch.int64)
    call = torch.compile(model, backend="sloth", options=EAGER)
    with pytest.raises(IndexError) as eager:
        model(X)
    with pytest.raises(IndexError) as ours:
        call(X)
    assert str(ours.value) == str(eager.value) and not nothing_said
    model.bad.zero_()
    torch.testing.assert_close(step(model, call), step(model, model), rtol=1e-4, atol=1e-5)


def test_a_graph_that_writes_is_not_run_twice(raising: Any, nothing_said: set[str]) -> None:
    model = Call(lambda m, x: sinh(m, x.add_(1)))
    with pytest.raises(ValueError, match="my bug"):
        torch.compile(model, backend="sloth", options=EAGER)(X.clone())


def test_memory_that_is_not_there_leaves_the_process_usable(raising: Any, nothing_said: set[str]) -> None:
    """It is raised as it is, nothing holds the tensors of that step, and the next step is rewritten as before."""
    model = Call(sinh)
    call = torch.compile(model, backend="sloth", options=EAGER)
    raising[0] = torch.OutOfMemoryError("CUDA out of memory")
    x = X.clone().requires_grad_()
    given = weakref.ref(x)
    with pytest.raises(torch.OutOfMemoryError):
        call(x)
    raising[0] = None
    del x
    gc.collect()
    assert given() is None and not nothing_said
    torch.testing.assert_close(step(model, call), step(model, model), rtol=1e-4, atol=1e-5)
