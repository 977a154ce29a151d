"""Preferences (Rafailov et al., Direct Preference Optimization, 2023): the reference is the model without its adapters.

python examples/dpo.py [MODEL] [OUT]
"""

import sys

import torch
from made import model_name, preferences
from trl import DPOConfig, DPOTrainer

from sloth import FastLanguageModel, is_bfloat16_supported

out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(model_name(), max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        out, beta=0.1, max_length=128, per_device_train_batch_size=4, max_steps=6, learning_rate=5e-4, logging_steps=1,
        report_to="none", bf16=is_bfloat16_supported(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    ),
    train_dataset=preferences(32),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
model.save_pretrained_merged(f"{out}/merged", tokenizer)
