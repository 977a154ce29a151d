"""The backend as torch.compile, accelerate and a user meet it: its name, options, logging, modes of use."""

from __future__ import annotations

import copy
import io
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from toys import Call, Stack, compiled, counts, llama_norm, matched

from sloth import explain
from sloth.options import OPTIONS, _arguments, parse
from sloth.rewriter import backend, sites
from sloth.rewriter.backend import listening, sloth
from sloth.rewriter.compile import inductor
from sloth.rewriter.graph import lower
from sloth.rewriter.report import MATCHED, GraphReport, Report, Site


def x_like(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def norm_and_mlp(m: Any, x: Tensor) -> Tensor:
    h = llama_norm(x, m.w)
    return torch.nn.functional.silu(h * m.v) * (h + m.v)


def report_of(options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """What is rewritten of a norm and an MLP; the result must be eager's."""
    model, x = Call(norm_and_mlp), x_like(2, 3, 8)
    with listening() as graphs:
        torch.testing.assert_close(compiled(model, options, **kwargs)(x), model(x), rtol=1e-4, atol=1e-4)
    return Report(graphs)


def cause(call: Any) -> BaseException:
    """The exception that Dynamo wraps."""
    with pytest.raises(Exception) as caught:
        call()
    e: BaseException = caught.value
    return getattr(e, "inner_exception", None) or e.__cause__ or e


def run_python(code: str, folder: Path) -> str:
    """In a process that has imported nothing, outside of the project."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- the name


def test_the_name_is_known_without_an_import(tmp_path: Path) -> None:
    code = """
import sys, torch
assert "sloth" in torch.compiler.list_backends(), torch.compiler.list_backends()
assert not [m for m in sys.modules if m.startswith("sloth.rewriter")], "import torch must not import sloth"
w = torch.ones(8, requires_grad=True)
def norm(x):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
x = torch.randn(2, 8)
y = torch.compile(norm, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(x)
torch.testing.assert_close(y, norm(x))
y.sum().backward()
from sloth.rewriter.plan.apply import Rewriter
from sloth.rewriter.backend import listening
torch._dynamo.reset()
with listening() as graphs:
    torch.compile(norm, backend="sloth", options={"sloth.inner_backend": "aot_eager"})(x)
print([s.status for g in graphs for s in g.sites], w.grad is not None)
"""
    assert run_python(code, tmp_path).strip() == "['matched'] True"


def test_accelerate_accepts_the_name_without_an_import(tmp_path: Path) -> None:
    code = """
import sys
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
plugin = TorchDynamoPlugin(backend="sloth", mode="default")
print(plugin.to_kwargs()["backend"].lower(), DynamoBackend("SLOTH").value, len([b for b in DynamoBackend if b.value == "SLOTH"]))
print(TorchDynamoPlugin(backend="inductor").to_kwargs()["backend"].lower())
print([m for m in sys.modules if m.startswith("sloth.rewriter")])
"""
    assert run_python(code, tmp_path).split("\n")[:3] == ["sloth SLOTH 1", "inductor", "[]"]


def test_importing_sloth_imports_no_torch(tmp_path: Path) -> None:
    assert run_python("import sys, sloth; print('torch' in sys.modules, sloth.__all__ != [])", tmp_path).strip() == "False True"


# ---------------------------------------------------------------- Inductor behind it


def test_inductor_compiles_what_was_rewritten_with_its_own_options() -> None:
    """The one test through Inductor: mode= and options= as under backend="inductor", and the gradients of eager."""
    model, x = Call(norm_and_mlp), x_like(2, 3, 8)
    theirs = copy.deepcopy(model)
    theirs(x).sum().backward()
    torch._dynamo.reset()
    with listening() as graphs:
        torch.compile(model, backend="sloth", options={"max_autotune": False, "sloth.disable": ""})(x).sum().backward()
    assert matched(Report(graphs)) == {"rms_norm": 1, "gated_mlp": 1} and "inductor" in graphs[0].seconds
    for ours, exact in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-4)


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Inductor's, of each graph; nothing is compiled."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(inductor, "_inductor", lambda config, gm, inputs: seen.append(config) or gm.forward)
    return seen


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_inductors(mode: str | None, configurations: list[dict[str, Any]]) -> None:
    torch._dynamo.reset()
    model, x = Call(norm_and_mlp), x_like(2, 3, 8)
    torch.compile(model, backend="sloth", mode=mode)(x)
    (config,) = configurations
    assert config.pop("post_grad_custom_post_pass") and config.pop("joint_custom_pre_pass")  # sloth's own
    assert {name: config.pop(name) for name in inductor.PREFERRED} == inductor.PREFERRED
    assert config.pop(inductor.SAME_BITS, False) == ("max-autotune" not in (mode or ""))
    assert config == torch._TorchCompileInductorWrapper(mode, {}, None).config


@pytest.mark.parametrize("theirs", [None, "1"])
def test_sizes_are_asked_for_where_the_user_wants_it(theirs: str | None, configurations, monkeypatch) -> None:
    """In every call, of each tensor; guards have asked before."""
    torch._dynamo.reset()
    for variable in inductor.ASSERTS.values():
        monkeypatch.setenv(variable, theirs) if theirs else monkeypatch.delenv(variable)
    torch.compile(Call(norm_and_mlp), backend="sloth")(x_like(2, 3, 8))
    config = torch._TorchCompileInductorWrapper(None, {}, None).config | configurations[0]
    assert [config.get(name) for name in inductor.ASSERTS] == ([None, None] if theirs else [False, False])


def test_options_are_inductors_without_ours(configurations: list[dict[str, Any]]) -> None:
    torch._dynamo.reset()
    options = {"max_autotune": True, "sloth.disable": "rope", "combo_kernels": False}
    torch.compile(Call(norm_and_mlp), backend="sloth", options=options)(x_like(2, 3, 8))
    assert configurations[0]["max_autotune"] is True and not [k for k in configurations[0] if "sloth" in k]
    assert configurations[0]["combo_kernels"] is False, "what sloth prefers gives way"
    assert options == {"max_autotune": True, "sloth.disable": "rope", "combo_kernels": False}, "the caller's dictionary stays"


@pytest.mark.parametrize("bad", [{"no_such_option": 1}, {"max_autotune": "perhaps"}])
def test_a_bad_option_of_inductor_raises_what_inductor_raises(bad: dict[str, Any]) -> None:
    model, x = Call(norm_and_mlp), x_like(2, 3, 8)
    torch._dynamo.reset()
    ours = cause(lambda: torch.compile(model, backend="sloth", options=bad)(x))
    theirs = cause(lambda: torch.compile(model, backend="inductor", options=bad)(x))
    assert type(ours) is type(theirs) and str(theirs).split("\n")[0] in str(ours)


# ---------------------------------------------------------------- our options


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown option sloth\.disabel of backend 'sloth'") as caught:
        sloth(torch.fx.symbolic_trace(lambda x: x), [], options={"sloth.disabel": "rope"})
    assert all(name in str(caught.value) and what in str(caught.value) for name, what in OPTIONS.items())
    assert "sloth.disabel" in str(cause(lambda: report_of({"sloth.disabel": "rope"})))


def test_disable_by_pattern_and_by_construct() -> None:
    assert matched(report_of()) == {"rms_norm": 1, "gated_mlp": 1}
    assert matched(report_of({"sloth.disable": "gated_mlp,gated_mlp_packed"})) == {"rms_norm": 1}
    assert matched(report_of({"sloth.disable": "rms_norm"})) == {"gated_mlp": 1}, "a construct takes all its patterns along"
    assert matched(report_of({"sloth.disable": ["gated_mlp", "rms_norm"]})) == {}
    assert matched(report_of({"sloth.disable": " rms_norm, gated_mlp "})) == {}
    assert matched(report_of({"sloth.disable": "add_rms_norm"})) == {"rms_norm": 1, "gated_mlp": 1}


def test_only_what_is_named_is_rewritten() -> None:
    assert {s.construct for s in report_of({"sloth.only": "rms_norm"}).sites if s.status == MATCHED} == {"rms_norm"}
    assert not parse({"sloth.only": ["rope", "lora"], "sloth.disable": "rope"}).deferrals
    assert {e.construct.name for e in parse({"sloth.only": ["rope", "lora"], "sloth.disable": "rope"}).entries} == {"lora"}


def test_what_is_left_out_says_so() -> None:
    """Not that a pattern is missing."""
    for options in ({"sloth.only": "rms_norm"}, {"sloth.disable": "gated_mlp"}):
        (site,) = [s for s in report_of(options).sites if s.status != MATCHED]
        assert (site.construct, site.status) == ("gated_mlp", "disabled") and "sloth.only" in site.reason


@pytest.mark.parametrize(
    "limit, made", [(0, []), (1, ["rms_norm"]), (2, ["rms_norm", "gated_mlp"]), (9, ["rms_norm", "gated_mlp"])]
)
def test_a_limit_stops_in_the_order_of_the_graph(limit: int, made: list[str]) -> None:
    """Halving it finds the rewrite that is to blame; what is left says so."""
    report = report_of({"sloth.limit": limit})
    assert sorted(s.construct for s in report.sites if s.status == MATCHED) == sorted(made)
    assert {s.reason for s in report.sites if s.status == "limit"} <= {f"sloth.limit={limit}"}
    assert len([s for s in report.sites if s.status == "limit"]) == 2 - len(made)


@pytest.mark.parametrize("bad", [-1, True, "2", 1.5])
def test_a_limit_is_a_number(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"sloth\.limit is a number of rewrites"):
        parse({"sloth.limit": bad})


def test_a_name_that_is_nearly_one_is_guessed() -> None:
    with pytest.raises(ValueError, match="Did you mean rms_norm"):
        parse({"sloth.only": "rmsnorm"})


def test_disable_of_unknown_names_is_refused() -> None:
    e = cause(lambda: report_of({"sloth.disable": "rms_norm,ropes,swiglu"}))
    assert isinstance(e, ValueError) and "ropes, swiglu" in str(e) and "rms_norm" in str(e) and "rope" in str(e)


def test_a_number_is_set_for_all_entries_of_a_name() -> None:
    own = {"sloth.linear_cross_entropy_rows.budget": 7, "sloth.linear_cross_entropy.budget": 80, "sloth.rope.budget": 1}
    found = _arguments(own)
    assert {name: numbers["budget"] for name, numbers in found.items()} == {
        "linear_cross_entropy": 80, "linear_cross_entropy_terms": 80, "linear_cross_entropy_rows": 7,
    }  # fmt: skip
    assert own == {"sloth.rope.budget": 1}, "it has none: unknown"
    with pytest.raises(ValueError, match=r"budget='1'.*only numbers"):
        _arguments({"sloth.linear_cross_entropy.budget": "1"})


def test_an_unknown_inner_backend_is_refused() -> None:
    assert "inducktor" in str(cause(lambda: report_of({"sloth.inner_backend": "inducktor"})))


# ---------------------------------------------------------------- use


def test_fullgraph() -> None:
    assert matched(report_of(fullgraph=True)) == {"rms_norm": 1, "gated_mlp": 1}


def test_dynamic_shapes_serve_every_length() -> None:
    """One set of graphs for all lengths: the third length compiles nothing."""
    model = Call(norm_and_mlp)
    run = compiled(model, dynamic=True)
    with listening() as graphs:
        for length in (3, 5):
            torch.testing.assert_close(run(x_like(2, length, 8)), model(x_like(2, length, 8)), rtol=1e-4, atol=1e-4)
        compiled_so_far = len(graphs)
        for length in (7, 11):
            torch.testing.assert_close(run(x_like(2, length, 8)), model(x_like(2, length, 8)), rtol=1e-4, atol=1e-4)
    assert len(graphs) == compiled_so_far
    assert [(s.construct, s.status) for s in graphs[-1].sites] == [("rms_norm", MATCHED), ("gated_mlp", MATCHED)]


def test_a_recompilation_is_rewritten_too() -> None:
    model = Call(norm_and_mlp)
    run = compiled(model, dynamic=False)
    with listening() as graphs:
        for length in (3, 5):
            run(x_like(2, length, 8))
    assert [len(g.sites) for g in graphs] == [2, 2]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context: Any) -> None:
    model, x = Stack(1).eval(), x_like(2, 4, 8)
    with context(), listening() as graphs:
        out = compiled(model)(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert not out.requires_grad and set(counts(Report(graphs)).values()) == {"2/2", "1/1"}


def test_train_and_eval_of_one_compiled_model() -> None:
    class Dropping(Call):
        def forward(self, x):
            return torch.nn.functional.dropout(llama_norm(x, self.w), 0.5, self.training)

    model, x = Dropping(None), x_like(4, 8, 8)
    run = compiled(model)
    assert (run(x) == 0).float().mean() > 0.2
    model.eval()
    torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    assert not (run(x) == 0).any()


def test_the_module_is_left_alone() -> None:
    """No class, method, parameter or hook of the model changes; it can be copied, saved and compiled again."""
    model, x = Stack(1), x_like(2, 4, 8)
    before = {n: (type(m), m.forward.__func__, dict(vars(m).get("_forward_hooks", {}))) for n, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    run = compiled(model)
    run(x).backward()
    assert {n: (type(m), m.forward.__func__, dict(vars(m).get("_forward_hooks", {}))) for n, m in model.named_modules()} == before
    assert list(run.state_dict()) == [f"_orig_mod.{n}" for n in state]
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    twin = copy.deepcopy(run)
    twin.load_state_dict(run.state_dict())
    torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_compiled_function_and_a_compiled_method() -> None:
    model, x = Stack(1), x_like(2, 4, 8)
    exact = model(x)
    with listening() as graphs:
        torch.testing.assert_close(compiled(lambda y: model(y) * 2)(x), exact * 2)
        torch._dynamo.reset()
        model.compile(backend="sloth", options={"sloth.inner_backend": "aot_eager"})
        torch.testing.assert_close(model(x), exact)
    assert [matched(Report([g])).total() for g in graphs] == [4, 4]


# ---------------------------------------------------------------- what it says


def test_one_line_for_each_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sloth"):
        report_of()
    lines = [r.getMessage() for r in caplog.records if r.name == "sloth"]
    assert len(lines) == 1 and lines[0].startswith("sloth: 1/1 RMSNorm, 1/1 gated MLP, ") and lines[0].endswith(" s")


def test_the_line_comes_before_inductor_and_says_how_long_it_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(
        backend, "compile_with", lambda inner, gm, given: said.extend(r.getMessage() for r in caplog.records) or gm
    )
    with caplog.at_level(logging.INFO, "sloth"):
        torch._dynamo.reset()
        torch.compile(Call(norm_and_mlp), backend="sloth")(x_like(2, 3, 8))
    (line,) = [s for s in said if s.startswith("sloth: ")]
    assert re.search(r"1/1 RMSNorm, .*; compiling takes about \d+ s, less what is cached$", line)


def test_what_is_out_of_sight_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that the matcher cannot look into have no sites, and would look complete."""
    for module in (lower, sites):
        monkeypatch.setattr(module, "BODIES", set())
    model = checkpointed_llama()
    with caplog.at_level(logging.INFO, "sloth"):
        report = explain(model, {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]})
    (line,) = [r.getMessage() for r in caplog.records if r.name == "sloth"]
    assert "1/5 RMSNorm" in line and "0/2 gated MLP" in line
    assert "14 linear layer(s) not looked into" in line and "2 attention(s) not looked into" in line
    assert report.to_dict()["unread"] == {"linear layer(s)": 14, "attention(s)": 2}
    assert "2 attention(s) not looked into: higher-order operator tag_activation_checkpoint" in str(report)


def checkpointed_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_hidden_layers=2, use_cache=False)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def test_a_graph_without_sites_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sloth"):
        compiled(lambda x: x.sin())(x_like(3))
    assert not [r for r in caplog.records if r.name == "sloth"]


def test_options_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those who write no options=; what the call says counts more."""
    monkeypatch.setenv("SLOTH_OPTIONS", "sloth.disable=rms_norm; sloth.linear_cross_entropy.budget=4096")
    chosen = parse(None)
    assert "rms_norm" not in {e.construct.name for e in chosen.entries}
    assert chosen.arguments["linear_cross_entropy"] == {"budget": 4096}
    chosen = parse({"sloth.disable": "rope"})
    assert {"rms_norm"} <= {e.construct.name for e in chosen.entries} and "rope" not in {e.construct.name for e in chosen.entries}


@pytest.mark.parametrize(
    "value, told", [("rope", "'rope'"), ("disable=rope", "sloth.NAME=VALUE"), ("sloth.disble=rope", "sloth.disable")]
)
def test_a_bad_environment_is_an_error_that_says_what_to_write(value: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTH_OPTIONS", value)
    with pytest.raises(ValueError, match=told):
        parse(None)


def test_a_graph_that_is_left_alone_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sloth.rewriter.pipeline.lower", lambda gm: [][0])
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    for _ in range(2):
        compiled(lambda x: x.sin())(x_like(3))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "sloth"]
    assert len(warnings) == 1 and "left to Inductor as it was: IndexError" in warnings[0]


def test_the_last_compilation_that_dynamo_allows_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        fn = torch.compile(lambda x, n: x * n, backend="sloth", options={"sloth.inner_backend": "eager"}, dynamic=False)
        for n in (2, 3):
            fn(x_like(3), n)
    assert [r for r in caplog.records if "compiled a last time" in r.getMessage()]


def test_listeners_hear_only_what_is_compiled_meanwhile() -> None:
    model, x = Call(norm_and_mlp), x_like(2, 3, 8)
    run = compiled(model)
    with listening() as first, listening() as second:
        run(x)
    run(x_like(2, 5, 8))
    assert len(first) == len(second) == 1


def test_the_report_names_the_source_line() -> None:
    (norm,) = [s for s in report_of().sites if s.construct == "rms_norm"]
    assert norm.file == llama_norm.__code__.co_filename
    assert 0 < norm.line - llama_norm.__code__.co_firstlineno <= 4


def test_a_report_in_a_narrow_terminal_loses_nothing():
    site = Site("cross_entropy", "linear_cross_entropy[mean]", MATCHED, "site-packages/transformers/a_long_name_of_a_file.py", 31)
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(Report(graphs=[GraphReport(sites=[site])], titles={"cross_entropy": "cross-entropy"}))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    assert ["".join(c.strip() for c in cells) for cells in zip(*rows, strict=True)][2:] == [
        "linear_cross_entropy[mean]×1",
        "a_long_name_of_a_file.py:31",
    ]
