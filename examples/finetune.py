"""Fine-tune a causal language model with `torch.compile(backend="sloth")`, and compare with eager and Inductor.

    python examples/finetune.py                      # a small Llama on the source of Python's standard library
    python examples/finetune.py --arch qwen3 --steps 200 --out runs/qwen3
    python examples/finetune.py --model FOLDER --text FOLDER --out runs/mine
    python examples/finetune.py --resume             # go on after an interruption, or add steps

Nothing is downloaded. On the CPU it computes in fp32, on a GPU in bf16.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Annotated

import corpus
import numpy as np
import torch
import training
import typer
from comparison import Results, plot, table, write
from rich import print
from run_folder import BadInput, RunFolder, Settings, check_fits, check_out, last_checkpoint, merge_settings, replaced
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

EAGER, INDUCTOR = "eager", "inductor"
FIXED_BY_MODEL = {"arch", "hidden", "layers", "vocab"}


def check_backend(backend: str, *, compare: bool) -> None:
    """Refuse a backend that torch does not know, or one that could not compile here."""
    known = {EAGER, *torch.compiler.list_backends(exclude_tags=())}
    if backend not in known:
        raise BadInput(f"--backend {backend} is unknown: give one of {', '.join(sorted(known))}")
    if torch.cuda.is_available() or not (compare or backend in {"sloth", INDUCTOR}):
        return
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if not any(name and shutil.which(name) for name in compilers):
        raise BadInput("compiling for the CPU needs a C++ compiler: install g++, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise BadInput("compiling for the CPU needs Python's C headers: install python3-dev")


def prepare(settings: Settings, run: RunFolder) -> None:
    """Check the input, then make the run folder in one go: text, tokenizer, blocks of ids, and the model to start from.

    Everything that can be refused is refused before the first byte is written.
    """
    config = training.make_config(settings)
    training.check_sequence(config, settings.seq)
    documents = corpus.read_text(settings.text)
    if settings.model:
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.model)
        except Exception as error:  # each tokenizer class fails in its own way
            raise BadInput(f"--model {settings.model} has no tokenizer that loads: save one beside it") from error
    else:
        tokenizer = corpus.train_tokenizer(corpus.split(documents)[0], settings.vocab)
    train, held_out = corpus.make_tokens(tokenizer, documents, settings.seq, settings.batch)
    for ids in (train, held_out):
        corpus.check_ids(ids, config.get_text_config().vocab_size)
    size = sum(map(len, documents)) / 1e6
    print(f"text: {len(documents)} files, {size:.1f} million characters, {train.size:,} tokens to train on")
    with replaced(run.root) as staging:
        made = type(run)(staging)
        tokenizer.save_pretrained(made.tokenizer)
        made.tokens.mkdir()
        np.save(made.tokens / "train.npy", train)
        np.save(made.tokens / "eval.npy", held_out)
        training.save_start(settings, config, made.start)
        made.write_settings(settings)
    show_model(config, run)


def show_model(config: PreTrainedConfig, run: RunFolder) -> None:
    """Say what is trained, and where it lies."""
    size = sum(file.stat().st_size for file in run.start.glob("*.safetensors")) / 4e6
    print(f"model: {config.model_type}, {size:.1f} million parameters, in {run.root}")


def check_resume(run: RunFolder, settings: Settings) -> None:
    """Refuse to go on with data or a checkpoint that do not belong to the model. Writes nothing."""
    try:
        config = AutoConfig.from_pretrained(run.start)
        blocks = [np.load(run.tokens / name) for name in ("train.npy", "eval.npy")]
    except (OSError, ValueError) as error:
        raise BadInput(f"--resume: {run.root} is incomplete ({error}): start again with --force") from error
    for ids in blocks:
        corpus.check_ids(ids, config.get_text_config().vocab_size)
    done = training.read_result(run, settings.backend)
    if done and done["steps"] > settings.steps:
        raise BadInput(f"--steps {settings.steps}: the run in {run.root} has {done['steps']} already, give more")
    checkpoint = last_checkpoint(run.contender(settings.backend), settings.steps)
    if checkpoint is None:
        print("there is no checkpoint: starting at the first step")
        return
    check_fits(checkpoint, run.start)
    print(f"going on from {checkpoint}")


def run_contender(run: RunFolder, backend: str, *, resume: bool = False, script: str = training.__file__) -> bool:
    """Train with one backend in a process of its own, with empty compiler caches. Did it end well?"""
    with tempfile.TemporaryDirectory(prefix="finetune-cache-") as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        worker = [sys.executable, script, str(run.root), backend]
        command = [*worker, "--resume"] if resume else worker
        return subprocess.run(command, env={**os.environ, **caches}, check=False).returncode == 0


def show_rewrites(run: RunFolder, settings: Settings) -> None:
    """Print what sloth rewrites in this model."""
    import sloth

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = training.load_model(run.start).to(device).train()
    batch = training.Blocks(run.tokens / "train.npy").batch(settings.batch, device)
    print(sloth.explain(model, batch))


def compare_with_peers(run: RunFolder, settings: Settings, *, resume: bool) -> Results:
    """The same run with eager and with plain Inductor; a resumed comparison keeps the runs that are finished."""
    results: Results = {settings.backend: training.read_result(run, settings.backend)}
    for peer in (EAGER, INDUCTOR):
        if peer == settings.backend:
            continue
        result = training.read_result(run, peer) if resume else None
        if result is None or result["steps"] != settings.steps:
            result = training.read_result(run, peer) if run_contender(run, peer) else None
        results[peer] = result
    return results


def finetune(settings: Settings, run: RunFolder, *, compare: bool, resume: bool) -> None:
    """The whole job, after the checks of the run folder."""
    if resume:
        check_resume(run, settings)
        run.write_settings(settings)
    else:
        prepare(settings, run)
    if not run_contender(run, settings.backend, resume=resume):
        typer.echo(f"error: training with {settings.backend} failed, see above", err=True)
        raise typer.Exit(1)
    if settings.backend == "sloth":
        show_rewrites(run, settings)
    result = training.read_result(run, settings.backend)
    print(f"trained model: {run.model} (loaded again without a compiler: same logits)")
    print(f"loss {result['loss'][0]:.3f} → {result['loss'][-1]:.3f}, held out {result['eval'][-1][1]:.3f}")
    if compare:
        results = compare_with_peers(run, settings, resume=resume)
        write(results, settings, run.comparison)
        plot(results, run.plot)
        print(table(results))
        print(f"numbers: {run.comparison}, plot: {run.plot}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/finetune"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    arch: Annotated[str, typer.Option(help="Model type: llama, qwen3, gemma2, phi3, gpt_neox, mixtral, …")] = "llama",
    model: Annotated[str | None, typer.Option(help="Start from this saved model instead.")] = None,
    text: Annotated[str | None, typer.Option(help="Train on this file or folder instead.")] = None,
    seq: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 4,
    hidden: Annotated[int, typer.Option(min=8, help="Width of the model.")] = 384,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 4,
    vocab: Annotated[int, typer.Option(min=257, help="Size of the vocabulary.")] = 8192,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data order.")] = 0,
    backend: Annotated[str, typer.Option(help="Backend of torch.compile, or eager.")] = "sloth",
    compare: Annotated[bool, typer.Option(help="Run eager and inductor too, and compare.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in --out.")] = False,
) -> None:
    """Fine-tune a small language model with torch.compile(backend="sloth"), and compare with eager and Inductor."""
    began = time.perf_counter()
    settings = Settings(arch, model, text, hidden, layers, vocab, seq, batch, steps, lr, seed, backend)
    given = {name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"}
    run = RunFolder(out)
    try:
        if model and given & FIXED_BY_MODEL:
            raise BadInput(f"--model brings its own architecture: leave --{min(given & FIXED_BY_MODEL)} out")
        check_out(run, force=force, resume=resume)
        if resume:
            settings = merge_settings(run.read_settings(), settings, given, out)
        check_backend(settings.backend, compare=compare)
        finetune(settings, run, compare=compare, resume=resume)
    except BadInput as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"interrupted: go on with --out {out} --resume", err=True)
        raise typer.Exit(130) from None
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    app()
