"""Saving: what is written is what was in memory, rounded once; it loads in plain transformers; and an earlier save is safe."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import batch_of, checkpoint, loaded
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("saving") / "base")


def adapted(folder: Path, four: bool = False, eight: bool = False, **given: Any) -> tuple[Any, Any]:
    from sloth import FastLanguageModel

    model, tokenizer = loaded(folder, load_in_4bit=four, load_in_8bit=eight)
    torch.manual_seed(1)
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "init_lora_weights": False} | given)
    model._compiled_call_impl = None
    return model.eval(), tokenizer


def plain(folder: Path, dtype: Any = "auto") -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> Tensor:
    return model(**batch_of(tokenizer)).logits.float()


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    "how, given",
    [
        ({}, {}),
        ({"four": True}, {}),
        ({"eight": True}, {}),
        ({}, {"use_dora": True, "use_rslora": True, "lora_alpha": 7}),
        ({"four": True}, {"use_dora": True}),
        ({"four": True}, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ({}, {"target_modules": ["down_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}}),
    ],
)
def test_merged_is_loaded_by_transformers_with_the_same_logits(
    folder: Path, tmp_path: Path, how: dict[str, Any], given: dict[str, Any]
) -> None:
    model, tokenizer = adapted(folder, **how, **given)
    before = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    expected = logits(model, tokenizer)
    model.save_pretrained_merged(tmp_path / "exact", tokenizer, dtype=torch.float32)
    apart = 0.02 if "eight" in how else 1e-4  # bitsandbytes quantises what an 8 bit layer reads
    torch.testing.assert_close(logits(plain(tmp_path / "exact"), tokenizer), expected, rtol=0, atol=apart * expected.abs().max())
    model.save_pretrained_merged(str(tmp_path / "merged"), tokenizer)
    exact, rounded = (load_file(tmp_path / f / "model.safetensors") for f in ("exact", "merged"))
    assert exact.keys() == rounded.keys() and not any("lora" in name or "base_layer" in name for name in rounded)
    for name, t in exact.items():
        assert rounded[name].dtype == torch.bfloat16 and torch.equal(rounded[name], t.to(torch.bfloat16)), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config and config["use_cache"]
    assert plain(tmp_path / "merged").dtype == torch.bfloat16
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if isinstance(t, Tensor))


def test_the_sum_is_made_in_fp32(folder: Path, tmp_path: Path) -> None:
    """The formula by hand, for NF4 and adapters that a trainer has cast to bf16."""
    from bitsandbytes.functional import dequantize_4bit

    model, _ = adapted(folder, four=True, lora_alpha=12)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a.data, b.data = a.data.bfloat16(), b.data.bfloat16()
    model.save_pretrained_merged(tmp_path)
    base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
    expected = (base.double() + 3.0 * b.double() @ a.double()).float()
    found = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    apart = (found.view(torch.int16) - expected.bfloat16().view(torch.int16)).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3  # fp32 beside fp64, at the middle between two bf16


def test_tied_weights_stay_tied_unless_one_is_adapted(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", tie_word_embeddings=True)
    for given, tied in (({}, True), ({"target_modules": ["q_proj", "embed_tokens"]}, False)):
        model, tokenizer = adapted(base, **given)
        model.save_pretrained_merged(tmp_path / "merged", tokenizer, dtype=torch.float32)
        again = plain(tmp_path / "merged")
        assert ("lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")) == tied
        assert again.config.tie_word_embeddings == tied
        torch.testing.assert_close(logits(again, tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)


def test_biases_and_other_families(tmp_path: Path) -> None:
    """Qwen2 has biases; Mixtral's experts are one tensor in memory and many in a checkpoint."""
    from tiny_checkpoint import LLAMA, tokenizer_of
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

    tokenizer = tokenizer_of()
    more = {"num_local_experts": 2, "num_experts_per_tok": 1}
    for name, config in (("qwen2", Qwen2Config(**LLAMA)), ("mixtral", MixtralConfig(**LLAMA, **more))):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
        torch.nn.init.normal_(made.model.layers[0].self_attn.q_proj.bias) if name == "qwen2" else None
        made.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model, own = adapted(tmp_path / name, target_modules=["q_proj", "o_proj"])
        model.save_pretrained_merged(tmp_path / "merged", own, dtype=torch.float32)
        torch.testing.assert_close(logits(plain(tmp_path / "merged"), own), logits(model, own), rtol=1e-4, atol=1e-4)
        names = load_file(tmp_path / "merged" / "model.safetensors").keys()
        assert names == load_file(tmp_path / name / "model.safetensors").keys()


