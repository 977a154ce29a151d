"""The compiler behind the rewriter."""

import os
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode

from sloth.rewriter.compile import inductor

NAME = next(n for n in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(triton_kernel_wrap, n))


@pytest.fixture
def analyses() -> list:
    """What torch's analysis of Triton kernels was asked, where it is a record."""
    return []


def remembering(asked: list):
    return inductor._remembering(lambda kernel, arguments, *rest: asked.append((kernel, arguments)) or len(asked))


def launched(fn, **options):
    """As wrap_triton does for num_warps=…: the same function in a new autotuner with one configuration."""
    return SimpleNamespace(fn=fn, configs=[SimpleNamespace(kwargs=options)])


def test_a_kernel_is_analysed_once_for_each_signature(analyses):
    def fn(): ...

    x = torch.empty(3)
    with inductor.memoized_triton_analysis({}):
        ask = remembering(analyses)
        first = ask(launched(fn), {"x": x, "BLOCK": 128})
        assert ask(launched(fn), {"x": torch.empty(7), "BLOCK": 128}) == first
        assert len(analyses) == 1
        ask(launched(fn), {"x": x, "BLOCK": 256})
        ask(launched(fn), {"x": x.half(), "BLOCK": 128})
        ask(launched(fn, ROWS=2), {"x": x, "BLOCK": 128})
        ask(launched(lambda: 0), {"x": x, "BLOCK": 128})
        assert len(analyses) == 5


def test_what_is_not_understood_is_analysed_each_time(analyses):
    kernel = launched(lambda: 0)
    with inductor.memoized_triton_analysis({}):
        ask = remembering(analyses)
        for _ in range(2):
            ask(kernel, {"x": object()})
            ask(kernel, {"x": 1}, {"x": "a tensor map"})
    assert len(analyses) == 4


def test_what_others_compile_is_not_remembered(analyses):
    """Another thread, meanwhile, or this one behind an error: torch analyses each time, and nothing is kept alive."""
    ask, known = remembering(analyses), {}
    with pytest.raises(ZeroDivisionError), inductor.memoized_triton_analysis(known):
        other = Thread(target=lambda: [ask(launched(len), {"x": 1}) for _ in range(2)])
        other.start()
        other.join()
        raise ZeroDivisionError
    ask(launched(len), {"x": 1})
    assert len(analyses) == 3 and not known
    assert hasattr(getattr(triton_kernel_wrap, NAME), "__wrapped__")


def test_a_block_that_names_no_dtype_is_not_found_for_another(monkeypatch):
    """Its dtype is the thread's, which the text of the graph does not say."""

    def run(x):
        with torch.autocast("cpu"):
            return x @ x

    before = torch.get_autocast_dtype("cpu")
    try:
        for dtype in (torch.bfloat16, torch.float16):
            torch.set_autocast_dtype("cpu", dtype)
            torch._dynamo.reset()
            assert torch.compile(run, backend="sloth")(torch.ones(4, 4)).dtype == dtype
    finally:
        torch.set_autocast_dtype("cpu", before)


def test_caches_know_our_sources():
    seen = []
    inductor.compile_with(lambda gm, inputs: seen.append(torch.compiler.config.cache_key_tag), None, [])
    with torch.autocast("cpu", torch.bfloat16):
        inductor.compile_with(lambda gm, inputs: seen.append(torch.compiler.config.cache_key_tag), None, [])
    assert inductor.sources_digest() in seen[0] and seen[0] != seen[1] and torch.compiler.config.cache_key_tag == ""


def test_a_graph_that_holds_autocast_is_found_in_the_cache_again():
    """torch refuses to keep what AOTAutograd makes of one: every trainer's graph under mixed precision."""

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ x).sin()

    counters.clear()
    for _ in range(2):
        torch._dynamo.reset()
        torch.compile(run, backend="sloth")(torch.ones(3, 3))
    found = counters["aot_autograd"]
    assert found["autograd_cache_hit"] and not found["autograd_cache_bypass"], found


def test_a_backward_pass_is_compiled_as_its_forward_pass_is(monkeypatch):
    """And before any step: what fails there costs a rewrite, not a run."""
    from torch._inductor import compile_fx

    seen, compile_graph = [], compile_fx.compile_fx_inner

    def compiling(*args, **how):
        seen.append((torch.compiler.config.cache_key_tag, inductor._memo.get() is not None))
        return compile_graph(*args, **how)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compiling)
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):  # monkeypatch's undo deletes an option that is an alias
        y = torch.compile(lambda x: x.sin().sum(), backend="sloth")(torch.ones(3, requires_grad=True))
        assert len(seen) == 2
        y.backward()
    assert len(seen) == 2 and all(tag.startswith(f"sloth-{inductor.sources_digest()}-") and memo for tag, memo in seen)
    assert torch.compiler.config.cache_key_tag == "" and inductor._memo.get() is None


