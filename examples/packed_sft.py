"""Rows laid end to end: no padding is computed, and no row sees another.

python examples/packed_sft.py [MODEL] [OUT]
"""

import sys

import torch
from made import model_name, texts
from trl import SFTConfig, SFTTrainer

from sloth import FastLanguageModel, is_bfloat16_supported

out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(model_name(), max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)
trainer = SFTTrainer(
    model,
    SFTConfig(
        out, max_length=256, packing=True, per_device_train_batch_size=1, max_steps=8, learning_rate=2e-3, logging_steps=1,
        report_to="none", bf16=is_bfloat16_supported(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    ),
    train_dataset=texts(128),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
model.save_pretrained_merged(f"{out}/merged", tokenizer)
