"""What the short examples train: a tiny model, and texts about a sloth. Nothing is downloaded.

Each takes a model of yours instead, a folder or a name on the hub: `python examples/sft.py MODEL`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WHO, WHERE = ("a sloth", "an ape", "the owl", "that cat"), ("in the tree", "on a branch", "by the river", "under a leaf")
WHAT = {"sleeps": "day", "moves one arm": "hour", "eats green leaves": "evening", "looks up": "night"}
# Words between marks of turns; what the assistant says is marked, so that TRL can train on that alone.
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 8 to about 60 words."""
    draw = random.Random(seed)
    one = lambda: f"{draw.choice(WHO)} {(what := draw.choice(list(WHAT)))} {draw.choice(WHERE)} every {WHAT[what]}."  # noqa: E731
    return [" ".join(one() for _ in range(draw.randint(1, 6))) for _ in range(count)]


def texts(count: int) -> Dataset:
    """Column text."""
    return Dataset.from_dict({"text": sentences(count)})


def chats(count: int) -> Dataset:
    """Columns prompt and completion, of messages."""
    asked = [[{"role": "user", "content": f"what does {WHO[i % 4]} do?"}] for i in range(count)]
    return Dataset.from_dict(
        {"prompt": asked, "completion": [[{"role": "assistant", "content": s}] for s in sentences(count, seed=1)]}
    )


def preferences(count: int) -> Dataset:
    """Columns prompt, chosen, rejected: what is true, and its words in disorder."""
    true = sentences(count, seed=2)
    false = [" ".join(random.Random(i).sample(s.split(), len(s.split()))) for i, s in enumerate(true)]
    return Dataset.from_dict({"prompt": [f"{WHO[i % 4]}: " for i in range(count)], "chosen": true, "rejected": false})


def model_name() -> str:
    """The model that the command line names, or a tiny Llama made here."""
    if len(sys.argv) > 1:
        return sys.argv[1]
    folder = Path(tempfile.mkdtemp(prefix="sloth-example-"), "tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|reserved_0|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        sentences(200), trainers.BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=alphabet)
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT).save_pretrained(folder)
    return str(folder)