def test_options_need_a_compiler_that_takes_them():
    with pytest.raises(ValueError, match="aot_eager"):
        inductor.compiler("aot_eager", None, {"max_autotune": True})


@pytest.mark.parametrize("where", ["options", "config"])
def test_a_pass_of_the_users_own_runs_behind_ours(where, monkeypatch):
    """Both run, whichever way it was given; a pass without a name for the caches keeps its graph out of them."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen = []

    class Named(CustomGraphPass):
        def __call__(self, graph):
            seen.append("named")

        def uuid(self):
            return "theirs"

    slot = "post_grad_custom_post_pass"
    for theirs, uuid in ((seen.append, None), (Named(), (inductor.sources_digest(), "theirs"))):
        with torch._inductor.config.patch({slot: theirs} if where == "config" else {}):
            config = inductor.compiler("inductor", None, {slot: theirs} if where == "options" else {}).args[0]
            assert config[slot].uuid() == uuid
            torch._dynamo.reset()
            options = {slot: theirs} if where == "options" else None
            with torch.compiler.config.patch(force_disable_caches=True):  # or a run of before is found
                torch.compile(lambda x: x.sin(), backend="sloth", options=options)(torch.ones(3))
    assert "named" in seen and len(seen) > 1


def test_without_one_the_caches_know_our_sources_alone():
    config = inductor.compiler("inductor", None, {}).args[0]
    assert config["joint_custom_pre_pass"].uuid() == config["post_grad_custom_post_pass"].uuid() == inductor.sources_digest()


# ---------------------------------------------------------------- launches and workers of Inductor


@pytest.mark.parametrize("theirs", [None, "0"])
def test_our_kernels_are_launched_by_torch_while_we_compile(theirs, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if theirs is None:
        monkeypatch.delenv(inductor.STATIC_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(inductor.STATIC_VARIABLE, theirs)
    assert inductor._may_launch() is (theirs is None)
    with pytest.raises(KeyError), inductor._launched_by_torch():
        assert os.environ[inductor.STATIC_VARIABLE] == (theirs or "1"), "for workers that start meanwhile"
        assert inductor._may_launch() is False, "it is their setting now, or was before"
        raise KeyError
    assert os.environ.get(inductor.STATIC_VARIABLE) == theirs


@pytest.mark.parametrize(("device", "cached", "started"), [("cuda", False, 1), ("cuda", True, 0), ("cpu", False, 0)])
def test_workers_start_before_they_are_needed(device, cached, started, monkeypatch, tmp_path):
    from torch._inductor.async_compile import AsyncCompile

    calls = []
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: calls.append(1))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if cached:
        (tmp_path / "fxgraph").mkdir()
    graph = torch.fx.Graph()
    with FakeTensorMode():
        graph.placeholder("x").meta["example_value"] = torch.empty(2, device=device)
    graph.output(())
    inductor.start_workers(torch.fx.GraphModule({}, graph))
    assert len(calls) == started


@pytest.mark.parametrize("used", [True, False])
def test_workers_start_while_dynamo_traces(used, monkeypatch, tmp_path):
    """Where the GPU is in use when the backend is imported: behind the first graph's trace they are seconds late. Nor does Dynamo
    wait for torch's files to be read; who compiles does.
    """
    from torch._inductor import codecache
    from torch._inductor.async_compile import AsyncCompile

    calls, may_read = [], Event()
    monkeypatch.setattr(codecache, "torch_key", lambda: calls.append("key") if may_read.wait(10) else None)
    monkeypatch.setattr(AsyncCompile, "use_process_pool", lambda: calls.append("workers"))
    monkeypatch.setattr(inductor, "_start_triton", lambda: calls.append("triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(inductor, "_begun", [])
    inductor.start_early()
    assert "key" not in calls
    graph = torch.fx.Graph()
    with FakeTensorMode():
        graph.placeholder("x").meta["example_value"] = torch.empty(2, device="cuda")
    graph.output(())
    compiling = [Thread(target=inductor.start_workers, args=(torch.fx.GraphModule({}, graph),)) for _ in range(2)]
    for thread in compiling:
        thread.start()
    compiling[1].join(0.2)
    assert not (used and "workers" in calls), "each of them waits"
    may_read.set()
    for thread in compiling:
        thread.join()
    assert sorted(calls) == (["key", "triton", *["workers"] * 3] if used else ["triton", "workers", "workers"])
