"""Names that TRL's trainers had before, as scripts for Unsloth give them, mean what they meant.

    SFTTrainer(model=…, tokenizer=…, dataset_text_field="text", max_seq_length=2048, args=TrainingArguments(…))

By now `tokenizer` is `processing_class`, and the others are arguments of the trainer's configuration. TRL refuses them where they
were; here they are put where they belong, and a warning says where that is. What TRL has no name for any more it refuses as
before. Only programs that use FastLanguageModel load this.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import signature
from types import ModuleType
from typing import Any

from sloth.integrations.integration import integration

log = logging.getLogger("sloth")
RENAMED = {"max_seq_length": "max_length"}
WHY = "names that TRL had before mean what they meant"
TRAINERS = {
    "trl.experimental.orpo.orpo_trainer": "ORPO", "trl.trainer.dpo_trainer": "DPO", "trl.trainer.kto_trainer": "KTO",
    "trl.trainer.reward_trainer": "Reward", "trl.trainer.sft_trainer": "SFT",
}  # fmt: skip


def _accepting(begin: Callable[..., None], kind: Any) -> Callable[..., None]:
    """A trainer's `__init__`. kind: the class of its configuration."""
    today, of_config = signature(begin), {f.name for f in fields(kind)}

    def called(name: str) -> str:
        return RENAMED.get(name, name)

    @wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        strange = {name: kwargs.pop(name) for name in kwargs.keys() - today.parameters.keys()}
        tokenizer = strange.pop("tokenizer", None)
        moved = {called(name): strange.pop(name) for name in list(strange) if called(name) in of_config}
        if tokenizer is None and not moved:
            return begin(self, *args, **kwargs, **strange)
        given = today.bind_partial(self, *args, **kwargs).arguments
        if tokenizer is not None and given.setdefault("processing_class", tokenizer) is not tokenizer:
            raise TypeError("tokenizer is processing_class by now, and both are given: leave tokenizer out")
        if moved:
            given["args"] = _holding(given.get("args"), kind, moved)
        belongs = ["processing_class=…"] if tokenizer is not None else []
        belongs += [f"{kind.__name__}({', '.join(f'{name}=…' for name in sorted(moved))})"] if moved else []
        log.warning("sloth: %s: by TRL's names of today that is %s", type(self).__name__, ", ".join(belongs))
        return begin(**given, **strange)

    return __init__


def _holding(config: Any, kind: Any, moved: dict[str, Any]) -> Any:
    """A copy of the configuration with these in it."""
    if config is None:
        return kind(**moved)
    if isinstance(config, kind):
        config = copy.copy(config)
        for name, value in moved.items():
            setattr(config, name, value)
        return config
    return kind(**config.to_dict() | {"hub_token": config.hub_token} | moved)  # which that hides; so TRL does itself


def _accept(module: ModuleType) -> None:
    name = TRAINERS[module.__name__]
    trainer = getattr(module, f"{name}Trainer")
    trainer.__init__ = _accepting(trainer.__init__, getattr(module, f"{name}Config"))


for _module, _name in TRAINERS.items():
    integration(_module, touches=f"{_name}Trainer.__init__", why=WHY)(_accept)


@integration("trl.trainer.sft_config", touches="SFTConfig.__init__", why="max_seq_length means max_length, as it did")
def _rename(sft_config: ModuleType) -> None:
    begin = sft_config.SFTConfig.__init__

    @wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for old, new in RENAMED.items():
            if old in kwargs and new not in kwargs:
                kwargs[new] = kwargs.pop(old)
                log.warning("sloth: SFTConfig: by TRL's names of today %s is %s", old, new)
        begin(self, *args, **kwargs)

    sft_config.SFTConfig.__init__ = __init__
