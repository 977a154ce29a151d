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
from sloth.models.precision import device_map_of, dtype_of, quantisation_of, settle
from sloth.models.tokens import give_pad_token, grow_embedding, tell_model
from sloth.rewriter.notices import speak, tell_once


def load(
    name: str, *, length: int | None, dtype: Any, four: bool | None, eight: bool, full: bool, quantisation: Any, device_map: Any,
    hub: dict[str, Any], attention: str | None, scaling: dict[str, Any] | None, fix_tokenizer: bool, vocabulary: int | None,
    checkpointing: Any, seed: int, loading: dict[str, Any],
) -> tuple[Any, Any]:  # fmt: skip
    """The model in training mode, and the tokenizer. hub: token, revision, trust_remote_code; loading: more for from_pretrained.
    seed: of weights that the checkpoint lacks; the caller's random state stays as it is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    speak()
    checkpointed, _ = kind_of(checkpointing)
    adapter = _adapter_of(name, hub)
    source, of_source = (adapter["base_model_name_or_path"], _of_base(adapter, hub)) if adapter else (name, hub)
    config = AutoConfig.from_pretrained(source, **of_source, **_of_files(loading))
    weights = dtype_of(dtype)
    quantised, written = quantisation_of(config, four, eight, full, quantisation, weights)
    if written is not None:
        config.quantization_config = written
    if full and adapter:
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
    tokenizer = AutoTokenizer.from_pretrained(
        _with_tokenizer(name, source), **(hub if adapter else of_source), **_of_files(loading)
    )
    with drawn_from(seed):
        _fit(model, tokenizer, length, fix_tokenizer, vocabulary)
    model.config.use_cache = False
    model.requires_grad_(full)
    base = model
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name, is_trainable=True, **_for_peft(hub))
    checkpoint(base, checkpointed and (full or bool(adapter)))
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


def _adapter_of(name: str, hub: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of adapters that lie there, None where a model does."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(name, "config.json").exists():
        return None
    asked = {k: v for k, v in hub.items() if k in ("token", "revision") and v is not None}
    found = find_adapter_config_file(name, **asked)
    return None if found is None else json.loads(Path(found).read_text())


def _of_base(adapter: dict[str, Any], hub: dict[str, Any]) -> dict[str, Any]:
    """The revision is that of the adapters; of their base, theirs."""
    return hub | {"revision": adapter.get("revision")} if adapter.get("revision") else {k: hub[k] for k in hub if k != "revision"}


def _for_peft(hub: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in hub.items() if k in ("token", "revision") and v is not None}


def _of_files(loading: dict[str, Any]) -> dict[str, Any]:
    """Of arguments for the model, those for configurations and tokenizers too."""
    return {k: v for k, v in loading.items() if k in OF_TRANSFORMERS and k not in ("max_memory", "use_safetensors", "variant")}


def _with_tokenizer(name: str, source: str) -> str:
    """A folder of adapters alone has no tokenizer: then that of its base."""
    folder = Path(name)
    return source if folder.is_dir() and not any(folder.glob("*token*")) else name


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Random numbers are drawn from `seed`; afterwards the state is as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
