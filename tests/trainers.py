"""Every trainer of transformers and TRL that runs here, and what each is given: one table, for the tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoint import LLAMA, WORDS, tokenizer_of

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
SEED, STEPS = 5, 4


def said(i: int, count: int = 3) -> str:
    return " ".join(WORDS[i % 9 : i % 9 + count + i % 3])


def texts(n: int) -> dict[str, list]:
    return {"text": [said(i, 5) for i in range(n)]}


def completions(n: int) -> dict[str, list]:
    return {"prompt": [said(i) for i in range(n)], "completion": [" " + said(i + 3) for i in range(n)]}


def chats(n: int) -> dict[str, list]:
    def talk(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": said(i)}, {"role": "assistant", "content": said(i + 3)}]

    return {"messages": [talk(i) for i in range(n)]}


def preferences(n: int) -> dict[str, list]:
    """What is rejected has letters that nothing else has, or a tiny model would not tell them apart so soon."""
    chosen = [" " + said(i + 3) for i in range(n)]
    return {"prompt": [said(i) for i in range(n)], "chosen": chosen, "rejected": [text.upper() for text in chosen]}


def labelled(n: int) -> dict[str, list]:
    return completions(n) | {"label": [i % 3 > 0 for i in range(n)]}


def three(n: int) -> dict[str, list]:
    return preferences(n) | {"reference": [" " + said(i + 4) for i in range(n)]}


def prompts(n: int) -> dict[str, list]:
    return {"prompt": [said(i) for i in range(n)]}


def tokenised(n: int) -> dict[str, list]:
    ids = [tokenizer().encode(text) for text in texts(n)["text"]]
    return {"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text)) / 10 for text in completions]


@dataclass(frozen=True)
class Row:
    """trainer: where it is, and its name; its configuration is beside it. data: columns of so many rows. more: for the
    configuration; own: for the trainer. falls: does its loss, in so few steps (where texts are generated it need not)?
    """

    trainer: str
    data: Any
    more: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    falls: bool = True
    model: str = "LlamaForCausalLM"


SFT = "trl.SFTTrainer"
GENERATING = {"max_completion_length": 6, "num_generations": 2, "beta": 0.1, "num_iterations": 2}
TRAINERS = {
    "Trainer": Row("transformers.Trainer", tokenised),
    "SFT": Row(SFT, texts),
    "SFT packing": Row(SFT, texts, {"packing": True, "max_length": 64}),
    "SFT padding-free": Row(SFT, texts, {"padding_free": True, "max_length": None}),
    "SFT completion-only": Row(SFT, completions, {"completion_only_loss": True}),
    "SFT assistant masks": Row(SFT, chats, {"assistant_only_loss": True}),
    "DPO": Row("trl.DPOTrainer", preferences),
    "KTO": Row("trl.KTOTrainer", labelled),
    "ORPO": Row("trl.experimental.orpo.ORPOTrainer", preferences),
    "CPO": Row("trl.experimental.cpo.CPOTrainer", preferences),
    "TPO": Row("trl.experimental.tpo.TPOTrainer", three),
    "reward": Row("trl.RewardTrainer", preferences, model="LlamaForSequenceClassification"),
    "GRPO": Row("trl.GRPOTrainer", prompts, GENERATING, {"reward_funcs": reward}, falls=False),
    "RLOO": Row("trl.RLOOTrainer", prompts, GENERATING, {"reward_funcs": reward}, falls=False),
    "GKD": Row("trl.experimental.gkd.GKDTrainer", chats, {"max_new_tokens": 6}, {"teacher_model": "another"}, falls=False),
    "online DPO": Row(
        "trl.experimental.online_dpo.OnlineDPOTrainer", prompts, {"max_new_tokens": 6}, {"reward_funcs": reward}, falls=False
    ),
}


def tokenizer() -> Any:
    made = tokenizer_of(special=("<|end|>", "<|pad|>"), pad="<|pad|>")
    made.chat_template = CHAT
    return made


def checkpoint(folder: Path, model: str = "LlamaForCausalLM", seed: int = 0, **sizes: int) -> Path:
    """Saved there: a tiny model of one layer, and its tokenizer."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 1, "pad_token_id": 1, "num_labels": 1} | sizes)
    getattr(transformers, model)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def plain(folder: Path, row: Row, **lora: Any) -> Any:
    """transformers' and PEFT's own, with adapters as FastLanguageModel draws them."""
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, row.model).from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(SEED)
    task = "SEQ_CLS" if row.model.endswith("Classification") else "CAUSAL_LM"
    return get_peft_model(model, LoraConfig(**LORA | lora, task_type=task))


def fast(folder: Path, _: Row, **lora: Any) -> Any:
    from sloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(model, **LORA | lora, random_state=SEED, use_gradient_checkpointing=False)


def train(row: Row, model: Any, out: Path, steps: int = STEPS, own: dict[str, Any] | None = None, **more: Any) -> list[dict]:
    """What is logged at each step. own: for the trainer; more: for its configuration."""
    from datasets import Dataset

    module, _, name = row.trainer.rpartition(".")
    trainer = getattr(import_module(module), name)
    config = getattr(import_module(module), {"Trainer": "TrainingArguments"}.get(name, name.replace("Trainer", "Config")))
    usual = {
        "output_dir": str(out), "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    arguments = config(**usual | row.more | more)
    given = dict(row.own) | (own or {})
    if given.get("teacher_model") == "another":
        given["teacher_model"] = str(checkpoint(out.parent / "teacher", seed=1))
    if name == "Trainer":
        from transformers import DataCollatorForSeq2Seq

        given["data_collator"] = DataCollatorForSeq2Seq(tokenizer())
    data = Dataset.from_dict(row.data(24))
    run = trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer(), **given)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry]
