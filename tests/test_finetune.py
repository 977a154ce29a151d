"""The fine-tuning example: what it refuses, and that a tiny run trains, resumes and comes back from disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the example is a script: its modules lie beside it

import comparison  # noqa: E402
import corpus  # noqa: E402
import finetune  # noqa: E402
import numpy as np  # noqa: E402
import run_folder  # noqa: E402
import training  # noqa: E402

SENTENCE = "the sloth hangs in the tree and moves one arm a day while all the leaves grow green"
WORDS = SENTENCE.split()
TINY = ["--hidden", "32", "--layers", "1", "--vocab", "300", "--seq", "16", "--batch", "2", "--lr", "0.01"]
QUICK = ["--backend", "eager", "--no-compare"]


def call(*options: str | Path) -> Result:
    """Run the command line in this process (its contenders have processes of their own)."""
    return CliRunner().invoke(finetune.app, [str(option) for option in options])


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds all `parts`."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much where the cores are taken."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small made-up texts."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0)
    for i in range(25):
        (folder / f"{i:02}.txt").write_text(" ".join(draw.choice(WORDS, 300)))
    return folder


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six uninterrupted steps."""
    out = tmp_path_factory.mktemp("finished") / "deep" / "run"
    result = call("--out", out, "--text", text, *TINY, *QUICK, "--steps", "6")
    assert result.exit_code == 0, (result.output, result.exception)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process: the start of another one is most of the time of a tiny run."""

    def run_contender(run: run_folder.RunFolder, backend: str, *, resume: bool = False) -> bool:
        training.train(run, backend, resume=resume)
        return True

    monkeypatch.setattr(finetune, "run_contender", run_contender)


def result_of(out: Path, backend: str = "eager") -> dict[str, Any]:
    return json.loads((out / "runs" / backend / "result.json").read_text())


# What a run leaves


def test_a_run_learns_and_leaves_nothing_half_done(finished: Path) -> None:
    result = result_of(finished)
    assert result["steps"] == 6 and len(result["loss"]) == len(result["seconds"]) == 6
    assert result["loss"][-1] < result["loss"][0]
    assert result["eval"][-1][0] == 6
    assert result["tokens_per_second"] > 0 and result["peak_memory"] > 0
    names = {path.name for path in finished.iterdir()}
    assert names == {"run.json", "tokenizer", "tokens", "start", "runs", "model"}
    assert [path.name for path in finished.parent.iterdir()] == ["run"]


def test_the_result_loads_in_plain_transformers(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    start = AutoModelForCausalLM.from_pretrained(finished / "start").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer("the sloth hangs in the tree", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the sloth hangs in the tree"
    checkpoint = AutoModelForCausalLM.from_pretrained(finished / "runs" / "eager" / "checkpoint-6").eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, checkpoint(ids).logits)
        assert not torch.allclose(logits, start(ids).logits, atol=1e-2)


@pytest.mark.usefixtures("in_process")
def test_resumed_equals_uninterrupted(finished: Path, text: Path, tmp_path: Path) -> None:
    """The uninterrupted run had a process of its own, so that nothing can be left over from one to the other."""
    out = tmp_path / "run"
    first = call("--out", out, "--text", text, *TINY, *QUICK, "--steps", "3")
    assert first.exit_code == 0, (first.output, first.exception)
    # Nothing but the steps is said again: the rest is the run's own. A checkpoint cut short is passed over.
    (out / "runs" / "eager" / "checkpoint-4").mkdir()
    second = call("--out", out, "--resume", "--no-compare", "--steps", "6")
    assert second.exit_code == 0, (second.output, second.exception)
    assert "checkpoint-3" in second.output.replace("\n", "")
    assert result_of(out)["loss"] == result_of(finished)["loss"]
    ours, theirs = (weights(folder / "model") for folder in (out, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


@pytest.mark.usefixtures("in_process")
def test_resuming_a_finished_run_changes_nothing(copy: Path) -> None:
    before = snapshot(copy)
    assert call("--out", copy, "--resume", "--no-compare").exit_code == 0
    assert snapshot(copy) == before
    refused(call("--out", copy, "--resume", "--no-compare", "--steps", "4"), "has 6 already")
    assert snapshot(copy) == before


@pytest.mark.usefixtures("in_process")
def test_resuming_a_run_that_died_while_saving(copy: Path, finished: Path) -> None:
    """All steps done, but no result: the steps after the checkpoint before the last are made again."""
    (copy / "runs" / "eager" / "result.json").unlink()
    shutil.rmtree(copy / "model")
    assert call("--out", copy, "--resume", "--no-compare").exit_code == 0
    assert result_of(copy)["loss"] == result_of(finished)["loss"] and len(result_of(copy)["seconds"]) == 2
    assert weights(copy / "model").keys() == weights(finished / "model").keys()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("in_process")
def test_a_compiled_contender_follows_the_same_curve(copy: Path, finished: Path) -> None:
    """Through TrainingArguments(torch_compile_backend=...), from the same folder."""
    assert finetune.run_contender(run_folder.RunFolder(copy), "aot_eager")
    compiled, eager = result_of(copy, "aot_eager"), result_of(finished)
    assert comparison.largest_difference(compiled["loss"], eager["loss"]) < 1e-4
    assert not list((copy / "runs" / "aot_eager").glob("checkpoint-*"))


def test_accelerate_takes_sloth_with_no_import_of_it() -> None:
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    assert TorchDynamoPlugin(backend="sloth").to_kwargs()["backend"] == "sloth"
    assert TorchDynamoPlugin(backend="inductor").backend is DynamoBackend.INDUCTOR


# What it refuses


def test_missing_text(tmp_path: Path) -> None:
    result = call("--out", tmp_path / "new" / "run", "--text", tmp_path / "nowhere", *TINY, *QUICK)
    refused(result, "nowhere does not exist")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe\x00binary"])
def test_empty_text(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    for given in (tmp_path, tmp_path / "a.txt"):
        refused(call("--out", tmp_path / "run", "--text", given, *TINY, *QUICK), "holds no text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_short_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a few words are not enough")
    result = call("--out", tmp_path / "run", "--text", tmp_path / "a.txt", *TINY, *QUICK)
    refused(result, "too short", "needs 64", "--seq")
    assert not (tmp_path / "run").exists()


def test_sequence_longer_than_the_positions(text: Path, tmp_path: Path) -> None:
    result = call("--out", tmp_path / "run", "--text", text, *TINY, *QUICK, "--seq", "1025")
    refused(result, "--seq 1025", "1024 positions")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--arch", "lama"], "--arch lama"),
        (["--arch", "t5"], "--arch t5 cannot be built"),
        (["--hidden", "100"], "multiple of 64"),
        (["--backend", "slot"], "--backend slot is unknown"),
        (["--resume"], "holds no run"),
        (["--resume", "--force"], "give one of them"),
    ],
)
def test_bad_options(text: Path, tmp_path: Path, options: list[str], part: str) -> None:
    refused(call("--out", tmp_path / "run", "--text", text, *TINY, *QUICK, *options), part)
    assert not list(tmp_path.iterdir())


def test_model_that_cannot_be_loaded(text: Path, tmp_path: Path) -> None:
    result = call("--out", tmp_path / "run", "--text", text, "--model", tmp_path / "none", *QUICK)
    refused(result, "--model", "none")
    assert not list(tmp_path.iterdir())
    refused(call("--out", tmp_path / "run", "--model", tmp_path, "--arch", "llama", *QUICK), "leave --arch out")


def test_token_ids_out_of_range(finished: Path, text: Path, tmp_path: Path) -> None:
    """A model whose embedding is smaller than its tokenizer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "start")
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(finished / "tokenizer", tmp_path / "model", dirs_exist_ok=True)
    result = call("--out", tmp_path / "run", "--text", text, "--model", tmp_path / "model", "--seq", "16", *QUICK)
    refused(result, "token id", "out of range", "0 to 39")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_weights_leave_nothing(finished: Path, text: Path, tmp_path: Path) -> None:
    """Found only while the run folder is being filled: it must vanish again."""
    model = shutil.copytree(finished / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"damaged")
    result = call("--out", tmp_path / "deep" / "run", "--text", text, "--model", model, "--seq", "16", *QUICK)
    refused(result, "cannot be loaded")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_somebody_elses_folder(text: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for options in ([], ["--force"], ["--resume"]):
        refused(call("--out", tmp_path, "--text", text, *TINY, *QUICK, *options), str(tmp_path))
    refused(call("--out", tmp_path / "thesis.tex", "--text", text, *TINY, *QUICK), "is a file")
    assert snapshot(tmp_path) == before


def test_earlier_run_is_kept(copy: Path, text: Path) -> None:
    before = snapshot(copy)
    refused(call("--out", copy, "--text", text, *TINY, *QUICK), "--resume", "--force")
    refused(call("--out", copy, "--text", text, *TINY, *QUICK, "--force", "--seq", "1025"), "1024 positions")
    assert snapshot(copy) == before and len(list(copy.parent.iterdir())) == 1


def test_force_replaces_an_earlier_run(copy: Path, text: Path) -> None:
    settings = run_folder.RunFolder(copy).read_settings()
    run = run_folder.RunFolder(copy)
    finetune.prepare(settings, run)
    assert run.is_ours() and not run.model.exists() and not run.contender("eager").exists()
    assert [path.name for path in copy.parent.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--arch", "qwen3"], ["--arch llama, not qwen3"]),
        (["--hidden", "64"], ["--hidden 32, not 64"]),
        (["--backend", "inductor"], ["--backend eager, not inductor"]),
    ],
)
def test_resume_with_other_settings(copy: Path, options: list[str], parts: list[str]) -> None:
    before = snapshot(copy)
    refused(call("--out", copy, "--resume", "--no-compare", "--steps", "8", *options), *parts)
    assert snapshot(copy) == before


