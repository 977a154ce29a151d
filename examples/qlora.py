"""QLoRA with `torch.compile(backend="sloth")`: adapters on a model in NF4, trained by TRL's SFTTrainer, and compared with eager.

    python examples/qlora.py                         # first trains the demo's small Llama as a base, then adapters on it
    python examples/qlora.py --base runs/demo/model --out runs/mine        # on a model that is there
    python examples/qlora.py --checkpointing on --optim paged_adamw_8bit --r 64 --force

Nothing is downloaded. On the CPU it computes in fp32, on a GPU in bf16.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import finetune
import qlora_training
import run_folder
import torch
import training
import typer
from comparison import Results, table, write
from finetune import EAGER, FIXED_BY_MODEL, check_backend, prepare
from qlora_training import Checkpointing, RunFolder, Settings
from rich import print
from rich.markup import escape
from run_folder import BadInput, check_out
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.training_args import OptimizerNames

BLOCK = 64  # weights that share a scale
SMOKE = {"hidden": 192, "layers": 1, "vocab": 300, "seq": 16, "batch": 2, "base_steps": 2, "steps": 3, "r": 4}


def check_optimizer(name: str) -> None:
    """Refuse an optimizer that transformers does not know."""
    known = [optimizer.value for optimizer in OptimizerNames]
    if name not in known:
        adam = ", ".join(optimizer for optimizer in known if "adamw" in optimizer)
        raise BadInput(f"--optim {name} is unknown: give a name of transformers, such as {adam}")


def check_rows(settings: Settings) -> None:
    """Refuse rows that bitsandbytes gets wrong on a CPU: it takes each row for whole blocks, and there it reads other scales."""
    if torch.cuda.is_available():
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(training.make_config(settings))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings() and layer.in_features % BLOCK:
            raise BadInput(
                f"{name} has rows of {layer.in_features}, and bitsandbytes on a CPU needs multiples of {BLOCK} for NF4: "
                f"give another {'--base' if settings.model else '--hidden, such as 384'}"
            )


def train_base(settings: Settings, folder: Path) -> Path:
    """A model worth adapting, trained in full with eager code as finetune.py does it."""
    values = {field.name: getattr(settings, field.name) for field in fields(run_folder.Settings)}
    run = run_folder.RunFolder(folder)
    base = run_folder.Settings(**values | {"steps": settings.base_steps, "lr": 1e-3, "backend": EAGER})
    prepare(base, run)
    run_contender(run, EAGER, script=training.__file__)
    return run.model


def prepare_qlora(settings: Settings, run: RunFolder) -> None:
    """The run folder with the base model in OUT/start. A base made here lies in a temporary folder before."""
    with tempfile.TemporaryDirectory(prefix="qlora-base-") as folder:
        model = settings.model or str(train_base(settings, Path(folder) / "run"))
        prepare(replace(settings, model=model), run)
    AutoTokenizer.from_pretrained(run.tokenizer).save_pretrained(run.start)
    run.write_settings(settings)


def run_contender(run: run_folder.RunFolder, backend: str, script: str = qlora_training.__file__) -> None:
    """Train in a process of its own, or end this one."""
    if not finetune.run_contender(run, backend, script=script):
        typer.echo(f"error: training with {backend} failed, see above", err=True)
        raise typer.Exit(1)


def qlora(settings: Settings, run: RunFolder, *, compare: bool) -> None:
    """The whole job, after the checks of the command line."""
    prepare_qlora(settings, run)
    run_contender(run, settings.backend)
    result = training.read_result(run, settings.backend)
    if "rewrites" in result:
        print(f"sloth: {result['rewrites']}")
    print(f"adapter: {run.adapter} (loaded again without a compiler: same logits)")
    print(f"loss {result['loss'][0]:.3f} → {result['loss'][-1]:.3f}, held out {result['eval'][-1][1]:.3f}")
    moved = result["merge"]
    print(
        f"merged into NF4: weights moved by up to {moved['weights']:.2f} of the largest in their block (half the widest step of "
        f"NF4 is {qlora_training.WIDEST_STEP / 2:.2f}), logits by {moved['logits']:.1%} of the largest; quantising the base "
        f"moved its logits by {moved['base']:.1%}"
    )
    print(
        f"loss of {settings.batch} held-out sequences: {moved['loss_base']:.3f} without the adapter, {moved['loss_adapter']:.3f} "
        f"with it, {moved['loss_merged']:.3f} merged"
    )
    print(f"the merged model writes: {escape(repr(result['text']))}")
    if compare and settings.backend != EAGER:
        run_contender(run, EAGER)
        results: Results = {settings.backend: result, EAGER: training.read_result(run, EAGER)}
        write(results, settings, run.comparison)
        print(table(results))
        print(f"numbers: {run.comparison}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/qlora"),
    model: Annotated[str | None, typer.Option("--base", "--model", help="Adapt this saved model, and train no base.")] = None,
    base_steps: Annotated[int, typer.Option(min=1, help="Training steps of the base.")] = 60,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the adapters.")] = 20,
    arch: Annotated[str, typer.Option(help="Model type of the base: llama, qwen3, gemma2, …")] = "llama",
    text: Annotated[str | None, typer.Option(help="Train on this file or folder instead.")] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a forward pass.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Forward passes a step.")] = 1,
    hidden: Annotated[int, typer.Option(min=8, help="Width of the base.")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the base.")] = 4,
    vocab: Annotated[int, typer.Option(min=257, help="Size of the vocabulary.")] = 8192,
    r: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    alpha: Annotated[int | None, typer.Option(min=1, help="Their scale is alpha / r.  [default: 2 r]")] = None,
    optim: Annotated[
        str, typer.Option(help="Its name: adamw_torch_fused, adamw_8bit, paged_adamw_8bit, …")
    ] = "adamw_torch_fused",
    checkpointing: Annotated[Checkpointing, typer.Option(help="Gradient checkpointing.")] = "off",
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of the adapters.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile, or eager.")] = "sloth",
    compare: Annotated[bool, typer.Option(help="Run eager too, and compare.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in --out.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes, to see that it runs.")] = False,
) -> None:
    """Train LoRA adapters on a model in NF4 with torch.compile(backend="sloth"), and compare with eager."""
    began = time.perf_counter()
    values = {name: value for name, value in context.params.items() if name in {field.name for field in fields(Settings)}}
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    if smoke:
        values |= {name: value for name, value in SMOKE.items() if name not in given}
    settings = Settings(**values | {"alpha": alpha or 2 * values["r"]})
    run = RunFolder(out)
    try:
        if model and given & (fixed := FIXED_BY_MODEL | {"base_steps"}):
            raise BadInput(f"--base brings its own model: leave --{min(given & fixed).replace('_', '-')} out")
        check_optimizer(optim)
        check_out(run, force=force, resume=False)
        check_rows(settings)
        check_backend(backend, compare=False)
        qlora(settings, run, compare=compare)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo("interrupted: start again with --force", err=True)
        raise typer.Exit(130) from None
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    app()
