"""From a name to a model and its tokenizer, both of transformers, ready for adapters or for training in full."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sloth.models.arguments import OF_TRANSFORMERS
from sloth.models.checkpointing import checkpoint, kind_of
from sloth.models.context import lengthen
from sloth.models.precision import Bits, device_map_of, dtype_of, quantisation_of, settle
from sloth.models.tokens import give_pad_token, grow_embedding, tell_model
from sloth.rewriter.notices import speak, tell_once

CONFIG = "adapter_config.json"
OF_DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def load(
    name: str, *, length: int | None, dtype: Any, bits: Bits, full: bool, quantisation: Any, device_map: Any,
    hub: dict[str, Any], attention: str | None, scaling: dict[str, Any] | None, fix_tokenizer: bool, vocabulary: int | None,
    checkpointing: Any, seed: int, loading: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """The model in training mode, and the tokenizer. hub: token, revision, trust_remote_code; loading: more for from_pretrained;
    of adapters, subfolder is theirs, and their base's are the others. seed: of weights that the checkpoint lacks; the caller's
    random state stays as it is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    speak()
    checkpointed, _ = kind_of(checkpointing)
    source, of_source, words = name, hub, (name, hub)
    if (adapters := _adapters_at(name, hub, loading)) is not None:
        adapter = json.loads((adapters / CONFIG).read_text())
        source, of_source = adapter["base_model_name_or_path"], _of_base(adapter, hub)
        loading = {k: v for k, v in loading.items() if k != "subfolder"}
        has_words = any(adapters.glob("*token*"))
        words = (str(adapters), {"trust_remote_code": hub["trust_remote_code"]}) if has_words else (source, of_source)
    config = AutoConfig.from_pretrained(source, **of_source, **_of_files(loading))
    weights = dtype_of(dtype)
    quantised, written = quantisation_of(config, bits, full, quantisation, weights)
    if written is not None:
        config.quantization_config = written
    if full and adapters:
        raise ValueError(f"full_finetuning=True: {name} holds adapters. Merge them first: model.save_pretrained_merged(…)")
    told = lengthen(config, length, scaling)
    if told:
        tell_once(told)
    given = {"quantization_config": quantised} if quantised is not None else {}
    if attention is not None:
        given["attn_implementation"] = attention
    with drawn_from(seed):
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=weights, device_map=device_map_of(device_map), **given, **of_source, **loading
        )
    settle(model)
    tokenizer = AutoTokenizer.from_pretrained(words[0], **words[1], **_of_files(loading))
    with drawn_from(seed):
        _fit(model, tokenizer, length, fix_tokenizer, vocabulary)
    model.config.use_cache = False
    model.requires_grad_(full)
    base = model
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapters), is_trainable=True)
    checkpoint(base, checkpointed and (full or bool(adapters)))
    return model.train(), tokenizer


def _fit(model: Any, tokenizer: Any, length: int | None, fix_tokenizer: bool, vocabulary: int | None) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if vocabulary is not None and vocabulary != rows:
        if vocabulary < len(tokenizer):
            raise ValueError(
                f"resize_model_vocab={vocabulary}, and the tokenizer has {len(tokenizer)} tokens: give that many or more"
            )
        grow_embedding(model, vocabulary)
        rows = vocabulary
    if fix_tokenizer:
        pad, grows = give_pad_token(tokenizer, rows)
        if grows or len(tokenizer) > rows:
            grow_embedding(model, len(tokenizer))
            tell_once(
                f"the tokenizer had no token to pad with: {pad} is new, and the embedding has {len(tokenizer)} rows instead of"
                f" {rows}. Who loads adapters onto the base by himself calls resize_token_embeddings({len(tokenizer)}) before"
            )
    tell_model(model, tokenizer, length)


def _adapters_at(name: str, hub: dict[str, Any], loading: dict[str, Any]) -> Path | None:
    """The folder of adapters that lie there, brought here from the hub; None where a model does."""
    from transformers.utils.peft_utils import find_adapter_config_file

    within = loading.get("subfolder") or ""
    if Path(name, within, "config.json").exists():
        return None
    asked = {k: v for k, v in (hub | loading).items() if k in OF_DOWNLOADS and v is not None}
    if find_adapter_config_file(name, subfolder=within, **asked) is None:
        return None
    if Path(name).is_dir():
        return Path(name, within)
    from huggingface_hub import snapshot_download  # PEFT's own way asks the hub whatever local_files_only says

    wanted = [str(Path(within, pattern)) for pattern in ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")]
    return Path(snapshot_download(name, allow_patterns=wanted, **asked), within)


def _of_base(adapter: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """The revision is that of the adapters; of their base, theirs."""
    return hub | {"revision": adapter.get("revision")} if adapter.get("revision") else {k: hub[k] for k in hub if k != "revision"}


def _of_files(loading: dict[str, Any]) -> dict[str, Any]:
    """Of arguments for the model, those for configurations and tokenizers too."""
    return {k: v for k, v in loading.items() if k in OF_TRANSFORMERS and k not in ("max_memory", "use_safetensors", "variant")}


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Random numbers are drawn from `seed`; afterwards the state is as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
