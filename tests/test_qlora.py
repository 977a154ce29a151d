"""QLoRA as its users run it, on a real NF4 model: their loops and trainers against eager, and the example.

One layer, and aot_eager in Inductor's place: what Inductor makes of rewritten graphs is tested elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from typer.testing import CliRunner, Result

from sloth.rewriter.backend import listening
from sloth.rewriter.compile import inductor

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # the example is a script: its modules lie beside it

import finetune  # noqa: E402
import qlora  # noqa: E402
import qlora_training  # noqa: E402
import run_folder  # noqa: E402
import training  # noqa: E402
import transformers  # noqa: E402
from bitsandbytes import optim as bnb_optim  # noqa: E402
from bitsandbytes.nn import Linear4bit  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PROJECTIONS = 7
STEPS = 3
SENTENCE = "the sloth hangs in the tree and moves one arm a day while all the leaves grow green "
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def without_inductor() -> Iterator[None]:
    """And with one thread: models this small gain nothing from a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that is not quantised yet."""
    transformers.set_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(base: Path, reentrant: bool | None = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    """What a user's script makes of `base`, with random B: while it is zero, A has no gradient."""
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantisation, device_map={"": DEVICE}, dtype=dtype, use_cache=False
    )
    how = {} if reentrant is None else {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=reentrant is not None, **how)
    transformers.set_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, lora).train()


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@dataclass
class Outcome:
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]  # of every step
    model: PeftModel
    logs: list[dict[str, float]] = field(default_factory=list)  # of a trainer: all that it reports


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


class Gradients(transformers.TrainerCallback):
    """Keeps what the optimizer of a Trainer gets."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        self.steps.append(gradients_of(model))


def rows(count: int) -> torch.Tensor:
    return torch.randint(1, 96, (count, 12), generator=torch.Generator().manual_seed(2))


def own_loop(model: PeftModel, backend: str | None, optimizer: Callable[..., Any] = torch.optim.AdamW, **how: Any) -> Outcome:
    """Three steps on the same batch."""
    ids = rows(2).to(DEVICE)
    call = torch.compile(model, backend=backend) if backend else model
    step = optimizer(trained_parameters(model).values(), lr=5e-3, **how)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = call(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradients_of(model))
        step.step()
        step.zero_grad()
    return Outcome(losses, gradients, model)


def values(backend: str | None, reentrant: bool | None, folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of both trainers."""
    return dict(
        output_dir=str(folder),
        torch_compile=backend is not None,
        torch_compile_backend=backend,
        use_cpu=not CUDA,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **more,
    )


def curve(trainer: transformers.Trainer, seen: Gradients) -> Outcome:
    torch.backends.cuda.matmul.allow_tf32 = False  # accelerate turns it on for compiled models alone
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome([entry["loss"] for entry in logs], seen.steps, trainer.model, logs)


def with_trainer(model: PeftModel, backend: str | None, reentrant: bool | None, folder: Path, **more: Any) -> Outcome:
    seen = Gradients()
    data = [{"input_ids": row, "labels": row} for row in rows(12)]
    arguments = transformers.TrainingArguments(**values(backend, reentrant, folder, **more))
    return curve(transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[seen]), seen)


def with_trl(model: PeftModel, backend: str | None, reentrant: bool | None, folder: Path, tokenizer: Any, **more: Any) -> Outcome:
    from trl import SFTConfig, SFTTrainer

    seen = Gradients()
    data = Dataset.from_dict({"input_ids": rows(12).tolist()})
    arguments = SFTConfig(**values(backend, reentrant, folder, **more))
    return curve(SFTTrainer(model=model, args=arguments, train_dataset=data, callbacks=[seen], processing_class=tokenizer), seen)


def check(
    base: Path, reentrant: bool | None, run: Callable[[PeftModel, str | None], Outcome], tolerance: float = 2e-5, **how: Any
):
    """Train with eager and with sloth: the same curve and gradients, all projections matched, the base as it was."""
    torch._dynamo.reset()
    counters.clear()
    eager = run(adapted(base, reentrant, **how), None)
    with listening() as reports:
        ours = run(adapted(base, reentrant, **how), "sloth")
    sites = [site for report in reports for site in report.sites]
    missed = [site for site in sites if site.status != "matched" and site.construct != "attention"]  # TRL passes a mask: data
    assert not missed and not any(report.untouched for report in reports)
    # All in one with their 4-bit weight, and none beside it.
    assert Counter(site.variant for site in sites if site.construct in ("lora", "linear_4bit")) == {"lora[linear]": PROJECTIONS}
    assert len(ours.losses) == STEPS and ours.losses == pytest.approx(eager.losses, rel=tolerance)
    names = trained_parameters(ours.model).keys()
    assert len(names) == 2 * PROJECTIONS and all("lora_" in name for name in names)
    for got, expected in zip(ours.gradients, eager.gradients, strict=True):
        assert got.keys() == expected.keys() == names
        for name in names:
            assert expected[name].any(), name
            assert (got[name] - expected[name]).abs().max() <= 20 * tolerance * expected[name].abs().max(), name
    fresh = frozen_parameters(adapted(base, reentrant, **how))
    after = frozen_parameters(ours.model)
    assert after.keys() == fresh.keys() and all(torch.equal(after[name], fresh[name]) for name in fresh)
    return ours, reports


