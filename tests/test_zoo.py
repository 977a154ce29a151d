"""The zoo: a fixed few of its architectures as the committed result says, and what a comparison of results tells."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sloth.__main__ import app
from sloth.zoo import sweep
from sloth.zoo.measure import RUNS, measure, step
from sloth.zoo.models import architectures
from sloth.zoo.results import architectures_table, compared, share, sums_table, totals
from sloth.zoo.sizes import VARIANTS

COMMITTED = Path(__file__).parents[1] / "benchmarks" / "results" / "zoo.json"
FEW = {"qwen3": ("fp32",), "gpt_neox": ("fp32",)}
MORE = ["llama", "gemma3_text", "deepseek_v3", "mixtral", "phi3", "cohere", "gpt_oss", "qwen3_next", "mamba"]


@pytest.fixture(scope="module")
def rows():
    return sweep.load(COMMITTED)["rows"]


@pytest.mark.parametrize("arch", FEW)
def test_a_few_are_as_the_result_says(arch, rows):
    """If something is better on purpose: `make zoo`."""
    found = measure(arch, FEW[arch])
    assert all(run["state"] == "ok" for run in found["runs"].values()), found
    assert compared(rows, {arch: found}, whole=False) == ([], [])


@pytest.mark.nightly
@pytest.mark.parametrize("arch", MORE)
def test_more_are_as_the_result_says(arch, rows):
    assert compared(rows, {arch: measure(arch)}, whole=False)[0] == []


def test_the_result_has_nothing_that_is_wrong(rows):
    """All that trains in eager trains here, and nearly all sites are matched."""
    assert rows.keys() <= {*architectures(), *VARIANTS} and len(rows) > 150
    for run in {"fp32"}.union(*(row["runs"] for row in rows.values())):
        found = totals(rows, run)
        assert found["ok"] == found["train"] > 150 and share(found["constructs"]) > 0.9, run


def test_tables_do_not_tell_what_was_not_run(before):
    before["old"]["runs"] |= dict.fromkeys(list(RUNS)[1:3], before["old"]["runs"]["fp32"])
    sums = sums_table({"llama": before["llama"]}, {"rope": "RoPE"}).splitlines()
    assert sums[0].startswith("| | fp32 |") and sums[-2:] == ["| RoPE | 2/2 | – | – | – |", "| all sites | 100.0% | – | – | – |"]
    llama, old = architectures_table(before, {}).splitlines()[2:]
    assert llama.endswith("| not run |") and old.endswith("| not run: bf16 LoRA |")


@pytest.fixture
def before():
    run = {"state": "ok", "graphs": 1, "breaks": [], "constructs": {"rms_norm": [5, 5], "rope": [2, 2]}, "missed": []}
    return {arch: {"arch": arch, "class": "", "runs": {"fp32": copy.deepcopy(run)}} for arch in ("llama", "old")}


def test_a_comparison_names_what_is_lost_new_and_gone(before):
    now = copy.deepcopy(before)
    now["new"] = now.pop("old")
    missed = {"construct": "rms_norm", "status": "dtype", "where": "a.py:7", "reason": "expected cast", "sites": 1}
    now["llama"]["runs"]["fp32"] |= {"constructs": {"rms_norm": [4, 5], "rope": [3, 3]}, "missed": [missed], "graphs": 2}
    worse, better = compared(before, now)
    assert worse == [
        "llama, fp32: rms_norm was 5/5, is 4/5 · a.py:7 dtype: expected cast",
        "llama, fp32: graphs: 1 before, 2 now",
        "old: is gone",
    ]
    assert better == ["llama, fp32: rope was 2/2, is 3/3", "new: is new (fp32 ok: 5/5 rms_norm, 2/2 rope)"]
    assert compared(before, {"llama": before["llama"]}, whole=False) == ([], [])  # nobody asked for the other


def test_what_was_never_compared_is_worse_where_it_does_not_train(before):
    """A run that the earlier result lacks, and an architecture."""
    now = copy.deepcopy(before)
    now["llama"]["runs"] |= {"bf16": {"state": "fails", "why": "E: no"}, "fp32 LoRA": {"state": "untrained", "why": "E: old"}}
    now["new"] = {"runs": {"fp32": {"state": "differs", "loss": 0.0, "gradient": 0.1, "worst": "a.weight"}}}
    worse, better = compared(before, now)
    assert worse == ["llama, bf16: is fails (E: no)", "new, fp32: is differs (loss 0e+00, gradient 1e-01 of a.weight)"]
    assert better == ["new: is new (fp32 differs)"]


@pytest.mark.parametrize(
    ("where", "state"), [("tiny_model", "untrained"), ("step", "untrained"), ("sites_called", None), ("_told", "fails")]
)
def test_what_raises_behind_the_eager_step_is_ours(where, state, monkeypatch):
    import sloth.zoo.measure as zoo

    monkeypatch.setattr(zoo, "compiled", lambda *args, **how: ({"state": "ok", "breaks": []}, []))
    monkeypatch.setattr(zoo, where, lambda *args, **how: 1 / 0)
    run = zoo.measure("llama", ("fp32",))["runs"]["fp32"]
    assert run["state"] == (state or "ok") and "ZeroDivisionError" in run["why" if state else "uncounted"]


def test_a_comparison_names_what_trains_no_more(before):
    now = copy.deepcopy(before)
    now["llama"]["runs"]["fp32"] |= {"state": "fails", "why": "RuntimeError: no"}
    assert compared(before, now) == (["llama, fp32: was ok, is fails (RuntimeError: no)"], [])
    assert compared(now, before) == ([], ["llama, fp32: was fails, is ok"])


def test_other_numbers_are_noticed(monkeypatch):
    """Under a backend that scales a gradient, and one that raises."""
    import sloth.zoo.measure as zoo

    compile_ = torch.compile

    def wrong(model, **how):
        compiled = compile_(model, backend="eager")

        def call(**batch):
            out = compiled(**batch)
            next(model.parameters()).register_hook(lambda g: g * 1.01)
            return out

        return call

    monkeypatch.setattr(zoo.torch, "compile", wrong)
    run = measure("llama", ("fp32",))["runs"]["fp32"]
    assert run["state"] == "differs" and 5e-3 < run["gradient"] < 2e-2
    monkeypatch.setattr(zoo.torch, "compile", lambda model, **how: lambda **batch: 1 / 0)
    run = measure("llama", ("fp32",))["runs"]["fp32"]
    assert run["state"] == "fails" and run["why"] == "ZeroDivisionError: division by zero" and "fails" in run["torch"]


@pytest.mark.parametrize(("times", "state"), [(1, "ok"), (30, "differs")])
def test_an_expert_without_tokens_is_chance_unless_it_never_has_any(times, state, monkeypatch):
    import sloth.zoo.measure as zoo

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

        def forward(self, input_ids, both=True):
            x = torch.nn.functional.one_hot(input_ids, 4).to(self.experts[0].weight.dtype)
            return (self.experts[0](x).mean() + 1e-3 * (self.experts[1](x).mean() if both else 0.0),)

    torch.manual_seed(0)
    model, left = Routed().bfloat16(), [True] * times
    monkeypatch.setattr(zoo.torch, "compile", lambda model, **how: lambda **batch: model(**batch, both=not (left and left.pop())))
    batch = {"input_ids": torch.arange(8).view(2, 4) % 4}
    found, _ = zoo.compiled(model, batch, step(model, model, batch), "any")
    assert found["state"] == state, found


def test_a_step_puts_buffers_and_the_random_state_back():
    """Also one that raises."""

    class Counts(torch.nn.BatchNorm1d):
        def forward(self, x):
            out = (super().forward(x).sum(),)
            assert x.shape[0] > 2, "few"
            return out

    model = Counts(3)
    state = torch.random.get_rng_state()
    before = {n: b.clone() for n, b in model.named_buffers()}
    step(model, model, {"x": torch.ones(4, 3)})
    with pytest.raises(AssertionError, match="few"):
        step(model, model, {"x": torch.ones(2, 3)})
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_process_that_takes_too_long_or_dies_costs_what_it_has_not_sent(monkeypatch):
    """Two at once, whose pipes are open at the same time if they may be."""
    import os
    import time
    from multiprocessing.context import ForkContext

    def measured(arch, runs):
        if runs == ("bf16",):
            time.sleep(60) if arch == "slow" else os._exit(7)
        return {"arch": arch, "class": "C", "runs": {runs[0]: {"state": "ok"}}, "seconds": 0}

    def pipe(context, *how):
        made = pipe_(context, *how)
        time.sleep(delays.pop())
        return made

    delays, pipe_ = [0.6, 0.1], ForkContext.Pipe
    monkeypatch.setattr(ForkContext, "Pipe", pipe)
    monkeypatch.setattr(sweep, "_made_ready", lambda: None)
    monkeypatch.setattr(sweep, "measure", measured)
    found = list(sweep.sweep(dict.fromkeys(("slow", "dead"), ("fp32", "bf16")), limit=1.5, jobs=2))
    assert [row["arch"] for row in found] == ["dead", "slow"]  # as they are ready
    dead, slow = (row["runs"] for row in found)
    assert dead["fp32"] == slow["fp32"] == {"state": "ok"} and found[0]["class"] == "C"
    assert dead["bf16"]["why"] == "died with exit code 7" and dead["bf16"]["state"] == "fails"
    assert slow["bf16"]["why"] == "took more than 2 s" and slow["bf16"]["late"]


def test_a_result_is_written_whole_or_not_at_all(tmp_path, monkeypatch, before):
    file = tmp_path / "zoo.json"
    sweep.write(file, {"versions": {}, "rows": before})
    held = file.read_text()

    def full(path, text):
        path.write_bytes(text[:20].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="space"):
        sweep.write(file, {"versions": {}, "rows": {}})
    assert file.read_text() == held


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["lama"], "Did you mean llama?"),
        (["llama", "--only", "fp16"], "'fp16' is not a run that is known"),
        (["llama", "--compare", __file__], "holds no result of `sloth zoo`"),
    ],
)
def test_bad_input(given, said):
    result = CliRunner().invoke(app, ["zoo", *given])
    assert result.exit_code == 2 and said in result.output


def test_what_is_there_is_not_run_again(tmp_path, monkeypatch, before):
    """Only runs that the file lacks, or has of other code, or that took too long."""
    asked = []

    def sweep_(todo, limit, jobs):
        asked.append(dict(todo))
        for arch, runs in todo.items():
            yield {"arch": arch, "class": "", "seconds": 0, "runs": {run: before["old"]["runs"]["fp32"] for run in runs}}

    monkeypatch.setattr("sloth.zoo.command.sweep", sweep_)
    out = tmp_path / "zoo.json"
    now = sweep.versions()
    before["llama"]["runs"]["fp32"]["of"] = sweep.key(now)
    before["old"]["runs"]["fp32"]["of"] = "other"
    before["mamba"] = {"arch": "mamba", "class": "", "runs": {"fp32": before["llama"]["runs"]["fp32"] | {"late": True}}}
    before["opt"] = copy.deepcopy(before["old"])
    sweep.write(out, {"versions": {"other": {}, "older": {}}, "rows": before})
    result = CliRunner().invoke(app, ["zoo", "llama", "mamba", "opt", "--only", "fp32", "--only", "bf16", "--out", str(out)])
    assert result.exit_code == 0 and asked == [{"llama": ("bf16",), "mamba": ("fp32", "bf16"), "opt": ("fp32", "bf16")}]
    assert "1 runs in" in result.output and "are of other code" in result.output
    found = json.loads(out.read_text())
    assert found["versions"] == {sweep.key(now): now, "other": {}}  # a row that nobody asked for says whose it is
    of = {arch: {run: one["of"] for run, one in row["runs"].items()} for arch, row in found["rows"].items()}
    assert of.pop("old") == {"fp32": "other"}
    assert of.keys() == {"llama", "mamba", "opt"}
    assert all(runs == {"fp32": sweep.key(now), "bf16": sweep.key(now)} for runs in of.values())


def test_other_source_is_other_code(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    monkeypatch.setattr(sweep, "__file__", str(tmp_path / "zoo" / "sweep.py"))
    (tmp_path / "a.py").write_text("1")
    first = sweep.key(sweep.versions())
    assert sweep.key(sweep.versions()) == first
    (tmp_path / "a.py").write_text("2")
    assert sweep.key(sweep.versions()) != first


def test_the_docs_name_architectures_that_are_known():
    root = Path(__file__).parents[1]
    text = "\n".join(page.read_text() for page in (root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")))
    named = {name for given in re.findall(r"sloth zoo((?: [a-z]\S*)+)", text) for name in re.findall(r"[\w+-]+", given)}
    assert named and named <= {*architectures(), *VARIANTS}
