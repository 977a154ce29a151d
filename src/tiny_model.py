"""Models to explain, built without weights: every layer of a config with its widths shrunk, or two layers of a model_type. Models
to warm caches with, of their real sizes.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch


class ModelError(ValueError):
    """What was given names no causal LM that can be built; the message says what to give."""


DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# What "tiny" means: fields that many configs share. A config only gets those that it has.
TINY: dict[str, Any] = {
    **dict.fromkeys(DEPTH, 2),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "head_dim": 16,
    "vocab_size": 256,
    "sliding_window": 32,
}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # what is asked of files on this machine


def build(model: str) -> torch.nn.Module:
    """The model, in training mode, on the CPU. Raises ModelError.

    model: a checkpoint folder or a config.json (all its layers, widths shrunk: what is matched depends on neither widths nor
    weights; a quantized checkpoint is loaded as it is), a model_type (two tiny layers), or FILE.py:NAME, a function of a file of
    yours that gives the model. The code of that file is run, as an `import` would: `__name__` is its name.
    """
    if ".py:" in model:
        return _made_by(model)
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        if Path(model).exists():
            config = _config(Path(model))
            if getattr(config, "quantization_config", None) is not None:
                return AutoModelForCausalLM.from_pretrained(_with_weights(Path(model)), **LOCAL).train()
            config = _tiny(config, keep=DEPTH)
        elif model in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config = _tiny(AutoConfig.for_model(model))
        else:
            what = "neither a folder, nor a config.json, nor FILE.py:NAME, nor a model_type of a causal LM such as llama"
            raise ModelError(f"{model!r} is {what}")
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).train()
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"{model} cannot be built: {type(e).__name__}: {e}".split("\n")[0]) from e


def _made_by(model: str) -> torch.nn.Module:
    """What FILE.py:NAME gives."""
    file, name = model.rsplit(":", 1)
    loader = SourceFileLoader(Path(file).stem, file)  # reports name the file as it is given
    spec = importlib.util.spec_from_loader(loader.name, loader)
    if not Path(file).is_file() or spec is None:
        raise ModelError(f"there is no file {file}")
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # it finds what lies beside it
    try:
        loader.exec_module(module)
        if not callable(make := getattr(module, name, None)):
            raise ModelError(f"{file} has no function {name}")
        made = make()
    except ModelError:
        raise
    except Exception as e:
        raise ModelError(f"{model} raises {type(e).__name__}: {e}".split("\n")[0]) from e
    if not isinstance(made, torch.nn.Module):
        raise ModelError(f"{model} gives a {type(made).__name__}, not an nn.Module")
    return made.train()


def as_trained(model: torch.nn.Module, lora: bool, four_bit: bool, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model as a run has it. dtype: of its weights. four_bit: its linear layers in NF4, prepared as PEFT prepares them (all
    else in fp32). lora: adapters on all linear layers but the head, of rank 8; all else is frozen. Raises ModelError.
    """
    if four_bit and not lora:
        raise ModelError("a model in 4 bits is trained through adapters: give --lora too")
    if dtype is not None:
        model.to(dtype)
    if four_bit:
        from peft import prepare_model_for_kbit_training
        from transformers import BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        )  # fmt: skip
        model = prepare_model_for_kbit_training(_in_4_bits(model, nf4, "cpu"), use_gradient_checkpointing=False)
    if lora:
        from peft import LoraConfig, get_peft_model

        try:
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))  # pyright: ignore
        except (ValueError, AttributeError) as e:  # it asks for methods that causal LMs of transformers have
            raise ModelError(f"PEFT gives {type(model).__name__} no adapters: {e}".split("\n")[0]) from e
    return model.train()


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with gradient checkpointing, as transformers has it. Raises ModelError."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ModelError(f"{type(model).__name__} has no gradient_checkpointing_enable, which --checkpointing calls")
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as e:
        raise ModelError(str(e).split("\n")[0]) from e
    return model


def words(model: torch.nn.Module) -> int:
    """How many token ids the model knows. Raises ModelError."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if (known := getattr(embeddings, "num_embeddings", None)) is None:
        raise ModelError(f"{type(model).__name__} has no get_input_embeddings that tells how many token ids it knows")
    return known


def check_call(model: torch.nn.Module, *names: str) -> None:
    """Raises ModelError for a model that does not take keyword arguments of these names."""
    try:
        inspect.signature(model.forward).bind(**dict.fromkeys(names))
    except TypeError as e:
        given = ", ".join(f"{name}=…" for name in names)
        raise ModelError(f"{type(model).__name__} cannot be called as model({given}), as causal LMs are: {e}") from e


def full(model: str, quantization: Any = None, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """The model in its real sizes, on the GPU if there is one. Raises ModelError.

    model: a checkpoint folder, or a config.json (random weights). quantization: a BitsAndBytesConfig, for 4 bits.
    dtype: of the weights; None: as the checkpoint's.
    """
    from transformers import AutoModelForCausalLM

    path, device = Path(model), "cuda" if torch.cuda.is_available() else "cpu"
    try:
        config = _config(path)
        config.use_cache = False
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        if path.is_dir() and any(path.glob("*.safetensors")):
            how = {} if quantization is None else {"quantization_config": quantization, "device_map": {"": device}}
            return AutoModelForCausalLM.from_pretrained(model, config=config, dtype=dtype, **how, **LOCAL).to(device)
        with torch.device(device):
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        return made if quantization is None else _in_4_bits(made, quantization, device)
    except (ModelError, ModuleNotFoundError):
        raise
    except Exception as e:
        raise ModelError(f"{model} cannot be built: {type(e).__name__}: {e}".split("\n")[0]) from e


def _in_4_bits(model: torch.nn.Module, quantization: Any, device: str) -> torch.nn.Module:
    import bitsandbytes as bnb

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer is not head:
            four = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, quantization.bnb_4bit_compute_dtype,
                quantization.bnb_4bit_use_double_quant, quantization.bnb_4bit_quant_type,
            )  # fmt: skip
            four.load_state_dict({k: t.cpu() for k, t in layer.state_dict().items()})
            model.set_submodule(name, four.to(device))
    model.is_loaded_in_4bit = True
    return model


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path} holds no config.json")
    try:
        return AutoConfig.from_pretrained(file, **LOCAL)
    except (ValueError, KeyError, OSError) as e:
        raise ModelError(f"{file} is no config of a causal LM: {e}".split("\n")[0]) from e


def _with_weights(path: Path) -> Path:
    """The folder of a quantised checkpoint. A name that is no folder would be asked of the hub."""
    folder = path if path.is_dir() else path.parent
    if not any(p.suffix in (".safetensors", ".bin") for p in folder.iterdir()):
        raise ModelError(f"{path} is quantised, which is loaded as it is, and no weights lie beside it: give the checkpoint")
    return folder


def _tiny(config: Any, keep: tuple[str, ...] = ()) -> Any:
    """The config with its widths, and unless kept its depth, shrunk; every kind of layer stays."""
    known = {k: v for k in TINY if isinstance(v := getattr(config, k, None), int) and not isinstance(v, bool)}
    changes = {k: v if k in keep else TINY[k] for k, v in known.items()}
    layers = next((changes[k] for k in DEPTH if k in changes), 2)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(kinds := getattr(config, name, None), list):
            distinct = list(dict.fromkeys(kinds))
            changes[name] = kinds if keep else [distinct[i % len(distinct)] for i in range(layers)]
    kept = {k: v for k, v in config.to_diff_dict().items() if isinstance(v, str | bool | float) and k != "model_type"}
    return type(config)(**{**kept, **changes, "use_cache": False})
