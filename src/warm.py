"""`python -m sloth warm`: fill the compiler's caches with a recipe before it runs, here or, through a file, on another machine.

What costs the first step of a run its time is kept on disk: AOTAutograd's and Inductor's results (torch's own cache) and the
binaries of Triton's kernels. Warming runs one step of transformers' Trainer on random tokens, with the settings that change what
is compiled and a learning rate of 0, and throws the model away. A run of the same recipe then finds all of it; Dynamo's trace and
sloth's rewriting are not cached, and are what is left of its first step.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from sloth.tiny_model import full

LENGTHS = (200, 312)  # of the rows in two batches: the second is compiled for again only if sizes were taken for constants

VERSIONS, ARTIFACTS, TRITON = "versions.json", "torch.bin", "triton/"  # in a file


@dataclass(frozen=True)
class Recipe:
    """What of a run changes the code that is compiled for it.

    model: a checkpoint folder, or a config.json (random weights of the real sizes). lora: the rank of adapters on all linear
    layers, 0 for training in full. four_bit: NF4 under the adapters, prepared as PEFT's prepare_model_for_kbit_training does.
    dtype: of the weights, None as the checkpoint's. precision: of Trainer, "bf16", "fp16" or "no".
    packed: rows laid end to end with position_ids (DataCollatorWithFlattening) instead of padded ones. rows: in a batch.
    """

    model: str
    lora: int = 0
    lora_alpha: int = 0
    four_bit: bool = False
    double_quant: bool = True
    dtype: torch.dtype | None = None
    precision: str = "bf16"
    checkpointing: bool = True
    packed: bool = False
    rows: int = 4


class WarmError(ValueError):
    """The recipe or the file cannot be used; the message says what to do."""


# ---------------------------------------------------------------- the run


def warm(recipe: Recipe) -> list[Any]:
    """One step of the recipe, forward and backward, for two lengths. Returns sloth's reports of the graphs.

    Raises WarmError or ModelError for a recipe that cannot be run, and whatever the training raises.
    """
    from transformers import Trainer, TrainingArguments

    from sloth.rewriter.backend import listening

    if recipe.four_bit and not recipe.lora:
        raise WarmError("a model in 4 bits is trained through adapters: give --lora RANK too")
    model = _adapted(recipe)
    with tempfile.TemporaryDirectory(prefix="sloth-warm-") as folder, listening() as reports:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=recipe.rows, max_steps=2, learning_rate=0.0, optim="sgd", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, torch_compile_backend="sloth",
            bf16=recipe.precision == "bf16", fp16=recipe.precision == "fp16", gradient_checkpointing=recipe.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.checkpointing else None,
            use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # as one process of a launcher has it, not as nn.DataParallel
        Trainer(model, arguments, train_dataset=_Rows(model, recipe), data_collator=_collator(recipe)).train()
    return reports


class _Rows(IterableDataset):
    """Random tokens; each batch as long as its first row, the longest."""

    def __init__(self, model: nn.Module, recipe: Recipe):
        self.vocabulary, self.recipe = model.get_input_embeddings().weight.shape[0], recipe

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        draw = torch.Generator().manual_seed(0)
        for longest in LENGTHS:
            for row in range(self.recipe.rows):
                length = max(longest - 7 * row, 2)
                ids = torch.randint(self.vocabulary, (length,), generator=draw).tolist()
                yield {"input_ids": ids, "labels": ids} | ({} if self.recipe.packed else {"attention_mask": [1] * length})


def _collator(recipe: Recipe) -> Any:
    if recipe.packed:
        from transformers import DataCollatorWithFlattening

        return DataCollatorWithFlattening()

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(r["input_ids"]) for r in rows)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {k: torch.tensor([r[k] + [v] * (longest - len(r[k])) for r in rows]) for k, v in fill.items()}

    return padded


def _adapted(recipe: Recipe) -> nn.Module:
    quantization = None
    if recipe.four_bit:
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=torch.float16 if recipe.precision == "fp16" else torch.bfloat16,
        )  # fmt: skip
    model = full(recipe.model, quantization, recipe.dtype)
    if recipe.four_bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if recipe.lora:
        from peft import LoraConfig, get_peft_model

        alpha = recipe.lora_alpha or recipe.lora
        config = LoraConfig(r=recipe.lora, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model.train()


# ---------------------------------------------------------------- the file


def versions() -> dict[str, str]:
    """What must be equal where the file is made and where it is used: caches are keyed by it."""
    from sloth.rewriter.compile import inductor

    try:
        import triton
    except ImportError:
        triton = None
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": getattr(triton, "__version__", "none"),
        "device": card,
        "sloth": inductor.sources_digest(),
    }


def save(file: Path) -> int:
    """Write what this process compiled to a file. Returns its size in bytes. Raises WarmError if there is nothing."""
    found = torch.compiler.save_cache_artifacts()
    if found is None:
        raise WarmError("nothing was compiled, so there is nothing to save")
    partial = file.with_name(file.name + ".partial")
    _make_private(partial)
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(VERSIONS, json.dumps(versions(), indent=1))
        out.writestr(ARTIFACTS, found[0])
        for name, content in _binaries(_target()):
            out.writestr(TRITON + name, content)
    partial.replace(file)
    return file.stat().st_size


def load(file: Path) -> int:
    """Put what a file holds into this machine's caches. Returns how many entries. Raises WarmError if it does not fit.

    What is in it is code that later compilations run: load what you made, or trust as you trust a program.
    """
    if file.exists() and file.stat().st_mode & 0o002:
        raise WarmError(f"{file} holds code, and anybody may write to it: `chmod o-w {file}`, if you are sure of what is in it")
    try:
        with zipfile.ZipFile(file) as held:
            made_with = json.loads(held.read(VERSIONS))
            artifacts = held.read(ARTIFACTS)
            binaries = {n.removeprefix(TRITON): held.read(n) for n in held.namelist() if n.startswith(TRITON)}
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as e:
        raise WarmError(f"{file} is no file of `sloth warm --save`: {type(e).__name__}: {e}") from e
    here = versions()
    if not isinstance(made_with, dict):
        raise WarmError(f"{file} is no file of `sloth warm --save`: its versions are a {type(made_with).__name__}")
    if other := [f"{k} {made_with.get(k)} (here {v})" for k, v in here.items() if made_with.get(k) != v]:
        raise WarmError(f"{file} was made with {', '.join(other)}, and would never be used here: make one on this machine")
    info = torch.compiler.load_cache_artifacts(artifacts)
    if info is None:
        raise WarmError(f"{file} is damaged: torch cannot read what it holds")
    for folder in _triton_folders():
        _unpack(binaries, folder)
    return sum(len(names) for names in info.artifacts.values()) + len(binaries)


def _unpack(binaries: dict[str, bytes], folder: Path) -> None:
    """KEY/NAME → files of Triton's cache, its groups last; they name their files by whole paths, which are others here."""
    for name in sorted(binaries, key=lambda name: "__grp__" in name):
        key, slash, leaf = name.partition("/")
        if not slash or {key, leaf} & {"", ".", ".."} or set("/\\:") & set(leaf) or set("\\:") & set(key):
            raise WarmError(f"{name!r} is no name of a file in Triton's cache")
        path, content = folder / key / leaf, binaries[name]
        if path.exists():
            continue
        if leaf.startswith("__grp__"):
            group = json.loads(content)
            group["child_paths"] = {child: str(folder / key / child) for child in group.get("child_paths", {})}
            content = json.dumps(group).encode()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = path.with_name(f"{leaf}.{os.getpid()}.partial")
        _make_private(partial)
        partial.write_bytes(content)
        partial.replace(path)


