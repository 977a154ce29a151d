"""All weights train, in a loop of one's own: no trainer, no adapters.

python examples/full_finetuning.py [MODEL] [OUT]
"""

import sys

import torch
from made import model_name, sentences

from sloth import FastLanguageModel

out = sys.argv[2] if len(sys.argv) > 2 else "outputs"
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name(),
    max_seq_length=256,
    dtype=torch.float32,  # steps smaller than what bf16 can show are not lost
    full_finetuning=True,
    use_gradient_checkpointing=True,
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
rows = [s + tokenizer.eos_token for s in sentences(64)]
for step in range(8):  # batches of every length are one graph, from the first on
    batch = tokenizer(rows[8 * step % 64 :][:8], return_tensors="pt", padding=True, return_token_type_ids=False).to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: {batch['input_ids'].shape[1]} tokens a row, loss {loss.item():.3f}")
model.save_pretrained(f"{out}/model")  # transformers' own
tokenizer.save_pretrained(f"{out}/model")
