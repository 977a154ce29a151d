"""Four times the context that the model was made for: RoPE is scaled in its own kind, layers are checkpointed, and a word from
the beginning is asked for at the end. The loss is that of the answer.

    python examples/long_context.py [MODEL] [OUT]
"""

import random
import sys

import torch
from made import WHERE, model_name, sentences
from transformers import Trainer, TrainingArguments

from sloth import FastLanguageModel, is_bfloat16_supported

LENGTH = 1024  # of the tiny model's 256
out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(model_name(), max_seq_length=LENGTH, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(
    model, r=16, lora_alpha=32, use_gradient_checkpointing="sloth", modules_to_save=["embed_tokens", "lm_head"]
)


def row(seed: int) -> dict[str, list[int]]:
    """A secret, LENGTH tokens in all, and the secret again: labels are that one alone."""
    secret = random.Random(seed).choice(WHERE)
    end = tokenizer(f" The secret was: {secret}").input_ids
    answer = len(tokenizer(f" {secret}").input_ids)
    filling = tokenizer(f"The secret is: {secret}. " + " ".join(sentences(200, seed))).input_ids[: LENGTH - len(end)]
    ids = filling + end
    return {"input_ids": ids, "labels": [-100] * (len(ids) - answer) + ids[-answer:], "attention_mask": [1] * len(ids)}


trainer = Trainer(
    model,
    TrainingArguments(
        out, per_device_train_batch_size=1, max_steps=24, learning_rate=3e-3, logging_steps=4, report_to="none",
        optim="adamw_8bit", bf16=is_bfloat16_supported(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    ),
    train_dataset=[row(seed) for seed in range(24)],
)  # fmt: skip
trainer.train()
model.save_pretrained_merged(f"{out}/merged", tokenizer)