def _make_private(file: Path) -> None:
    """An empty file that its user alone can read and write: what will be in it is code."""
    file.unlink(missing_ok=True)
    os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _triton_folders() -> list[Path]:
    """Triton's own cache, and the one that Inductor gives it."""
    from sloth.compat.inductor import triton_cache_dir

    try:
        from triton import knobs
    except ImportError:
        return []
    return list({Path(knobs.cache.dir), Path(triton_cache_dir(0))})


def _target() -> Any:
    """What Triton compiles for; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from triton.runtime import driver

    return driver.active.get_current_target()


def _binaries(target: Any) -> Iterator[tuple[str, bytes]]:
    """Files of sloth's own kernels in Triton's caches; torch's artifacts hold those of Inductor's."""
    if target is None:
        return
    names = set(_kernels())
    for cache in _triton_folders():
        for group in cache.glob("*/__grp__*.json"):
            name = group.name.removeprefix("__grp__")
            about = _about(group.parent / name) if name.removesuffix(".json") in names else {}
            if (about.get("backend"), about.get("arch")) == (target.backend, target.arch):
                for file in group.parent.iterdir():
                    yield f"{group.parent.name}/{file.name}", file.read_bytes()


def _about(description: Path) -> dict[str, Any]:
    """The target of a binary; nothing where its description is gone or no description."""
    try:
        return json.loads(description.read_text())["target"]
    except (OSError, ValueError, KeyError):
        return {}


def _kernels() -> Iterator[str]:
    import importlib
    import pkgutil

    import sloth.kernels

    for module in pkgutil.walk_packages(sloth.kernels.__path__, "sloth.kernels."):
        for name, held in vars(importlib.import_module(module.name)).items():
            if hasattr(held, "fn") and hasattr(held, "arg_names"):
                yield name