def test_a_model_without_adapters_and_one_that_a_trainer_adapted(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded(folder, load_in_4bit=True)
    model._compiled_call_impl = None
    model.save_pretrained_merged(tmp_path / "plain", tokenizer, dtype=torch.float32)
    torch.testing.assert_close(
        logits(plain(tmp_path / "plain"), tokenizer), logits(model.eval(), tokenizer), rtol=1e-4, atol=1e-4
    )
    wrapped = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    wrapped.save_pretrained_merged(tmp_path / "plain", tokenizer, dtype=torch.float32)  # the method of the model within
    torch.testing.assert_close(
        logits(plain(tmp_path / "plain"), tokenizer), logits(wrapped.eval(), tokenizer), rtol=1e-4, atol=1e-4
    )


def test_merged_to_four_bits(folder: Path, tmp_path: Path) -> None:
    """What is loaded is the merged model in 16 bits, quantised; from 16 bits as from 4."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for four in (True, False):
        model, tokenizer = adapted(folder, four=four)
        model.save_pretrained_merged(tmp_path / "16", tokenizer)
        model.save_pretrained_merged(tmp_path / "4", tokenizer, save_method="merged_4bit")
        again = plain(tmp_path / "4", torch.float32)
        quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "16", quantization_config=nf4, dtype=torch.float32).eval()
        for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"):
            assert torch.equal(again.get_submodule(name).weight, quantised.get_submodule(name).weight)
        assert logits(again, tokenizer).isfinite().all() and not (tmp_path / "4" / "whole").exists()


def test_shards(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = adapted(folder)
    model.save_pretrained_merged(tmp_path, tokenizer, max_shard_size="40KB", dtype=torch.float32)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    torch.testing.assert_close(logits(plain(tmp_path), tokenizer), logits(model, tokenizer), rtol=1e-4, atol=1e-4)
    model.save_pretrained_merged(tmp_path, tokenizer)
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()


def test_adapters_alone(folder: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model, tokenizer = adapted(folder)
    model.save_pretrained_merged(tmp_path, tokenizer, save_method="lora")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again, tokenizer), logits(model, tokenizer))
    with pytest.raises(ValueError, match="this model has none"):
        loaded(folder)[0].save_pretrained_merged(tmp_path / "x", save_method="lora")
    with pytest.raises(ValueError, match="one of merged_16bit, merged_4bit, lora"):
        model.save_pretrained_merged(tmp_path / "x", save_method="merged")
    with pytest.raises(ValueError, match=r"push_to_hub_merged\(repo_id"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, push_to_hub=True)
    with pytest.raises(TypeError, match=r"knows no argument shard_size\. Did you mean max_shard_size"):
        model.save_pretrained_merged(tmp_path / "x", tokenizer, shard_size="1GB")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- what was there before


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_interrupted_save_leaves_the_old_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth.saving import merged

    model, tokenizer = adapted(folder)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    before = contents(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merged, "_write_shards", interrupted)
        for target in ("out", "new/deep"):
            with pytest.raises(KeyboardInterrupt):
                model.save_pretrained_merged(tmp_path / target, tokenizer)
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_before_anything_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = adapted(folder)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    before = contents(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 60 << 20))
    for method in ("merged_16bit", "merged_4bit", "lora"):
        with pytest.raises(OSError, match=r"0\.07 GB are needed and 0\.06 GB are free; nothing was written") as told:
            model.save_pretrained_merged(tmp_path / ("new" if method == "lora" else "out"), tokenizer, save_method=method)
        assert told.value.errno == errno.ENOSPC
    assert contents(tmp_path) == before


def test_other_files_of_the_folder_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And adapters that lay there do not: transformers would put them onto the merged model."""
    model, tokenizer = adapted(folder)
    for where in ("aside", "within"):  # a folder that the process works in cannot change places
        out = tmp_path / where
        model.save_pretrained_merged(out, tokenizer, save_method="lora")
        (out / "checkpoint-8").mkdir()
        (out / "checkpoint-8" / "model.safetensors").write_text("of a trainer")
        (out / "notes.txt").write_text("mine")
        if where == "within":
            monkeypatch.chdir(out)
        model.save_pretrained_merged(out, tokenizer)
        assert (out / "notes.txt").read_text() == "mine" and not (out / "adapter_config.json").exists()
        assert (out / "checkpoint-8" / "model.safetensors").read_text() == "of a trainer"
        torch.testing.assert_close(logits(plain(out), tokenizer), logits(model, tokenizer), rtol=0, atol=0.1)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_file_is_no_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        adapted(folder)[0].save_pretrained_merged(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


KILLED = """
import sys, time
from pathlib import Path
from sloth.saving.folder import replaced

with replaced(Path(sys.argv[1]), 1) as staging:
    (staging / "model.safetensors").write_text("new")
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_killed_save_leaves_the_old_files_and_is_swept(tmp_path: Path) -> None:
    from sloth.saving.folder import replaced

    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (out / "model.safetensors").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with replaced(out, 1) as staging:
        (staging / "model.safetensors").write_text("newer")
    assert (out / "model.safetensors").read_text() == "newer" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth.saving import folder as folders

    monkeypatch.setattr(folders, "_exchanged_at_once", lambda *_: False)
    out = tmp_path / "out"
    for content in ("one", "two"):
        with folders.replaced(out, 1) as staging:
            (staging / "config.json").write_text(content)
    assert (out / "config.json").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_killed_between_two_renames_comes_back(tmp_path: Path) -> None:
    from sloth.saving import folder as folders

    aside, new = tmp_path / ".out.saving-99999999-x-old", tmp_path / ".out.saving-99999999-x"
    for place, content in ((aside, "old"), (new, "new")):
        place.mkdir()
        (place / "notes.txt").write_text(content)
    with pytest.raises(KeyboardInterrupt), folders.replaced(tmp_path / "out", 1):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "notes.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mounted_disk_is_written_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sloth.saving import folder as folders

    out = tmp_path / "out"
    out.mkdir()
    (out / "model.gguf").write_text("of somebody")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with folders.replaced(out, 1) as staging:
        assert staging.parent == out
        (staging / "config.json").write_text("new")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.gguf"]


def test_adapters_do_not_take_the_place_of_a_whole_model(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match="holds a whole model"):
        adapted(folder)[0].save_pretrained_merged(folder, save_method="lora")
    assert contents(folder) == before


def test_a_part_of_a_model_is_not_saved_as_the_whole(folder: Path, tmp_path: Path) -> None:
    model, _ = adapted(folder)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="divided among processes"):
        model.save_pretrained_merged(tmp_path / "out")
    assert not (tmp_path / "out").exists()
