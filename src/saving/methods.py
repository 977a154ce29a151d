"""What models are given as methods: saved whole or as adapters, pushed to the hub, written as GGUF."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from sloth.rewriter.notices import did_you_mean
from sloth.saving import gguf
from sloth.saving.folder import ADAPTERS, WHOLE, check_space, replaced
from sloth.saving.merged import base_of, dtype_for, planned, write
from sloth.saving.weights import refuse_shards

METHODS = ("merged_16bit", "merged_4bit", "lora")
ALIASES = {"merged_4bit_forced": "merged_4bit", "adapters": "lora"}
GB = 5_000_000_000
WITHOUT_EFFECT = ("is_main_process", "maximum_memory_usage", "safe_serialization", "temporary_location")  # of scripts for Unsloth


def save_pretrained_merged(
    model: Any, save_directory: str | os.PathLike, tokenizer: Any = None, save_method: str = "merged_16bit", *,
    max_shard_size: int | str = GB, dtype: torch.dtype | None = None, **more: Any,
) -> None:  # fmt: skip
    """Save a folder that plain transformers (or PEFT: "lora") loads, with the tokenizer if it is given.

    "merged_16bit": dequantised base plus adapters, computed in fp32 and rounded once, to the model's 16 bits (dtype: to another);
    "merged_4bit": that in NF4; "lora": the adapters alone. The folder is replaced whole or not at all; files in it that are not
    a model's stay. The model in memory stays as it is. Of the processes of a run the first one saves.

    Raises TypeError for an unknown argument, ValueError for an unknown method and for a model that cannot be merged, OSError
    (ENOSPC) before anything is written where the disk has no room.
    """
    method = _method(save_method)
    if more.pop("push_to_hub", False):
        raise ValueError("push_to_hub=True: push_to_hub_merged(repo_id, tokenizer, save_method) saves and uploads")
    if strange := sorted(more.keys() - set(WITHOUT_EFFECT)):
        hint = did_you_mean(strange[0], ("max_shard_size", "save_directory", "save_method", "tokenizer", "dtype"))
        raise TypeError(f"save_pretrained_merged knows no argument {strange[0]}.{hint}")
    if method == "lora" and not hasattr(model, "peft_config"):
        raise ValueError("save_method='lora' saves adapters, and this model has none: give 'merged_16bit'")
    if method == "lora" and not hasattr(model, "get_base_model"):
        raise ValueError(
            "save_method='lora': a trainer put the adapters around this model: FastLanguageModel.save_pretrained_merged("
            "trainer.model, …, save_method='lora') saves them"
        )
    target = Path(save_directory)
    if method == "lora" and any(p for pattern in WHOLE for p in target.glob(pattern)):
        raise ValueError(f"{target} holds a whole model, perhaps the one that these adapters are for: save them elsewhere")
    refuse_shards(model)
    if not _is_first():
        return
    if method == "lora":
        size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        with replaced(target, size, ADAPTERS) as folder:
            model.save_pretrained(folder)
            _save_tokenizer(tokenizer, folder)
        return
    kind = dtype_for(model, dtype)
    found, tied = planned(model, kind)
    size = sum(w.size for w in found.values())
    with replaced(target, size if method == "merged_16bit" else size + size // 2) as folder:
        whole = folder if method == "merged_16bit" else folder / "whole"
        whole.mkdir(exist_ok=True)
        write(model, whole, found, tied, kind, max_shard_size)
        if method == "merged_4bit":
            _quantise(model, whole, folder, kind, max_shard_size)
        _save_tokenizer(tokenizer, folder)


def push_to_hub_merged(
    model: Any, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", *, token: str | bool | None = None,
    private: bool | None = None, commit_message: str | None = None, revision: str | None = None, create_pr: bool = False,
    max_shard_size: int | str = GB, dtype: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """Save as `save_pretrained_merged` does, and upload it by huggingface_hub. Returns its CommitInfo, raises what it raises."""
    with tempfile.TemporaryDirectory(prefix="sloth-push-") as made:
        folder = Path(made, repo_id.rpartition("/")[2])
        save_pretrained_merged(model, folder, tokenizer, save_method, max_shard_size=max_shard_size, dtype=dtype)
        if not _is_first():
            return None
        return _upload(folder, repo_id, token, private, commit_message, revision, create_pr)


def save_pretrained_gguf(
    model: Any, save_directory: str | os.PathLike, tokenizer: Any, quantization_method: str | list[str] = "q8_0"
) -> list[Path]:
    """Merge to 16 bits and convert with llama.cpp's converter. Returns the files, NAME.METHOD.gguf in `save_directory`.

    quantization_method: names of llama.cpp's types, or "not_quantized", "fast_quantized", "quantized". Raises RuntimeError that
    says what to install where converter or llama-quantize are missing, and with what they said where they fail.
    """
    methods, target = gguf.methods_of(quantization_method), Path(save_directory)
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer: give it")
    gguf.tools(methods)  # before the work
    if not _is_first():
        return []
    kind = dtype_for(model)
    found, _ = planned(model, kind)
    size = sum(w.size for w in found.values()) * (len(methods) + 2)
    check_space(target.absolute(), size)
    name = Path(os.path.realpath(target)).name
    with replaced(target, size, drops=tuple(f"{name}.{m}.gguf" for m in methods)) as folder:
        whole = folder / ".merged" / name  # its name is the model's in the file
        save_pretrained_merged(model, whole, tokenizer)
        gguf.convert(whole, folder, name, methods)
        shutil.rmtree(whole.parent)
    return [target / f"{name}.{m}.gguf" for m in methods]


def push_to_hub_gguf(
    model: Any, repo_id: str, tokenizer: Any, quantization_method: str | list[str] = "q8_0", *, token: str | bool | None = None,
    private: bool | None = None, commit_message: str | None = None,
) -> Any:  # fmt: skip
    """Convert as `save_pretrained_gguf` does, and upload the files. Returns huggingface_hub's CommitInfo."""
    with tempfile.TemporaryDirectory(prefix="sloth-push-") as made:
        folder = Path(made, repo_id.rpartition("/")[2])
        save_pretrained_gguf(model, folder, tokenizer, quantization_method)
        if not _is_first():
            return None
        return _upload(folder, repo_id, token, private, commit_message, None, False)


def _is_first() -> bool:
    """Of the processes that train together: each has the whole model, or `refuse_shards` has raised."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0


def _method(given: str) -> str:
    method = ALIASES.get(given, given)
    if method not in METHODS:
        raise ValueError(f"save_method={given!r} is not known. It is one of {', '.join(METHODS)}")
    return method


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _quantise(model: Any, whole: Path, folder: Path, dtype: torch.dtype, shard: int | str) -> None:
    """A merged folder in 16 bits → in NF4, with the settings of the model where it is in 4 bits itself. `whole` is removed."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    held = getattr(base_of(model).config, "quantization_config", None)
    settings = held if getattr(held, "load_in_4bit", False) else BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    four = AutoModelForCausalLM.from_pretrained(whole, quantization_config=settings, dtype=dtype, device_map={"": "cpu"})
    shutil.rmtree(whole)
    four.save_pretrained(folder, max_shard_size=shard)


def _upload(
    folder: Path, repo_id: str, token: Any, private: bool | None, message: str | None, revision: str | None, create_pr: bool
) -> Any:
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    made = hub.create_repo(repo_id, private=private, exist_ok=True)
    return hub.upload_folder(
        repo_id=made.repo_id, folder_path=folder, commit_message=message or "Upload model, merged by sloth", revision=revision,
        create_pr=create_pr,
    )  # fmt: skip
