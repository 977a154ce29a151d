"""FastLanguageModel: what it loads, what it adds, what it refuses."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoint import LLAMA, batch_of, checkpoint, loaded, tokenizer_of
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters

from sloth.models.checkpointing import is_checkpointed
from sloth.saving.merged import base_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, which has no pad token."""
    return checkpoint(tmp_path_factory.mktemp("fast") / "base")


def fast() -> Any:
    from sloth import FastLanguageModel

    return FastLanguageModel


def test_import_is_free_of_torch() -> None:
    code = (
        "import sys, sloth; assert 'FastLanguageModel' in dir(sloth); print(not {'torch', 'transformers'} & sys.modules.keys())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "True", done.stderr


# ---------------------------------------------------------------- loading


def test_nf4_by_default(folder: Path) -> None:
    import bitsandbytes as bnb
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    model, tokenizer = loaded(folder, load_in_4bit=None)
    assert type(model) is LlamaForCausalLM and isinstance(tokenizer, PreTrainedTokenizerBase)
    four = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert four == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    assert layer.compute_dtype == model.lm_head.weight.dtype == torch.float32 and not layer.support_avx512bf16_for_cpu
    assert not any(p.requires_grad for p in model.parameters()) and model.training
    assert model._compiled_call_impl is not None and not any("_orig_mod" in key for key in model.state_dict())
    assert tokenizer.model_max_length == 64 and model.config.pad_token_id == tokenizer.pad_token_id


def test_eight_and_sixteen_bits_and_layers_that_are_skipped(folder: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig

    eight, _ = loaded(folder, load_in_8bit=True, load_in_4bit=None)
    assert isinstance(eight.model.layers[0].mlp.up_proj, bnb.nn.Linear8bitLt)
    sixteen, _ = loaded(folder, dtype="bfloat16")
    assert {p.dtype for p in sixteen.parameters()} == {torch.bfloat16}
    assert loaded(folder, load_in_16bit=True, load_in_4bit=None)[0].dtype == torch.float32  # on a CPU
    skipping = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "down_proj"])
    some, _ = loaded(folder, quantization_config=skipping, load_in_4bit=None)
    assert isinstance(some.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    assert type(some.model.layers[0].mlp.down_proj) is torch.nn.Linear
    some.save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    again, _ = loaded(tmp_path, load_in_4bit=None)
    assert type(again.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert isinstance(again.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)


def test_a_checkpoint_that_was_quantised_before(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder, load_in_4bit=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same = loaded(tmp_path, load_in_4bit=None)
    assert same.pad_token == tokenizer.pad_token
    ids = batch_of(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(plain(again)(**ids).logits, plain(model)(**ids).logits)
    with pytest.raises(ValueError, match=r"quantised already \(4 bits\).*made from"):
        loaded(tmp_path, load_in_4bit=False)
    for other in ({"full_finetuning": True}, {"load_in_16bit": True}):
        with pytest.raises(ValueError, match=f"{next(iter(other))}=True: this checkpoint is quantised already"):
            loaded(tmp_path, load_in_4bit=None, **other)


@pytest.mark.parametrize("held", [{"load_in_8bit": True}, {"quant_method": "gptq"}])
def test_sixteen_bits_of_a_quantised_checkpoint_are_refused(held: dict[str, Any]) -> None:
    from sloth.models.precision import Bits, quantisation_of

    config = SimpleNamespace(quantization_config=held)
    with pytest.raises(ValueError, match="load_in_16bit=True: this checkpoint is quantised already"):
        quantisation_of(config, Bits(None, False, True), False, None, torch.float32)
    assert quantisation_of(config, Bits(None, False, False), False, None, torch.float32) == (None, held)


def plain(model: Any) -> Any:
    """The same model, without a compiler."""
    model._compiled_call_impl = None
    return model.eval()


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"load_in_4bits": True}, TypeError, "load_in_4bits. Did you mean load_in_4bit"),
        ({"fast_inference": True}, ValueError, "vLLM is not built in"),
        ({"load_in_4bit": True, "load_in_8bit": True}, ValueError, "choose one"),
        ({"load_in_16bit": True, "load_in_4bit": True}, ValueError, "choose one"),
        ({"load_in_4bit": True, "full_finetuning": True}, ValueError, "leave load_in_4bit/8bit out"),
        ({"dtype": "int8"}, ValueError, "none of torch.bfloat16"),
        ({"max_seq_length": 0}, ValueError, "no number of tokens"),
        ({"use_gradient_checkpointing": "slot"}, ValueError, "Did you mean sloth"),
        ({"rope_scaling": {"factor": 2.0}}, ValueError, "no dict with a rope_type"),
        ({"resize_model_vocab": 3}, ValueError, "give that many or more"),
    ],
)
def test_what_cannot_be_is_refused_and_told(folder: Path, given: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        fast().from_pretrained(str(folder), **given)


def test_arguments_of_vllm_mean_nothing_without_it(folder: Path) -> None:
    loaded(folder, fast_inference=False, max_lora_rank=16, gpu_memory_utilization=0.6)


def test_rows_that_nf4_gets_wrong_on_a_cpu_are_refused(tmp_path: Path) -> None:
    odd = checkpoint(tmp_path / "odd", hidden_size=48, num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match="q_proj has rows of 48, and NF4 on a CPU needs multiples of 64"):
        loaded(odd, load_in_4bit=True)


def test_full_finetuning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = loaded(folder, full_finetuning=True, load_in_4bit=None, use_gradient_checkpointing=True)
    assert all(p.requires_grad for p in model.parameters()) and is_checkpointed(model)
    assert fast().get_peft_model(model) is model and "trains all weights" in caplog.text


def test_training_and_generating_are_switched(folder: Path) -> None:
    model = fast().get_peft_model(loaded(folder)[0])
    model.generation_config.use_cache = False  # as in the folder of a model that was trained and saved
    assert fast().for_inference(model) is model and not model.training and model.config.use_cache
    assert base_of(model).generation_config.use_cache
    assert fast().for_training(model) is model and model.training and not model.config.use_cache
    fast().for_training(model, use_gradient_checkpointing=False)
    assert not is_checkpointed(model)


def test_offloading_is_switched(folder: Path) -> None:
    from sloth.integrations.generation import backend_of

    def options() -> Any:
        return backend_of(model._compiled_call_impl).kwargs.get("options")

    model = fast().get_peft_model(loaded(folder)[0], use_gradient_checkpointing=True)
    assert options() is None
    fast().for_training(model, use_gradient_checkpointing="sloth")
    assert is_checkpointed(model) and options() == {"sloth.checkpoint_offload": True}
    call = model._compiled_call_impl
    fast().for_training(model, use_gradient_checkpointing="unsloth")
    assert model._compiled_call_impl is call  # nothing is compiled anew for nothing
    fast().for_training(model)
    assert options()
    fast().for_training(model, use_gradient_checkpointing=True)
    assert is_checkpointed(model) and options() is None
    model.compile(backend="sloth", options={"sloth.disable": "rope"}, dynamic=True)
    fast().for_training(model, use_gradient_checkpointing="sloth")
    assert options() == {"sloth.disable": "rope", "sloth.checkpoint_offload": True}
    assert backend_of(model._compiled_call_impl).dynamic


# ---------------------------------------------------------------- adapters


def test_adapters_are_drawn_from_their_seed_alone(folder: Path) -> None:
    from peft import PeftModelForCausalLM

    before = torch.get_rng_state()
    one, other, third = (fast().get_peft_model(loaded(folder, load_in_4bit=True)[0], random_state=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(one) is PeftModelForCausalLM and one.training and one._compiled_call_impl is not None
    assert one.get_base_model()._compiled_call_impl is None
    weights = [m.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight for m in (one, other, third)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2]) and weights[0].dtype == torch.float32
    trained = {n.split(".lora_")[0].rpartition(".")[2] for n, p in one.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    config = one.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.task_type) == (16, 16, 0.0, "none", "CAUSAL_LM")


@pytest.mark.parametrize("kind, on", [(False, False), (True, True), ("sloth", True), ("unsloth", True)])
def test_kinds_of_checkpointing(folder: Path, kind: Any, on: bool) -> None:
    base = fast().get_peft_model(loaded(folder)[0], use_gradient_checkpointing=kind).get_base_model()
    assert is_checkpointed(base) == on
    how = getattr(base.model.layers[0], "_gradient_checkpointing_func", None)
    assert not on or how.keywords == {"use_reentrant": False}


@pytest.mark.parametrize("kind, offloaded", [(True, False), ("sloth", True)])
def test_offloading_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, offloaded: bool) -> None:
    asked = []
    model, _ = loaded(folder)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how["options"]))
    fast().get_peft_model(model, use_gradient_checkpointing=kind)
    assert asked == [{"sloth.checkpoint_offload": True} if offloaded else None]