def test_resume_from_a_checkpoint_that_does_not_fit(copy: Path) -> None:
    """Another architecture or size, put where the checkpoint was."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    checkpoint = copy / "runs" / "eager" / "checkpoint-6"
    config = Qwen3Config(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, head_dim=64
    )
    Qwen3ForCausalLM(config).save_pretrained(checkpoint)
    before = snapshot(copy)
    refused(call("--out", copy, "--resume", "--no-compare", "--steps", "8"), "does not fit the model", "checkpoint-6")
    (checkpoint / "model.safetensors").write_bytes(b"cut short")
    before["runs/eager/checkpoint-6/model.safetensors"] = b"cut short"
    refused(call("--out", copy, "--resume", "--no-compare", "--steps", "8"), "is damaged", "checkpoint-6")
    assert snapshot(copy) == before


def test_resume_with_spoilt_data_or_settings(copy: Path) -> None:
    ids = np.load(copy / "tokens" / "eval.npy")
    np.save(copy / "tokens" / "eval.npy", ids - 301)
    refused(call("--out", copy, "--resume", "--no-compare"), "token id", "out of range")
    (copy / "tokens" / "eval.npy").unlink()
    refused(call("--out", copy, "--resume", "--no-compare"), "incomplete", "--force")
    (copy / "run.json").write_text(json.dumps({"made_by": run_folder.MADE_BY}))
    refused(call("--out", copy, "--resume", "--no-compare"), "run.json", "--force")


# Parts


def test_the_library_is_chosen_the_same_each_time() -> None:
    first, second = corpus.read_text(None, max_bytes=300_000), corpus.read_text(None, max_bytes=300_000)
    assert first == second and sum(map(len, first)) > 200_000
    tokenizers = [corpus.train_tokenizer(documents, 400) for documents in (first, second)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    train, held_out = corpus.make_tokens(tokenizers[0], first, 64, 4)
    assert train.max() < 400 and not len(held_out) % 4
    corpus.check_ids(train, 400)
    for wrong in (train + 400, train - 400):
        with pytest.raises(run_folder.BadInput, match="out of range"):
            corpus.check_ids(wrong, 400)


def test_held_out_documents_are_not_trained_on() -> None:
    documents = [f"document {i}" for i in range(45)]
    train, held_out = corpus.split(documents)
    assert len(held_out) == 3 and not set(train) & set(held_out) and len(train) + len(held_out) == 45
    assert corpus.split(["x" * 100]) == (["x" * 95], ["x" * 5])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "mixtral", "qwen3_moe", "gpt2", "olmo2"])
def test_architectures(arch: str) -> None:
    settings = run_folder.Settings(arch, None, None, 384, 4, 4096, 256, 8, 60, 1e-3, 0, "sloth")
    config = training.make_config(settings)
    assert config.model_type == arch and config.hidden_size == 384 and config.num_hidden_layers == 4
    assert config.vocab_size == 4096 and config.max_position_embeddings == training.POSITIONS
    assert not any(value for name, value in config.to_dict().items() if name.endswith(("dropout", "_pdrop")))


def test_table_plot_and_json(tmp_path: Path) -> None:
    from rich.console import Console

    def made(shift: float) -> dict[str, Any]:
        return {
            "steps": 3,
            "loss": [3.0, 2.0, 1.0 + shift],
            "eval": [[2, 2.5], [3, 1.5]],
            "seconds": [9.0, 1.0, 1.0],
            "tokens_per_second": 100.0 * (1 + shift),
            "compile_seconds": 8.0,
            "peak_memory": 2**30,
        }

    results: comparison.Results = {"sloth": made(0.25), "eager": made(0.0), "inductor": None}
    rows = comparison.summary(results)
    assert rows["sloth"]["difference_to_eager"] == 0.25 and rows["sloth"]["speed_to_eager"] == 1.25
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison.table(results))
    shown = console.export_text()
    assert "1.25×" in shown and "1.00 GiB" in shown and "failed" in shown and "2.5e-01" in shown
    settings = run_folder.Settings("llama", None, None, 384, 4, 4096, 256, 8, 60, 1e-3, 0, "sloth")
    comparison.write(results, settings, tmp_path / "c.json")
    comparison.plot(results, tmp_path / "c.png")
    assert json.loads((tmp_path / "c.json").read_text())["summary"] == rows
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
