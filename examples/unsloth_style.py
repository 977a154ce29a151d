"""A script written for Unsloth: of it, the import line is changed. A warning says by which names TRL knows its arguments now.

python examples/unsloth_style.py [MODEL]
"""

import sys

import torch
from made import model_name, texts
from transformers import AutoModelForCausalLM, TrainingArguments
from trl import SFTTrainer

from sloth import FastLanguageModel, is_bfloat16_supported

max_seq_length = 512  # longer than the tiny model's 256: its RoPE is scaled
out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name=model_name(),
    max_seq_length=max_seq_length,
    dtype=None,
    load_in_4bit=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=16,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth",
    random_state=3407,
    use_rslora=False,
    loftq_config=None,
)
trainer = SFTTrainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=texts(64),
    dataset_text_field="text",
    max_seq_length=max_seq_length,
    packing=False,
    args=TrainingArguments(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=1, max_steps=8, learning_rate=2e-3,
        bf16=is_bfloat16_supported(), logging_steps=1, optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear",
        seed=3407, output_dir=out, report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
    ),
)  # fmt: skip
trainer.train()

FastLanguageModel.for_inference(model)
inputs = tokenizer(["a sloth sleeps"], return_tensors="pt", return_token_type_ids=False).to(model.device)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=12, use_cache=True)))
model.save_pretrained(f"{out}/lora_model")
tokenizer.save_pretrained(f"{out}/lora_model")
model.save_pretrained_merged(f"{out}/merged", tokenizer, save_method="merged_16bit")

plain = AutoModelForCausalLM.from_pretrained(f"{out}/merged", dtype="auto").to(model.device)
with torch.no_grad():
    apart = (plain(**inputs).logits.float() - model(**inputs).logits.float()).abs().max().item()
print(f"merged and loaded by transformers alone: logits differ by {apart:.3g}, as {plain.dtype} rounds")