# As its users run it


@pytest.mark.parametrize(
    "reentrant", [pytest.param(None, marks=pytest.mark.nightly), False, True], ids=["plain", "checkpointed", "reentrant"]
)
def test_own_loop(base: Path, reentrant: bool | None) -> None:
    """One graph, though transformers' hook on the embedding calls requires_grad_."""
    ours, reports = check(base, reentrant, own_loop)
    assert ours.losses[-1] < ours.losses[0]
    assert len(reports) == 1 and not counters["graph_break"]


def test_in_bf16(base: Path) -> None:
    """As on a GPU: bf16 products, fp32 norms and adapters."""
    check(base, None, own_loop, tolerance=2e-2, dtype=torch.bfloat16)


def test_optimizers(base: Path) -> None:
    """One compiled model for all. Paged states lie in plain memory on a CPU."""
    torch._dynamo.reset()
    plain, model = adapted(base), adapted(base)
    start = {name: p.detach().clone() for name, p in trained_parameters(plain).items()}
    compiled = torch.compile(model, backend="sloth")
    ids = rows(2).to(DEVICE)
    for optimizer, how in (
        (torch.optim.AdamW, {"fused": True}),
        (bnb_optim.AdamW8bit, {"min_8bit_size": 16}),
        (bnb_optim.PagedAdamW8bit, {"min_8bit_size": 16}),
        (bnb_optim.PagedAdamW32bit, {}),
    ):
        losses: dict[bool, list[float]] = {True: [], False: []}
        for call, trained in ((plain, plain), (compiled, model)):
            for name, p in trained_parameters(trained).items():
                p.data.copy_(start[name])
            step = optimizer(trained_parameters(trained).values(), lr=5e-3, **how)
            for _ in range(STEPS):
                loss = call(input_ids=ids, labels=ids).loss
                loss.backward()
                step.step()
                step.zero_grad()
                losses[call is plain].append(loss.item())
        assert losses[False] == pytest.approx(losses[True], rel=1e-4), optimizer
        assert losses[False][-1] < losses[False][0]


@pytest.mark.parametrize(
    ("reentrant", "more"),
    [
        (None, {"gradient_accumulation_steps": 2, "optim": "adamw_torch_fused"}),
        pytest.param(True, {"optim": "paged_adamw_8bit"}, marks=pytest.mark.nightly),
    ],
    ids=["accumulated", "reentrant"],
)
def test_trainer(base: Path, tmp_path: Path, reentrant: bool | None, more: dict[str, Any]) -> None:
    check(base, reentrant, lambda model, backend: with_trainer(model, backend, reentrant, tmp_path, **more))


