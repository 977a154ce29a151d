"""A token to pad with that no text uses, so that what is padded is never what is learned."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

NEW = "<|pad|>"
MADE_FOR_IT = re.compile(r"(?i)^(<\|?|\[)?[a-z_▁]*pad[a-z_]*(\|?>|\])?$")
SPARE = re.compile(r"(?i)reserved|unused|extra_id|fim_pad|vision_pad|placeholder")


def give_pad_token(tokenizer: Any, rows: int) -> tuple[str, bool]:
    """See that the tokenizer has a pad token of its own. Returns it, and whether the model's embedding must grow.

    rows: of the model's embedding. In this order: the one it has; a special token of the vocabulary that is made for padding or
    left over; the unknown token where each text can be written without (bytes fall back on tokens of their own); a new one in a
    row that the embedding has spare; a new one. A pad token that is the end of text counts as none unless the embedding would
    have to grow: collators leave padding out of the loss, and the end of text would never be learned.
    """
    held, ends = tokenizer.pad_token, {tokenizer.eos_token, tokenizer.bos_token}
    if held is not None and held not in ends:
        return held, tokenizer.pad_token_id >= rows
    chosen = _unused(tokenizer, rows) or _unknown(tokenizer, ends)
    if chosen is not None:
        tokenizer.pad_token = chosen
        return chosen, False
    if held is not None and len(tokenizer) >= rows:
        return held, False
    tokenizer.add_special_tokens({"pad_token": _name(tokenizer)})
    return tokenizer.pad_token, tokenizer.pad_token_id >= rows


def _unused(tokenizer: Any, rows: int) -> str | None:
    """A special token without a meaning, by id; those whose name says pad first."""
    added = tokenizer.added_tokens_decoder
    taken = {getattr(tokenizer, f"{kind}_token", None) for kind in ("bos", "eos", "unk", "sep", "cls", "mask")}
    names = [added[i].content for i in sorted(added) if added[i].special and i < rows and added[i].content not in taken]
    template = tokenizer.chat_template
    names = [n for n in names if n not in (template if isinstance(template, str) else json.dumps(template or ""))]
    found = [n for n in names if MADE_FOR_IT.match(n)] or [n for n in names if "pad" in n.lower()]
    found = found or [n for n in names if SPARE.search(n)]
    return found[0] if found else None


def _unknown(tokenizer: Any, ends: set[str | None]) -> str | None:
    """The unknown token, where no text gives it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str())["model"] if backend is not None else {}
    unknown = tokenizer.unk_token
    return unknown if unknown is not None and unknown not in ends and model.get("byte_fallback") else None


def _name(tokenizer: Any) -> str:
    name, vocabulary = NEW, tokenizer.get_vocab()
    while name in vocabulary:
        name = name.replace("pad", "pad_")
    return name


def grow_embedding(model: Any, rows: int) -> None:
    """Resize embedding and head to `rows`; new rows are the mean of the others, so that they are never the likeliest word."""
    tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings()) if t is not None}
    before = max(t.shape[0] for t in tables.values())
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None and rows > before:
                weight = table.weight
                weight[before:] = weight[:before].float().mean(0).to(weight.dtype)


def tell_model(model: Any, tokenizer: Any, length: int | None) -> None:
    """The model's configurations name the pad token; the tokenizer truncates, where it is asked to, at `length`."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if length is not None:
        tokenizer.model_max_length = length
