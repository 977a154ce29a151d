"""A tiny Llama and a tokenizer on disk, for the tests of FastLanguageModel and of saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SENTENCE = "the sloth hangs in the tree and moves one arm a day while all the leaves grow green"
WORDS = SENTENCE.split()
LLAMA: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


def tokenizer_of(
    special: Any = ("<|end|>",), pad: str | None = None, unknown: str | None = None, byte_fallback: bool = False
) -> Any:
    """Of bytes, and the special tokens before them; the first of these ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [
        *special,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(f"w{i}" for i in range(LLAMA["vocab_size"] - 256 - len(special))),
    ]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], byte_fallback=byte_fallback, unk_token=unknown))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=pad, unk_token=unknown)


def checkpoint(folder: Path, **changes: Any) -> Path:
    """The folder, with model and tokenizer saved there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def loaded(folder: Path | str, **given: Any) -> tuple[Any, Any]:
    """What FastLanguageModel makes of it, in fp32 unless bits are given."""
    from sloth import FastLanguageModel

    return FastLanguageModel.from_pretrained(str(folder), **{"max_seq_length": 64, "load_in_4bit": False} | given)


def batch_of(tokenizer: Any, words: int = 8) -> Any:
    """Two rows of so many words."""
    text = [" ".join(WORDS[i : i + words]) for i in range(2)]
    return tokenizer(text, return_tensors="pt", padding=tokenizer.pad_token is not None, return_token_type_ids=False)
