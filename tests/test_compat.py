"""sloth.compat: it alone names private parts of torch and Triton, and each name still does what sloth uses it for.

A new torch that breaks one says which: `test_names_do_what_they_did[dynamo.install_guard]`.
`CHECKS` holds one small check for each.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sloth.compat import dispatch, dynamo, inductor
from sloth.compat import triton as launching

SRC = Path(__file__).parent.parent / "src"
AREAS = ("dispatch", "dynamo", "inductor", "triton")
CHECKS: dict[str, Callable[[], Any]] = {}
PUBLIC = ("torch._check", "torch.ops.")  # documented; operators, whose names are what graphs hold


def uses(*names: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """What is below is what sloth uses these names for."""

    def enter(check: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return enter


# ---------------------------------------------------------------- no private name elsewhere


def is_private(name: str) -> bool:
    first, *parts = name.split(".")
    hidden = first in ("torch", "triton") and any(p.startswith("_") and not p.startswith("__") for p in parts)
    return hidden and not name.startswith(PUBLIC)


def private_names(source: str) -> Iterator[str]:
    """Private names of torch's and Triton's that code mentions, whatever it imports them as. Of what an object holds that was not
    named by its path (`node._erased`) nothing is known here.
    """
    tree, known = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known.update({a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names})
            yield from filter(is_private, (a.name for a in node.names))
        elif isinstance(node, ast.ImportFrom):
            known.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
            yield from filter(is_private, (f"{node.module}.{a.name}" for a in node.names))
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, _, rest = ast.unparse(node).partition(".")
            if first in known and not is_private(known[first]) and is_private(f"{known[first]}.{rest}"):
                yield f"{known[first]}.{rest}"


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda f: f.relative_to(SRC).as_posix())
def test_private_names_are_in_compat_alone(file: Path) -> None:
    if (SRC / "compat") not in file.parents:
        found = sorted(set(private_names(file.read_text())))
        assert not found, f"{found}: give them a place in src/compat, with a check here"


@pytest.mark.parametrize(
    "code, found",
    [("from torch._guards import Guard", ["torch._guards.Guard"]), ("import torch\ntorch._dynamo.reset", ["torch._dynamo.reset"]),
     ("from torch import fx\nfx._compat.x", ["torch.fx._compat.x"]), ("import torch._C as c", ["torch._C"]),
     ("from torch import Tensor\nTensor._make_wrapper_subclass", ["torch.Tensor._make_wrapper_subclass"]),
     ("import torch\ntorch._check(1); torch.ops.aten._unsafe_view; torch.__version__", []),
     ("import triton\ntriton._C", ["triton._C"])],
)  # fmt: skip
def test_private_names_are_seen(code: str, found: list[str]) -> None:
    assert list(private_names(code)) == found


def exported(area: str) -> set[str]:
    """What a module of compat gives to others."""
    found = set()
    for node in ast.walk(ast.parse((SRC / f"compat/{area}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch", "triton")):
            found |= {a.asname or a.name for a in node.names}
    return found


# ---------------------------------------------------------------- dispatch


@uses("dispatch.OpOverload", "dispatch.HigherOrderOperator")
def _() -> None:
    assert isinstance(torch.ops.aten.add.Tensor, dispatch.OpOverload) and not isinstance(torch.add, dispatch.OpOverload)
    assert isinstance(torch.ops.higher_order.tag_activation_checkpoint, dispatch.HigherOrderOperator)


@uses("dispatch.opdef_of")
def _() -> None:
    twice = torch.library.custom_op("sloth_compat::twice", lambda x: 2 * x, mutates_args=(), schema="(Tensor x) -> Tensor")
    assert dispatch.opdef_of(torch.ops.sloth_compat.twice.default)._backward_fn is None
    twice.register_autograd(lambda ctx, g: 2 * g)
    assert dispatch.opdef_of(torch.ops.sloth_compat.twice.default)._backward_fn is not None
    assert dispatch.opdef_of(torch.ops.aten.add.Tensor) is None


@uses("dispatch._cuda_clearCublasWorkspaces")
def _() -> None:
    if not torch.cuda.is_available():
        return dispatch.clear_workspaces()
    torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    held = torch.cuda.memory_allocated()
    dispatch.clear_workspaces()
    assert torch.cuda.memory_allocated() < held


@uses("dispatch.has_kernel")
def _() -> None:
    assert dispatch.has_kernel("aten::mm", "Autograd") and dispatch.has_kernel("aten::mm", "AutocastCPU")
    assert not dispatch.has_kernel("aten::mm", "CompositeImplicitAutograd")


@uses("dispatch.DispatchKey", "dispatch.SchemaCheckMode", "dispatch.enable_python_dispatcher")
def _() -> None:
    """A mode that sees operators before autograd takes them apart."""
    seen = []

    class Recorder(dispatch.SchemaCheckMode):
        def __init__(self) -> None:
            super().__init__()
            self._dispatch_key = dispatch.DispatchKey.PreDispatch

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with dispatch.enable_python_dispatcher(), Recorder():
        nn.functional.linear(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2))
    assert torch.ops.aten.linear.default in seen


@uses("dispatch.FakeTensor", "dispatch.FakeTensorMode", "dispatch.detect_fake_mode")
def _() -> None:
    assert dispatch.detect_fake_mode() is None
    with dispatch.FakeTensorMode() as mode:
        x = torch.ones(2, 3) @ torch.ones(3, 4)
        assert dispatch.detect_fake_mode() is mode
    assert isinstance(x, dispatch.FakeTensor) and x.shape == (2, 4)


@uses("dispatch.disable_fake_tensor_cache")
def _() -> None:
    """Nothing is kept of a call, and everything again behind it."""
    with dispatch.FakeTensorMode() as mode:
        with dispatch.disable_fake_tensor_cache(mode):
            known = mode.cache_info()
            torch.ones(2, 3) @ torch.ones(3, 4)
            assert mode.cache_info() == known
        torch.ones(2, 3) @ torch.ones(3, 4)
        assert mode.cache_info() != known


@uses("dispatch.pytree")
def _() -> None:
    assert dispatch.pytree.tree_map(lambda n: n + 1, {"a": (1, [2])}) == {"a": (2, [3])}
    assert dispatch.pytree.tree_map_only(int, str, (1, 2.0)) == ("1", 2.0) and dispatch.pytree.tree_leaves([1, (2,)]) == [1, 2]


@uses("dispatch.TorchDispatchMode")
def _() -> None:
    class Doubled(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return 2 * func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    with Doubled():
        y = x.exp()
    assert y.tolist() == [2, 2]


@uses("dispatch.is_traceable_wrapper_subclass")
def _() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert dispatch.is_traceable_wrapper_subclass(TwoTensor(torch.ones(2), torch.ones(2)))
    assert not dispatch.is_traceable_wrapper_subclass(torch.ones(2))


@uses("dispatch.SymT", "dispatch.symbol_is_type")
def _() -> None:
    from torch.utils._sympy.symbol import make_symbol

    number = make_symbol(dispatch.SymT.FLOAT, 0)
    assert dispatch.symbol_is_type(number, dispatch.SymT.FLOAT) and not dispatch.symbol_is_type(number, dispatch.SymT.SIZE)


@uses("dispatch.set_grad_enabled", "dispatch.enter_autocast", "dispatch.exit_autocast", "dispatch.enter_inference_mode",
      "dispatch.exit_inference_mode")  # fmt: skip
def _() -> None:
    """Blocks, as Dynamo writes them into a graph."""
    found: set[Any] = set()

    def record(gm: fx.GraphModule, examples: Any) -> Any:
        found.update(n.target for n in gm.graph.nodes)
        return gm.forward

    @torch.compile(backend=record)
    def blocks(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = x @ x
        with torch.inference_mode():
            return x + 1

    blocks(torch.ones(2, 2))
    assert {dispatch.set_grad_enabled, dispatch.enter_autocast, dispatch.exit_autocast} <= found
    assert {dispatch.enter_inference_mode, dispatch.exit_inference_mode} <= found


@uses("dispatch.DisableTorchFunctionSubclass", "dispatch.disabled_torch_function", "dispatch.make_wrapper_subclass")
def _() -> None:
    class Counting(Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            cls.calls += 1
            return super().__torch_function__(func, types, args, kwargs or {})

        __torch_dispatch__ = dispatch.disabled_torch_function

    x = dispatch.make_wrapper_subclass(Counting, (2, 3), dtype=torch.float32, device=torch.device("cpu"))
    with dispatch.DisableTorchFunctionSubclass():
        assert x.shape == (2, 3) and Counting.calls == 0
    assert x.dtype == torch.float32 and Counting.calls == 1
    assert nn.Parameter.__torch_function__ is dispatch.disabled_torch_function


@uses("dispatch.current_graph_task_id")
def _() -> None:
    x, seen = torch.ones(1, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda g: seen.append(dispatch.current_graph_task_id()))
    for _ in range(2):
        y.backward(torch.ones(1), retain_graph=True)
    assert dispatch.current_graph_task_id() == -1 and len(set(seen)) == 2 and -1 not in seen


@uses("dispatch.saved_tensors_hooks")
def _() -> None:
    """The first time and the second, a checkpoint's."""
    seen = []

    def fn(x: Tensor) -> Tensor:
        seen.append(dispatch.saved_tensors_hooks(False)[0].__module__)
        return x.exp()

    torch.utils.checkpoint.checkpoint(fn, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert seen == ["torch.utils.checkpoint"] * 2 and dispatch.saved_tensors_hooks(False) is None


@uses("dispatch.CheckpointStop")
def _() -> None:
    """Raised in what is computed again, when all that was saved is there."""
    seen = []

    def fn(x: Tensor) -> Tensor:
        try:
            return x.exp()
        except Exception as e:
            seen.append(type(e))
            raise

    torch.utils.checkpoint.checkpoint(fn, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    assert seen == [dispatch.CheckpointStop]


@uses("dispatch.CompileContext", "dispatch.TracingContext", "dispatch.tracing")
def _() -> None:
    """Inside of a backend: the graph's number, its fake tensors and its guards; a copy for a region."""
    from copy import copy

    def look(gm: fx.GraphModule, examples: Any) -> Any:
        context = dispatch.TracingContext.get()
        assert dispatch.CompileContext.current_compile_id().frame_compile_id == 0
        assert isinstance(context.fake_mode, dispatch.FakeTensorMode) and context.guards_context.dynamo_guards
        assert context.fakify_first_call is False
        with dispatch.tracing(copy(context)) as other:
            assert dispatch.TracingContext.try_get() is other is not context
        return gm.forward

    torch.compile(lambda x: x.sin(), backend=look)(torch.ones(2))
    assert dispatch.TracingContext.try_get() is None


# ---------------------------------------------------------------- dynamo


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(2, 2), 1.5

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


def while_tracing(probe: Callable[[Any, Any, list], Any]) -> None:
    """Calls probe(tx, variable of the module, variables of its arguments) where Dynamo traces the call of a Linear."""
    kind = dynamo.UnspecializedNNModuleVariable
    trace, raised, seen = kind.call_function, [], []

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        try:
            seen.append(probe(tx, self, list(args)) if type(self.value) is nn.Linear else None)
        except Exception as e:
            raised.append(e)
        return trace(self, tx, args, kwargs)

    kind.call_function = call_function
    try:
        torch.compile(Layers(), backend="eager")(torch.ones(2, 2))
    finally:
        kind.call_function = trace
    assert seen or raised, "Dynamo traces modules by another way"
    if raised:
        raise raised[0]


@uses("dynamo.skip")
def _() -> None:
    """Wherever the function is reached from, wrapped or not; what it calls is traced."""
    traced: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        traced.extend(n.name for n in gm.graph.nodes if n.op == "call_function")
        return gm.forward

    def skipped(inner: Any, x: Tensor) -> Tensor:
        return inner(x) * 3

    dynamo.skip(skipped)
    torch.compile(lambda x: skipped(lambda x: x + 1, x) - 2, backend=backend)(torch.ones(2))
    assert "mul" not in traced and any(name.startswith("sub") for name in traced)


@uses("dynamo.maybe_mark_dynamic")
def _() -> None:
    """One graph for all sizes, though the tensor was a constant by its address before."""
    sizes: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        sizes.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return gm.forward

    def double(held: dict[str, Tensor]) -> Tensor:
        return held["x"] * 2

    compiled = torch.compile(double, backend=backend)
    for n in (4, 6):
        x = torch.ones(n)
        torch._dynamo.mark_static_address(x)
        assert vars(x).pop(dynamo.STATIC_MARK)
        dynamo.maybe_mark_dynamic(x, 0)
        assert compiled({"x": x}).shape == (n,)
    assert len(sizes) == 1 and len(sizes[0]) == 1


@uses("dynamo.callback_handler")
def _() -> None:
    ended: list[Any] = []
    dynamo.callback_handler.register_end_callback(ended.append)
    try:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert len(ended) == 1
    finally:
        dynamo.callback_handler.remove_end_callback(ended.append)
    torch.compiler.reset()
    assert ended.append not in dynamo.callback_handler.end_callbacks


@uses("dynamo.RestartAnalysis", "dynamo.SkipFrame", "dynamo.breaks_the_graph")
def _() -> None:
    """A backend may raise them: the code then runs without it."""

    def declines(gm: fx.GraphModule, examples: Any) -> Any:
        raise dynamo.SkipFrame("not this one")

    torch._dynamo.reset()
    assert torch.compile(lambda x: x + 1, backend=declines)(torch.ones(1)).item() == 2
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    assert issubclass(TensorifyScalarRestartAnalysis, dynamo.RestartAnalysis)
    assert DynamicOutputShapeException in dynamo.breaks_the_graph


@uses("dynamo.config")
def _() -> None:
    config = dynamo.config
    assert config.assume_static_by_default and config.automatic_dynamic_shapes
    with config.patch(recompile_limit=3, accumulated_recompile_limit=4):
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (3, 4)


@uses("dynamo.lookup_backend")
def _() -> None:
    assert torch.compile(torch.sin, backend=dynamo.lookup_backend("aot_eager"))(torch.zeros(1)) == 0


@uses("dynamo.counters")
def _() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x.sin()
        print(end="")
        return x.sin()

    dynamo.counters.clear()
    torch.compile(broken, backend="eager")(torch.ones(1))
    assert sum(dynamo.counters["graph_break"].values()) == 1 and dynamo.counters["stats"]["unique_graphs"] == 2


@uses("dynamo.innermost_backend")
def _() -> None:
    model = nn.Linear(2, 2)
    model.compile(backend="aot_eager", dynamic=True, options={"a": 1})
    call = model._compiled_call_impl
    backend = dynamo.innermost_backend(call.__closure__[call.__code__.co_freevars.index("callback")].cell_contents)
    assert "aot_eager" in (getattr(backend, "compiler_name", None), getattr(backend, "__name__", None))
    assert backend.compiler_fn is dynamo.lookup_backend("aot_eager")
    assert backend.dynamic is True and backend.kwargs == {"options": {"a": 1}}


@uses("dynamo.GetAttrVariable", "dynamo.SuperVariable")
def _() -> None:
    one = dynamo.ConstantVariable.create(value=1)
    up = dynamo.SuperVariable(one, one)
    assert up.objvar is one and dynamo.GetAttrVariable(up, "method").obj is up and callable(dynamo.GetAttrVariable.var_getattr)


@uses("dynamo.Guard", "dynamo.Source", "dynamo.GuardSource", "dynamo.LocalSource", "dynamo.ChainedSource", "dynamo.TypeSource",
      "dynamo.closure_vars", "dynamo.GuardBuilder", "dynamo.AttrSource", "dynamo.DictGetItemSource")  # fmt: skip
def _() -> None:
    x = dynamo.LocalSource("x")
    of = dynamo.DictGetItemSource(dynamo.AttrSource(x, "there"), "key")
    assert (of.index, of.base.member, of.name) == ("key", "there", "L['x'].there['key']")
    kind = dynamo.TypeSource(x)
    assert isinstance(x, dynamo.Source) and x.guard_source is dynamo.GuardSource.LOCAL and x.local_name == "x"
    assert isinstance(kind, dynamo.ChainedSource) and kind.base == x and not isinstance(x, dynamo.ChainedSource)
    moved = dataclasses.replace(kind, base=dynamo.LocalSource("y"))
    assert moved != kind and moved.get_value({"L": {"y": 3}, "G": {}}, dict(dynamo.closure_vars()), {}) is int
    guard = dynamo.Guard(x, dynamo.GuardBuilder.CONSTANT_MATCH)
    assert guard.create_fn_name() == "CONSTANT_MATCH" and guard.originating_source is x
    assert guard.create_fn is dynamo.GuardBuilder.CONSTANT_MATCH


@uses("dynamo.install_guard")
def _() -> None:
    def probe(tx: Any, module: Any, args: list) -> None:
        known, guard = (
            dispatch.TracingContext.get().guards_context.dynamo_guards,
            dynamo.Guard(module.source, dynamo.GuardBuilder.ID_MATCH),
        )
        assert guard not in set(known)
        dynamo.install_guard(guard)
        assert guard in set(known)

    while_tracing(probe)


@uses("dynamo.FrameStateSizeEntry", "dynamo.process_automatic_dynamic")
def _() -> None:
    """After it was told of another value, a float is one that changes."""

    def probe(tx: Any, module: Any, args: list) -> None:
        entries = [dynamo.FrameStateSizeEntry.make_scalar(value) for value in (1.0, 2.0)]
        for entry in entries:
            found = dynamo.process_automatic_dynamic(tx, "L['a']", entry, is_unspecialized_nn_module=True)
        assert type(found.scalar).__name__ == "AutoDynamic", found.scalar

    while_tracing(probe)


@uses("dynamo.get_fake_value", "dynamo.wrap_fx_proxy", "dynamo.TensorVariable")
def _() -> None:
    def probe(tx: Any, module: Any, args: list) -> None:
        x = args[0].realize() if isinstance(args[0], dynamo.LazyVariableTracker) else args[0]
        assert type(x) is dynamo.TensorVariable
        graph = tx.output.current_tracer.graph
        node = graph.call_function(torch.sin, (x.as_proxy().node,))
        value = dynamo.get_fake_value(node, tx)
        made = dynamo.wrap_fx_proxy(tx, fx.Proxy(node, tx.output.current_tracer), example_value=value)
        assert isinstance(value, dispatch.FakeTensor) and type(made) is dynamo.TensorVariable and made.as_proxy().node is node

    while_tracing(probe)


@uses("dynamo.VariableBuilder", "dynamo.VariableTracker", "dynamo.UnspecializedNNModuleVariable")
def _() -> None:
    def probe(tx: Any, module: Any, args: list) -> None:
        from torch._dynamo.source import AttrSource

        source = AttrSource(module.source, "bias")
        made = dynamo.VariableBuilder(tx, source)(module.value.bias)
        assert isinstance(made, dynamo.VariableTracker) and made.as_proxy().node.op == "placeholder"
        assert source.get_value({"G": tx.output.root_tx.f_globals, "L": tx.output.root_tx.f_locals}, {}, {}) is module.value.bias

    while_tracing(probe)


@uses("dynamo.ConstantVariable", "dynamo.ListVariable", "dynamo.TupleVariable", "dynamo.ValueMutationNew",
      "dynamo.LazyVariableTracker", "dynamo.SymNodeVariable")  # fmt: skip
def _() -> None:
    three = dynamo.ConstantVariable.create(value=3)
    for kind in (dynamo.TupleVariable, dynamo.ListVariable):
        assert kind([three], mutation_type=dynamo.ValueMutationNew()).items[0].value == 3
    assert callable(dynamo.LazyVariableTracker.realize) and callable(dynamo.SymNodeVariable.as_proxy)


# ---------------------------------------------------------------- inductor


@uses("inductor.CUSTOM_EXTERN_KERNEL_CODEGEN", "inductor.CustomCodegen", "inductor.V")
def _() -> None:
    """How the call of an operator is written into Inductor's code, by its name there."""
    written: list[str] = []
    name = f"twice_{id(written)}"
    lib = torch.library.Library("sloth_compat_written", "FRAGMENT")
    lib.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, lambda x: 2 * x, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sloth_compat_written::{name}", torch.empty_like, lib=lib)
    op = getattr(torch.ops.sloth_compat_written, name).default

    def write(node: Any, writeline: Any) -> None:
        written.append(node.python_kernel_name)
        node.python_kernel_name = "(lambda x: 3 * x)"
        inductor.V.graph.wrapper_code.generate_fallback_kernel(node)

    inductor.CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = inductor.CustomCodegen(python=write)
    try:
        out = torch.compile(lambda x: op(x) + 1)(torch.ones(3))
    finally:
        del inductor.CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"]
    assert written == [f"torch.ops.{op}"] and out.tolist() == [4.0] * 3


@uses("inductor.PyCodeCache")
def _() -> None:
    """Source on disk, which Triton reads when it compiles, and the same module for the same source."""
    source = "import triton\n\n\n@triton.jit\ndef twice(x):\n    return 2 * x\n"
    made = inductor.PyCodeCache.load(source)
    assert inductor.PyCodeCache.load(source) is made and Path(made.__file__).read_text().strip() == source.strip()
    assert "return 2 * x" in inspect.getsource(made.twice.fn)


@uses("inductor.functorch_config")
def _() -> None:
    from torch._dynamo.backends.common import aot_autograd

    with inductor.functorch_config.patch(force_non_lazy_backward_lowering=True):
        compiled: list[str] = []
        name = lambda which: lambda gm, _: compiled.append(which) or gm.forward  # noqa: E731
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=name("forward"), bw_compiler=name("backward"))
        torch.compile(lambda x: x.sin().sum(), backend=backend)(torch.ones(3, requires_grad=True))
    assert compiled == ["forward", "backward"]


@uses("inductor.config", "inductor.InductorOptions")
def _() -> None:
    slots = ("joint_custom_pre_pass", "post_grad_custom_post_pass", "combo_kernels", "combo_kernels_pointwise_only")
    assert all(hasattr(inductor.config, name) for name in slots) and inductor.config.unsafe_marked_cacheable_functions == {}
    assert inductor.config.triton.cudagraphs is False and inductor.config.max_autotune is False
    assert inductor.InductorOptions("reduce-overhead", {"combo_kernels": True}, None).config.get("triton.cudagraphs") is True
    with pytest.raises(RuntimeError):
        inductor.InductorOptions(None, {"no_such_option": True}, None)


@uses("inductor.compile_fx", "inductor.compile_fx_inner", "inductor.CustomGraphPass", "inductor.must_recompute",
      "inductor.get_node_storage")  # fmt: skip
def _() -> None:
    """A compilation with a pass of ours, and a compiler of each pass of ours; views share their memory."""
    seen: list[str] = []

    class Look(inductor.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            assert not any(map(inductor.must_recompute, graph.nodes))
            (view,) = (
                n for n in graph.nodes if getattr(n.target, "is_view", False) or n.target is torch.ops.aten.reshape.default
            )
            assert inductor.get_node_storage(view) == inductor.get_node_storage(view.args[0]) is not None
            seen.append("pass")

        def uuid(self) -> str:
            return f"test_compat {os.getpid()}"

    def inner(gm: fx.GraphModule, examples: Any, **kwargs: Any) -> Any:
        seen.append("inner")
        return inductor.compile_fx_inner(gm, examples, **kwargs)

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        return inductor.compile_fx(gm, examples, inner_compile=inner, config_patches={"post_grad_custom_post_pass": Look()})

    x = torch.ones(2, 3)
    with torch.compiler.config.patch(force_disable_caches=True):
        assert torch.compile(lambda x: x.view(3, 2).sin(), backend=backend)(x).equal(x.view(3, 2).sin())
    assert seen == ["inner", "pass"]


@uses("inductor.kernel_side_table", "inductor.triton_kernel_wrapper_functional")
def _() -> None:
    kernel = object()
    assert inductor.kernel_side_table.get_kernel(inductor.kernel_side_table.add_kernel(kernel)) is kernel
    assert isinstance(inductor.triton_kernel_wrapper_functional, dispatch.HigherOrderOperator)


@uses("inductor.cache_dir", "inductor.triton_cache_dir")
def _() -> None:
    assert inductor.triton_cache_dir(0).startswith(inductor.cache_dir())


@uses("inductor.torch_key")
def _() -> None:
    assert inductor.torch_key() is inductor.torch_key()  # remembered, since a thread asks first


@uses("inductor.AsyncCompile", "inductor.reset_cudagraph_trees")
def _() -> None:
    assert callable(inductor.AsyncCompile.use_process_pool)
    inductor.reset_cudagraph_trees()


# ---------------------------------------------------------------- triton


@uses("triton.InterpretedFunction")
def _() -> None:
    """Without a GPU, tests run kernels in the interpreter; what does so is an instance."""
    triton = pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    assert isinstance(triton.jit(while_tracing), launching.InterpretedFunction) is interpreted


@uses("triton.driver")
def the_driver_is_made_when_asked_for() -> None:
    assert (launching.active_driver() is not None) == torch.cuda.is_available()


@uses("triton.triton_key")
def a_digest_of_tritons_files_is_made_once() -> None:
    from triton.runtime.cache import triton_key

    key = launching.triton_key()
    assert len(key) > 20 and triton_key.cache_info().currsize == 1 and launching.triton_key() is key


@uses("triton.raw_stream", "triton.StaticallyLaunchedCudaKernel")
def _() -> None:
    assert (launching.raw_stream is not None) >= torch.cuda.is_available() and launching.static_launcher(object()) is None


# ---------------------------------------------------------------- all of them


def test_each_name_has_a_check() -> None:
    names = {f"{area}.{name}" for area in AREAS for name in exported(area)} | {"dispatch.make_wrapper_subclass"}
    assert names == set(CHECKS)


# Builds for CPUs have no streams.
OF_GPUS = {"triton.raw_stream", "triton.StaticallyLaunchedCudaKernel", "dispatch._cuda_clearCublasWorkspaces"}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_names_do_what_they_did(name: str) -> None:
    area, leaf = name.split(".")
    if name not in OF_GPUS:
        getattr(import_module(f"sloth.compat.{area}"), leaf)
    torch.compiler.reset()
    CHECKS[name]()
