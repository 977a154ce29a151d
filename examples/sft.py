"""Adapters on a model in 4 bits, taught to answer: the loss is that of what the assistant says.

python examples/sft.py [MODEL] [OUT]
"""

import sys

import torch
from made import chats, model_name
from trl import SFTConfig, SFTTrainer

from sloth import FastLanguageModel, TrainingChart, is_bfloat16_supported

out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(model_name(), max_seq_length=256, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, use_rslora=True)
trainer = SFTTrainer(
    model,
    SFTConfig(
        out, max_length=256, per_device_train_batch_size=4, max_steps=8, learning_rate=2e-3, logging_steps=1, report_to="none",
        completion_only_loss=True, bf16=is_bfloat16_supported(), use_cpu=not torch.cuda.is_available(), save_strategy="no",
    ),
    train_dataset=chats(64),
    processing_class=tokenizer,
    callbacks=[TrainingChart(f"{out}/training.png")],  # loss, tokens a second, memory
)  # fmt: skip
trainer.train()

FastLanguageModel.for_inference(model)
asked = [{"role": "user", "content": "what does a sloth do?"}]
prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=16)[0]))
model.save_pretrained_merged(f"{out}/adapters", tokenizer, save_method="lora")
