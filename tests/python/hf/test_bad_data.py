"""Damaged and lying checkpoints: a named error on every version, never a model of leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import bitfold
from bitfold.errors import PackedDataError

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    model = bitfold.quantize(tiny_models.make("llama-tied"), "nf4", progress=False)
    model.save_pretrained(directory)
    return directory


class Copy:
    """A folded checkpoint to damage."""

    def __init__(self, source: Path, target: Path) -> None:
        self.directory = target
        self.tensors = load_file(source / "model.safetensors")
        self.config = json.loads((source / "config.json").read_text())
        self.modules = self.config["quantization_config"]["modules"]

    def write(self) -> Path:
        save_file(self.tensors, self.directory / "model.safetensors", metadata={"format": "pt"})
        (self.directory / "config.json").write_text(json.dumps(self.config))
        return self.directory


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Copy:
    return Copy(whole, tmp_path)


LOADERS: dict[str, Any] = {
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "load": bitfold.load,
}


@pytest.fixture(params=LOADERS)
def load(request: pytest.FixtureRequest) -> Any:
    return LOADERS[request.param]


def test_the_copy_itself_loads(damaged, load):
    load(damaged.write())


@pytest.mark.parametrize("suffix", ["", "_scale", "_scale_absmax", "_scale_offset"])
def test_missing_packed_tensor(suffix, damaged, load):
    del damaged.tensors[f"{LAYER}.weight{suffix}"]
    with pytest.raises(PackedDataError, match=rf"{LAYER}\.weight{suffix}"):
        load(damaged.write())


def test_missing_embedding_of_a_tied_model(damaged, load):
    for key in [key for key in damaged.tensors if key.startswith("model.embed_tokens.")]:
        del damaged.tensors[key]
    with pytest.raises(PackedDataError, match=r"model\.embed_tokens\.weight"):
        load(damaged.write())


def test_missing_float_tensor(damaged, load):
    del damaged.tensors["model.norm.weight"]
    with pytest.raises(PackedDataError, match=r"model\.norm\.weight"):
        load(damaged.write())


def test_missing_packed_tensor_when_loaded_into_the_base_class(damaged):
    del damaged.tensors[f"{LAYER}.weight_scale"]
    with pytest.raises(PackedDataError, match=r"up_proj\.weight_scale"):
        AutoModel.from_pretrained(damaged.write())


@pytest.mark.parametrize("suffix", ["", "_scale", "_scale_absmax"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: torch.cat([t.flatten(), t.flatten()]),
        lambda t: t.reshape(1, -1),
        lambda t: t[:0],
    ],
    ids=["short", "long", "reshaped", "empty"],
)
def test_wrong_shape(change, suffix, damaged, load):
    key = f"{LAYER}.weight{suffix}"
    damaged.tensors[key] = change(damaged.tensors[key]).contiguous()
    with pytest.raises(PackedDataError, match="up_proj"):
        load(damaged.write())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bfloat16])
def test_wrong_dtype(dtype, damaged, load):
    key = f"{LAYER}.weight"
    damaged.tensors[key] = damaged.tensors[key].to(dtype)
    with pytest.raises(PackedDataError, match="up_proj"):
        load(damaged.write())


def test_truncated_file(damaged):
    file = damaged.write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PackedDataError, match=r"model\.safetensors"):
        bitfold.load(damaged.directory)
    with pytest.raises(Exception, match=r"."):  # transformers may meet it first, with safetensors' own error
        AutoModelForCausalLM.from_pretrained(damaged.directory)


def test_missing_shard(tmp_path):
    model = bitfold.quantize(tiny_models.make("llama"), "nf4", progress=False)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(PackedDataError, match=shard.name):
        bitfold.load(tmp_path)
    with pytest.raises(Exception, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def _shape(copy: Copy) -> None:
    copy.modules[LAYER]["shape"] = [96, 32]


def _format(copy: Copy) -> None:
    copy.modules[LAYER]["format"] = "int8-row"


def _unknown_format(copy: Copy) -> None:
    copy.modules[LAYER]["format"] = "nf5"


def _kind(copy: Copy) -> None:
    copy.modules[LAYER]["kind"] = "embedding"


def _no_such_module(copy: Copy) -> None:
    copy.modules["model.layers.7.mlp.up_proj"] = copy.modules[LAYER]


def _not_named(copy: Copy) -> None:
    del copy.modules[LAYER]


def _newer(copy: Copy) -> None:
    copy.config["quantization_config"]["format_version"] = 99


def _no_shape(copy: Copy) -> None:
    del copy.modules[LAYER]["shape"]


def _hidden_size(copy: Copy) -> None:
    copy.config["intermediate_size"] = 128


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (_shape, "up_proj"),
        (_format, "up_proj"),
        (_unknown_format, "nf5"),
        (_kind, "up_proj"),
        (_no_such_module, "layers.7"),
        (_not_named, "up_proj|mismatch"),
        (_newer, "99"),
        (_no_shape, "up_proj"),
        (_hidden_size, "proj"),
    ],
)
def test_config_that_lies(lie, named, damaged, load):
    lie(damaged)
    with pytest.raises((RuntimeError, ValueError), match=named):
        load(damaged.write())


def test_config_of_another_architecture(damaged):
    from transformers import AutoModelForMaskedLM, BertConfig

    damaged.config = {
        **BertConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
        ).to_dict(),
        "quantization_config": damaged.config["quantization_config"],
    }
    with pytest.raises(PackedDataError, match="BertForMaskedLM"):
        AutoModelForMaskedLM.from_pretrained(damaged.write())


def test_config_lists_a_module_twice_over_no_files(damaged):
    damaged.tensors = {"model.norm.weight": damaged.tensors["model.norm.weight"]}
    with pytest.raises(PackedDataError, match="not in the checkpoint"):
        bitfold.load(damaged.write())