def test_what_adapters_may_be(folder: Path) -> None:
    def made(**given: Any) -> Any:
        return fast().get_peft_model(loaded(folder)[0], **given).peft_config["default"]

    assert made(use_dora=True, use_rslora=True).use_dora
    assert made(finetune_mlp_modules=False).target_modules == {
        f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"
    }
    assert made(finetune_last_n_layers=1).layers_to_transform == [1]
    assert made(finetune_last_n_layers=1, finetune_mlp_modules=False).target_modules == {
        f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"
    }
    assert made(layers_to_transform=0, target_modules="all-linear").target_modules == {
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
        *(f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert made(target_modules="all-linear", bias="lora_only", rank_pattern={"up_proj": 4}).rank_pattern == {"up_proj": 4}


def test_the_last_layers_of_a_model_with_other_names(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=64, n_layer=3, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    tokenizer_of().save_pretrained(tmp_path)
    model = fast().get_peft_model(loaded(tmp_path)[0], finetune_last_n_layers=2)
    adapted = {n.partition(".lora_A")[0].removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted == {
        f"transformer.h.{i}.{leaf}" for i in (1, 2) for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(
    "given, error, told",
    [
        ({"lora_alfa": 8}, TypeError, "lora_alfa. Did you mean lora_alpha"),
        ({"target_modules": ["q_proj", "w_proj"]}, ValueError, "names w_proj, and LlamaForCausalLM has none. Did you mean"),
        ({"r": 0}, ValueError, "no rank"),
        ({"use_gradient_checkpointing": "unslot"}, ValueError, "Did you mean unsloth"),
        ({"use_gradient_checkpointing": 1}, ValueError, "one of False, True"),
        ({"qat_scheme": "int4"}, ValueError, "cannot be honoured"),
        ({"finetune_language_layers": False}, ValueError, "nothing to train"),
        ({"finetune_last_n_layers": 3}, ValueError, "the model has 2 layers"),
        ({"finetune_attention_modules": False, "finetune_mlp_modules": False}, ValueError, "no linear layers are left"),
        ({"loftq_config": {"loftq_bits": 4}}, ValueError, "quantised already"),
    ],
)
def test_what_adapters_cannot_be_is_told(four: Any, given: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        fast().get_peft_model(four, **given)


@pytest.fixture(scope="module")
def four(folder: Path) -> Any:
    return loaded(folder, load_in_4bit=True)[0]


def test_adapters_twice_are_refused(folder: Path) -> None:
    model = fast().get_peft_model(loaded(folder)[0])
    with pytest.raises(ValueError, match="has adapters already"):
        fast().get_peft_model(model)
    with pytest.raises(TypeError, match="model is a Linear"):
        fast().get_peft_model(torch.nn.Linear(2, 2))


def test_adapters_load_again_in_plain_peft_and_train_on(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model, tokenizer = loaded(folder)
    model = fast().get_peft_model(model, init_lora_weights=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)  # by which PEFT knows that the embedding has grown
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    on, _ = fast().from_pretrained(str(tmp_path), max_seq_length=64, load_in_4bit=False)
    assert on.training and any(p.requires_grad for p in on.parameters()) and on._compiled_call_impl is not None
    ids = batch_of(tokenizer)
    with torch.no_grad():
        expected = plain(model)(**ids).logits
        torch.testing.assert_close(again.eval()(**ids).logits, expected)
        torch.testing.assert_close(plain(on)(**ids).logits, expected)


def test_adapters_in_a_cache_and_a_folder_within(folder: Path, tmp_path: Path) -> None:
    """As from the hub, which is not asked: adapters in a folder within, their base and no tokenizer beside."""
    model, tokenizer = loaded(folder)
    model = fast().get_peft_model(model, r=4, init_lora_weights=False)
    held = tmp_path / "models--me--adapters"
    model.save_pretrained(held / "snapshots" / "123" / "within")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("123")
    with torch.no_grad():
        expected = plain(model)(**batch_of(tokenizer)).logits
    for name, more in {
        "me/adapters": {"cache_dir": str(tmp_path), "local_files_only": True}, str(held / "snapshots" / "123"): {},
    }.items():  # fmt: skip
        on, words = loaded(name, subfolder="within", **more)
        assert words.get_vocab() == tokenizer.get_vocab() and on.peft_config["default"].r == 4
        with torch.no_grad():
            torch.testing.assert_close(plain(on)(**batch_of(words)).logits, expected)
    with pytest.raises(OSError):
        loaded("me/adapters", subfolder="elsewhere", **{"cache_dir": str(tmp_path), "local_files_only": True})


def test_models_are_copied_and_pickled(folder: Path) -> None:
    model = fast().get_peft_model(loaded(folder)[0], use_gradient_checkpointing=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.save_pretrained_merged.args[0] is other


# ---------------------------------------------------------------- compiled


def test_lengths_are_symbols_from_the_first_step_of_any_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No trainer; generation between steps; losses of the model without a compiler."""
    from sloth.rewriter.backend import listening
    from sloth.rewriter.compile import inductor

    monkeypatch.setattr(inductor, "_inductor", lambda _, *graph: lookup_backend("aot_eager")(*graph))
    torch._dynamo.reset()
    counters.clear()
    model, tokenizer = loaded(checkpoint(tmp_path / "one", num_hidden_layers=1))
    model = fast().get_peft_model(model, target_modules=["q_proj"], init_lora_weights=False, use_gradient_checkpointing=False)
    eager = plain(copy.deepcopy(model)).train()
    with listening() as reports:
        for words in (7, 12, 9):
            batch = batch_of(tokenizer, words)
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            torch.testing.assert_close(loss, eager(**batch, labels=batch["input_ids"]).loss, rtol=1e-4, atol=1e-5)
            model.generate(**batch_of(tokenizer, 3), max_new_tokens=2, do_sample=False)
    assert len(reports) == 1 and not counters["graph_break"], [r.line({}) for r in reports]
    assert sum(s.status == "matched" for s in reports[0].sites) > 4


# ---------------------------------------------------------------- tokens


def test_a_pad_token_that_no_text_uses() -> None:
    from sloth.models.tokens import give_pad_token

    def chosen(rows: int, **how: Any) -> tuple[str, bool]:
        return give_pad_token(tokenizer_of(**how), rows)

    assert chosen(300, special=["<|end|>", "<|pad_me|>"]) == ("<|pad_me|>", False)
    assert chosen(300, special=["<|end|>", "<|reserved_7|>"]) == ("<|reserved_7|>", False)
    size = len(tokenizer_of())
    assert chosen(size + 1) == ("<|pad|>", False)  # a row to spare
    assert chosen(size) == ("<|pad|>", True)
    assert chosen(size, pad="<|end|>") == ("<|end|>", False)  # better than a table that grows
    assert chosen(size + 1, pad="<|end|>") == ("<|pad|>", False)
    assert chosen(size, special=["<|end|>", "<own>"], pad="<own>") == ("<own>", False)
    assert chosen(size, byte_fallback=True, special=["<|end|>", "<unk>"], unknown="<unk>") == ("<unk>", False)


def test_an_embedding_grows_only_if_it_must(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = loaded(folder)
    table = model.get_input_embeddings().weight
    assert len(table) == len(tokenizer) == LLAMA["vocab_size"] + 1 and tokenizer.pad_token_id == len(table) - 1
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == tokenizer.pad_token
    unfixed, bare = loaded(folder, fix_tokenizer=False)
    assert bare.pad_token is None and len(unfixed.get_input_embeddings().weight) == LLAMA["vocab_size"]
    wide, _ = loaded(folder, resize_model_vocab=512)
    assert len(wide.get_input_embeddings().weight) == wide.config.vocab_size == 512


# ---------------------------------------------------------------- contexts


def test_a_longer_context_scales_rope(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sloth.rewriter.notices._said", set())
    caplog.set_level("INFO", "sloth")
    short, _ = loaded(folder)
    assert "RoPE" not in caplog.text
    long, tokenizer = loaded(folder, max_seq_length=512)
    assert caplog.text.count("its RoPE is scaled (linear, factor 4)") == 1
    assert long.config.max_position_embeddings == tokenizer.model_max_length == 512
    torch.testing.assert_close(long.model.rotary_emb.inv_freq, short.model.rotary_emb.inv_freq / 4)
    own, _ = loaded(folder, max_seq_length=512, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert own.config.rope_parameters["rope_type"] == "yarn" and own.model.rotary_emb.attention_scaling > 1


def test_kinds_of_rope() -> None:
    from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig

    from sloth.models.context import lengthen

    def scaled(config: Any, length: int) -> Any:
        assert lengthen(config, length)
        return config.rope_parameters

    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 64
    found = scaled(LlamaConfig(**LLAMA, rope_parameters={**llama3, "rope_theta": 5e5}), 256)
    assert found["rope_type"] == "llama3" and found["factor"] == 16.0 and found["original_max_position_embeddings"] == 64
    for kind in ("linear", "dynamic", "yarn"):
        held = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}
        found = scaled(LlamaConfig(**LLAMA, rope_parameters=held), 512)
        assert (found["rope_type"], found["factor"]) == (kind, 8.0)
    gemma = Gemma3TextConfig(max_position_embeddings=128)
    before = copy.deepcopy(gemma.rope_parameters["sliding_attention"])
    found = scaled(gemma, 256)
    assert found["full_attention"]["factor"] == 2.0 and found["sliding_attention"] == before
    with pytest.raises(ValueError, match="learned positions for 1024 tokens"):
        lengthen(GPT2Config(), 2048)
    half = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="type longrope, whose factors hold for 128"):
        lengthen(LlamaConfig(**LLAMA, rope_parameters=half), 512)
    assert lengthen(BloomConfig(), 1 << 20) is None and lengthen(GPT2Config(), 512) is None


def test_what_says_the_same_thing_twice_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="leave finetune_attention_modules"):
        fast().get_peft_model(loaded(folder)[0], target_modules=["q_proj"], finetune_mlp_modules=False)
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="quantization_config says how"):
        loaded(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), load_in_4bit=True)