@pytest.mark.nightly
def test_trainer_by_regions(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate compiles repeated layers once, by themselves, and head and norm beside them."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    _, reports = check(base, True, lambda model, backend: with_trainer(model, backend, True, tmp_path))
    assert len([report for report in reports if report.sites]) == 2


@pytest.mark.nightly
def test_trl(base: Path, finished: Path, tmp_path: Path) -> None:
    """TRL casts adapters to bf16, and its head and loss are its own. The example checkpoints and accumulates beside."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "tokenizer")
    outcomes = []

    def run(model: PeftModel, backend: str | None) -> Outcome:
        outcomes.append(with_trl(model, backend, None, tmp_path, tokenizer))
        return outcomes[-1]

    ours, _ = check(base, None, run, tolerance=5e-3)
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):  # TRL looks at the logits for these
        theirs, own = ([entry[name] for entry in outcome.logs] for outcome in outcomes)
        assert own == pytest.approx(theirs, rel=2e-2, abs=0.05), name
    assert {p.dtype for p in trained_parameters(ours.model).values()} == {torch.bfloat16}


# The example


def call(*options: str | Path) -> Result:
    return CliRunner().invoke(qlora.app, [str(option) for option in options])


def in_process(run: run_folder.RunFolder, backend: str, *, resume: bool = False, script: str = training.__file__) -> bool:
    """Train in this process: the start of another one is most of the time of a tiny run."""
    torch._dynamo.reset()
    if script == training.__file__:
        training.train(run, backend, resume=resume)
    else:
        qlora_training.train(run, backend)
    return True


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sloth.txt"
    file.write_text(SENTENCE * 100)
    return file


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole run at smoke sizes."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "run_contender", in_process)
        result = call("--smoke", "--text", text, "--out", out, "--checkpointing", "on", "--accumulate", "2", "--lr", "0.01")
    assert result.exit_code == 0, (result.output, result.exception)
    (out.parent / "printed.txt").write_text(result.output)
    return out


def result_of(out: Path, backend: str) -> dict[str, Any]:
    return json.loads((out / "runs" / backend / "result.json").read_text())


@pytest.mark.nightly
def test_example_prints_what_it_did(finished: Path) -> None:
    printed = " ".join((finished.parent / "printed.txt").read_text().split())
    for part in (f"{PROJECTIONS}/{PROJECTIONS} LoRA projection", "in 3 graph(s)", "same logits", "merged into NF4", "to eager"):
        assert part in printed, printed


@pytest.mark.nightly
def test_example_follows_eager_and_leaves_nothing_half_done(finished: Path) -> None:
    ours, eager = result_of(finished, "sloth"), result_of(finished, "eager")
    assert ours["steps"] == eager["steps"] == len(ours["loss"]) == qlora.SMOKE["steps"]
    assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-3)
    merged = ours["merge"]
    assert 0 < merged["weights"] <= qlora_training.WIDEST_STEP / 2 + 0.02
    assert merged["logits"] < 0.5 and ours["text"].startswith(qlora_training.PROMPT)
    names = {path.name for path in finished.iterdir()}
    assert names == {"run.json", "tokenizer", "tokens", "start", "runs", "adapter", "comparison.json"}
    assert {path.name for path in finished.parent.iterdir()} == {"run", "printed.txt"}


@pytest.mark.nightly
def test_the_adapter_is_an_ordinary_one(finished: Path) -> None:
    from safetensors.torch import load_file

    files = {path.name for path in (finished / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    weights = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * PROJECTIONS
    assert all(name.startswith("base_model.model.model.layers.0.") and name.endswith(".weight") for name in weights)
    assert all(weight.any() for weight in weights.values())
    model = PeftModel.from_pretrained(qlora_training.load_quantised(finished / "start"), finished / "adapter")
    ids = torch.randint(1, 300, (1, 8), generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    adapted = training.logits_of(model, {"input_ids": ids})
    with model.disable_adapter():
        assert not torch.allclose(adapted, training.logits_of(model, {"input_ids": ids}), atol=1e-3)
    merged = model.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM) and not any("lora" in name for name, _ in merged.named_modules())
    assert sum(isinstance(layer, Linear4bit) for layer in merged.modules()) == PROJECTIONS


@pytest.mark.skipif(CUDA, reason="bitsandbytes gets rows of any length right on a GPU")
def test_rows_that_bitsandbytes_gets_wrong_on_a_cpu(tmp_path: Path) -> None:
    """If this fails, bitsandbytes was mended: `check_rows` can go."""
    import bitsandbytes.functional as bnb

    for width, right in ((160, False), (192, True)):
        weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
        off = (bnb.dequantize_4bit(packed, state) - weight).reshape(-1, 64).abs().amax(1)
        assert (off <= 0.16 * weight.reshape(-1, 64).abs().amax(1)).all() == right
    refused(call("--smoke", "--hidden", "64", "--out", tmp_path / "run"), "rows of 160", "multiples of 64", "--hidden")
    assert not list(tmp_path.iterdir())


def refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds all `parts`."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--base", "nowhere"], "nowhere cannot be loaded"),
        (["--base", "nowhere", "--hidden", "384"], "leave --hidden out"),
        (["--base", "nowhere", "--base-steps", "3"], "leave --base-steps out"),
        (["--optim", "adamw_4bit"], "--optim adamw_4bit is unknown"),
        (["--backend", "slot"], "--backend slot is unknown"),
        (["--text", "nowhere"], "--text nowhere does not exist"),
        (["--seq", "1025"], "1024 positions"),
    ],
)
def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], part: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(call("--smoke", "--out", "run", *options), part)
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_a_run_that_is_there_or_somebody_elses(finished: Path, tmp_path: Path) -> None:
    refused(call("--smoke", "--out", finished), "--force")
    (tmp_path / "run.json").write_text(json.dumps({"made_by": run_folder.MADE_BY}))
    refused(call("--smoke", "--out", tmp_path, "--force"), "was not made by this example")


def test_a_base_that_fails_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "run_contender", lambda *_, **__: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert call("--smoke", "--text", text, "--out", tmp_path / "run").exit_code == 1
    assert not list(tmp_path.iterdir())
