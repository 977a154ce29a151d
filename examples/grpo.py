"""Rewards (Shao et al., DeepSeekMath, 2024): the model writes, what it wrote is judged, and it writes more of what was good.

python examples/grpo.py [MODEL] [OUT]
"""

import sys

import torch
from datasets import Dataset
from made import WHO, model_name
from trl import GRPOConfig, GRPOTrainer

from sloth import FastLanguageModel, is_bfloat16_supported

out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(model_name(), max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16)


def reward(completions: list[str], **_: object) -> list[float]:
    """Leaves are good."""
    return [text.count("e") / (1 + len(text)) for text in completions]


trainer = GRPOTrainer(
    model,
    reward_funcs=reward,
    args=GRPOConfig(
        out, per_device_train_batch_size=4, num_generations=4, max_completion_length=12, max_steps=3, learning_rate=1e-3,
        logging_steps=1, report_to="none", bf16=is_bfloat16_supported(), use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"{WHO[i % 4]} " for i in range(16)]}),
    processing_class=tokenizer,
)  # fmt: skip
trainer.train()
model.save_pretrained_merged(f"{out}/merged", tokenizer)
