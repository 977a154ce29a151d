"""FastLanguageModel: load, adapt, train, save, by the calls that scripts for Unsloth have.

    from sloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained("some/model", max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing="sloth")
    …                                        # any trainer of transformers or TRL, or a loop
    model.save_pretrained_merged("merged", tokenizer, save_method="merged_16bit")

What comes back are models of transformers and PEFT, compiled in place. docs/support.md lists what of other packages is touched.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from sloth.integrations.integration import load as load_integrations
from sloth.models.adapters import add_adapters, known_arguments
from sloth.models.arguments import INSTEAD, OF_TRANSFORMERS, WITHOUT_EFFECT, needed, refuse_impossible, refuse_unknown
from sloth.models.checkpointing import for_inference, for_training, kind_of
from sloth.models.compiled import compile_in_place
from sloth.models.load import load
from sloth.models.precision import Bits
from sloth.saving.methods import push_to_hub_gguf, push_to_hub_merged, save_pretrained_gguf, save_pretrained_merged

log = logging.getLogger("sloth")
load_integrations("sloth.integrations.trl_names")
SAVING = (save_pretrained_merged, push_to_hub_merged, save_pretrained_gguf, push_to_hub_gguf)
OWN = (
    "attn_implementation", "device_map", "dtype", "fix_tokenizer", "full_finetuning", "load_in_16bit", "load_in_4bit",
    "load_in_8bit", "max_seq_length", "model_name", "quantization_config", "random_state", "resize_model_vocab", "revision",
    "rope_scaling", "token", "trust_remote_code", "use_gradient_checkpointing",
)  # fmt: skip
OF_ADAPTERS = (
    "finetune_attention_modules", "finetune_language_layers", "finetune_last_n_layers", "finetune_mlp_modules",
    "finetune_vision_layers", "max_seq_length", "model", "random_state", "use_gradient_checkpointing",
)  # fmt: skip
TRAINED_IN_FULL = "_sloth_trained_in_full"


class FastLanguageModel:
    """Functions alone; nothing is made of this class."""

    @staticmethod
    def from_pretrained(
        model_name: str, max_seq_length: int | None = 2048, dtype: Any = None, load_in_4bit: bool | None = None,
        load_in_8bit: bool = False, load_in_16bit: bool = False, full_finetuning: bool = False, device_map: Any = None,
        token: str | bool | None = None, revision: str | None = None, trust_remote_code: bool = False,
        attn_implementation: str | None = None, rope_scaling: dict[str, Any] | None = None, fix_tokenizer: bool = True,
        use_gradient_checkpointing: bool | str = "sloth", resize_model_vocab: int | None = None, random_state: int = 3407,
        quantization_config: Any = None, **more: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """The model, compiled in place and in training mode, and its tokenizer.

        model_name: a folder or a name on the hub, of a model, or of adapters (then the model is a PeftModel that trains on).
        max_seq_length: longer than the model's range scales its RoPE (sloth.models.context); None: the model's range.
        dtype: of weights that are not quantised, and of products of those that are. None: bf16 on a GPU that has it, else fp16;
        fp32 on a CPU. load_in_4bit: NF4 with double quantisation; None: yes, unless something else is asked for.
        quantization_config: transformers' own, e.g. with llm_int8_skip_modules. full_finetuning: all weights train.
        use_gradient_checkpointing: of a model that trains in full or brings adapters; others say so in get_peft_model.
        more: arguments of transformers' from_pretrained that are listed in sloth.models.arguments.

        Raises TypeError for an unknown argument, ValueError for one that cannot be honoured, ImportError for a package that is
        not installed, OSError for a model that is not there.
        """
        known = {*OWN, *OF_TRANSFORMERS, *WITHOUT_EFFECT, *INSTEAD}
        refuse_unknown("from_pretrained", more, known)
        refuse_impossible("from_pretrained", more)
        needed("transformers")
        model, tokenizer = load(
            model_name, length=_length(max_seq_length), dtype=dtype, bits=Bits(load_in_4bit, load_in_8bit, load_in_16bit),
            full=full_finetuning, quantisation=quantization_config, device_map=device_map,
            hub={"token": token, "revision": revision, "trust_remote_code": trust_remote_code}, attention=attn_implementation,
            scaling=rope_scaling, fix_tokenizer=fix_tokenizer, vocabulary=resize_model_vocab,
            checkpointing=use_gradient_checkpointing, seed=random_state,
            loading={k: v for k, v in more.items() if k in OF_TRANSFORMERS},
        )  # fmt: skip
        if full_finetuning:
            setattr(model, TRAINED_IN_FULL, True)
        return _ready(model, use_gradient_checkpointing), tokenizer

    @staticmethod
    def get_peft_model(
        model: Any, r: int = 16, target_modules: Any = None, lora_alpha: float = 16, lora_dropout: float = 0.0,
        bias: str = "none", layers_to_transform: Any = None, layers_pattern: Any = None,
        use_gradient_checkpointing: bool | str = "sloth", random_state: int = 3407, max_seq_length: int | None = None,
        use_rslora: bool = False, use_dora: bool = False,
        modules_to_save: Any = None, init_lora_weights: Any = True, loftq_config: Any = None,
        finetune_vision_layers: bool = True, finetune_language_layers: bool = True, finetune_attention_modules: bool = True,
        finetune_mlp_modules: bool = True, finetune_last_n_layers: int | None = None, **more: Any,
    ) -> Any:  # fmt: skip
        """A PeftModel, compiled in place and in training mode: the base frozen, LoRA in fp32 on the layers named.

        target_modules: None: the seven projections of a Llama, or all linear layers but the head where a model has others.
        use_gradient_checkpointing: False, True (not re-entrant), or "sloth" ("unsloth" is the same): inputs of layers wait in
        host memory, where the backend can do that, else as True. random_state: adapters are drawn from it. max_seq_length says
        nothing here: from_pretrained was told. more: arguments of PEFT's LoraConfig.

        A model that trains in full is returned as it is, with a warning. Raises TypeError for an unknown argument, ValueError for
        one that cannot be honoured.
        """
        needed("peft")
        refuse_unknown("get_peft_model", more, {*known_arguments(), *OF_ADAPTERS, *INSTEAD})
        refuse_impossible("get_peft_model", more)
        if not finetune_language_layers:
            raise ValueError("finetune_language_layers=False leaves nothing to train: these are language models")
        if getattr(model, TRAINED_IN_FULL, False):
            log.warning("sloth: full_finetuning=True trains all weights: get_peft_model adds no adapters")
            return model
        config = {
            "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "bias": bias, "layers_to_transform": layers_to_transform,
            "layers_pattern": layers_pattern, "use_rslora": use_rslora, "use_dora": use_dora, "modules_to_save": modules_to_save,
            "init_lora_weights": init_lora_weights, **{k: v for k, v in more.items() if k not in INSTEAD},
        }  # fmt: skip
        adapted = add_adapters(
            model, r=r, target_modules=target_modules, seed=random_state, checkpointing=use_gradient_checkpointing,
            attention=finetune_attention_modules, mlp=finetune_mlp_modules, last=finetune_last_n_layers, loftq=loftq_config,
            config=config,
        )  # fmt: skip
        return _ready(adapted, use_gradient_checkpointing)

    for_training = staticmethod(for_training)
    for_inference = staticmethod(for_inference)
    save_pretrained_merged = staticmethod(save_pretrained_merged)
    push_to_hub_merged = staticmethod(push_to_hub_merged)
    save_pretrained_gguf = staticmethod(save_pretrained_gguf)
    push_to_hub_gguf = staticmethod(push_to_hub_gguf)


class FastModel(FastLanguageModel):
    """The same, under the name that scripts for newer models have. Models are causal LMs; towers for images are not loaded."""


def _length(given: Any) -> int | None:
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ValueError(f"max_seq_length={given!r} is no number of tokens: give a whole number above 0, or None")
    return given


def _ready(model: Any, checkpointing: Any) -> Any:
    """Compiled, and with the functions for saving as methods."""
    compile_in_place(model, offload=kind_of(checkpointing)[1])
    for function in SAVING:  # not bound methods: those cannot be pickled
        setattr(model, function.__name__, partial(function, model))
    return model
