"""Folding a checkpoint on disk gives the bytes that folding the model in memory and saving it gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, make

import bitfold
from bitfold.errors import CoverageError, FormatError, PackedDataError, WeightError
from bitfold.hf.meta_model import model_class
from bitfold.hf.streaming import fold_directory, plan_directory
from bitfold.io.shards import Checkpoint


def everything(directory: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def stream(source: Path, out: Path, format: str = "nf4", **options: Any) -> Path:
    plan = plan_directory(source, format, **options)
    assert fold_directory(plan, out) == plan.weights_bytes
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == plan.weights_bytes
    return out


def in_memory(source: Path, out: Path, format: str = "nf4", **options: Any) -> Path:
    max_shard_size = options.pop("max_shard_size", "5GB")
    cls = model_class(source)
    model = cls.from_pretrained(source, dtype="auto")
    bitfold.quantize(model, format, progress=False, **options)
    model.save_pretrained(out, max_shard_size=max_shard_size)
    return out


def assert_same(streamed: Path, saved: Path) -> None:
    ours, theirs = everything(streamed), everything(saved)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        raw = [x.reshape(-1).view(torch.uint8) for x in (tensor, other)]
        assert torch.equal(*raw), name
    configs = [json.loads((directory / "config.json").read_text()) for directory in (streamed, saved)]
    assert configs[0] == configs[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make("bert-masked").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bytes_as_in_memory(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make(name, dtype).save_pretrained(tmp_path / "source")
    out = stream(tmp_path / "source", tmp_path / "streamed")
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved"))


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
@pytest.mark.parametrize(
    "format", ["int8-row", "int4-g64-sym", "int3-g64", "int2-g64", "nf4-nodq", "kmeans4-row"]
)
def test_every_kind_of_format(tmp_path: Path, name: str, format: str) -> None:
    make(name).save_pretrained(tmp_path / "source")
    out = stream(tmp_path / "source", tmp_path / "streamed", format)
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved", format))


def test_options(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {
        "embeddings": None,
        "skip": ["lm_head"],
        "rules": {r".*down_proj": "int8-g64", r".*layers\.0\.self_attn\.q_proj": None},
        "method": "round",
    }
    out = stream(tmp_path / "source", tmp_path / "streamed", "int4-g64", **options)
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved", "int4-g64", **options))
    tensors = everything(out)
    assert tensors["lm_head.weight"].dtype == torch.float32
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype == torch.int8


def test_tied_weights_left_in_float_are_stored_once(tmp_path: Path) -> None:
    make("llama-tied").save_pretrained(tmp_path / "source")
    out = stream(tmp_path / "source", tmp_path / "streamed", embeddings=None)
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved", embeddings=None))


def test_shards_in_shards_out(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    out = stream(tmp_path / "source", tmp_path / "streamed", max_shard_size="20KB")
    saved = in_memory(tmp_path / "source", tmp_path / "saved", max_shard_size="20KB")
    assert_same(out, saved)
    names = [sorted(file.name for file in directory.glob("*.safetensors")) for directory in (out, saved)]
    assert names[0] == names[1]
    assert len(names[0]) == 3
    indices = [json.loads((d / "model.safetensors.index.json").read_text()) for d in (out, saved)]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
    model = bitfold.load(out)
    assert bitfold.summary(model).formats


def test_result_loads_and_runs_like_the_folded_model(tmp_path: Path, source: Path) -> None:
    from tiny_models import logits

    out = stream(source, tmp_path / "out")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(out)
    folded = bitfold.quantize(
        transformers.AutoModelForMaskedLM.from_pretrained(source), "nf4", progress=False
    )
    assert torch.equal(logits(loaded, "bert-masked"), logits(folded, "bert-masked"))


# Names in the file that are not those of the model


def rename(directory: Path, function: Any) -> None:
    path = directory / "model.safetensors"
    save_file({function(name): x for name, x in load_file(path).items()}, path, metadata={"format": "pt"})


def test_legacy_names_of_layer_norms(tmp_path: Path, source: Path) -> None:
    rename(
        source,
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ),
    )
    out = stream(source, tmp_path / "streamed")
    assert_same(out, in_memory(source, tmp_path / "saved"))
    assert bitfold.load(out) is not None


def test_base_model_without_its_prefix(tmp_path: Path) -> None:
    """Saved as LlamaModel, and opened as the LlamaForCausalLM that its config names; the head is tied."""
    model = make("llama-tied")
    model.save_pretrained(tmp_path / "source")
    rename(tmp_path / "source", lambda name: name.removeprefix("model."))
    out = stream(tmp_path / "source", tmp_path / "streamed")
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved"))


def test_head_that_the_class_has_no_place_for(tmp_path: Path) -> None:
    make("bert-masked").save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    with pytest.raises(PackedDataError, match=r"no tensor for pooler\.dense.bias, pooler\.dense.weight"):
        plan_directory(tmp_path / "source", "nf4")


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    make("llama-tied").save_pretrained(tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    out = stream(tmp_path / "source", tmp_path / "streamed")
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved"))

    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    plan = plan_directory(tmp_path / "source", "nf4")
    with pytest.raises(PackedDataError, match="stores two different matrices"):
        fold_directory(plan, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_only_the_head_of_a_tied_pair_is_stored(tmp_path: Path) -> None:
    make("llama-tied").save_pretrained(tmp_path / "source")
    rename(tmp_path / "source", lambda n: "lm_head.weight" if n == "model.embed_tokens.weight" else n)
    out = stream(tmp_path / "source", tmp_path / "streamed")
    assert "model.embed_tokens.weight" in everything(out)


def mixtral(directory: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(directory)


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has no fused experts"
)
def test_experts_that_loading_merges(tmp_path: Path) -> None:
    """The file has one matrix per expert, the model one tensor of three dimensions: named, or left as
    asked."""
    mixtral(tmp_path / "source")
    assert any(".experts.0." in name for name in everything(tmp_path / "source"))
    with pytest.raises(CoverageError, match="experts"):
        plan_directory(tmp_path / "source", "nf4")
    skip = [r".*experts.*"]
    out = stream(tmp_path / "source", tmp_path / "streamed", skip=skip)
    assert_same(out, in_memory(tmp_path / "source", tmp_path / "saved", skip=skip))


def test_dtype_of_the_config_counts(tmp_path: Path, source: Path) -> None:
    """from_pretrained casts to the config's dtype before anything is folded."""
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    out = stream(source, tmp_path / "streamed")
    assert_same(out, in_memory(source, tmp_path / "saved"))
    assert everything(out)["bert.embeddings.LayerNorm.weight"].dtype == torch.bfloat16


# What travels along


def test_other_files_travel_and_weights_do_not(tmp_path: Path, source: Path) -> None:
    for name in ("tokenizer.json", "modeling_x.py", "README.md", "generation_config.json", "spiece.model"):
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "tf_model.h5", "model.onnx", ".hidden"):
        (source / name).write_text("x")
    (source / "1_Dense").mkdir()
    (source / "1_Dense" / "model.safetensors").write_text("small")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_text("large")
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Dense"}]))
    out = stream(source, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "1_Dense", "README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_x.py",
        "modules.json", "spiece.model", "tokenizer.json",
    ]  # fmt: skip
    assert (out / "1_Dense" / "model.safetensors").read_text() == "small"


def test_config_names_the_model(tmp_path: Path, source: Path) -> None:
    config = json.loads((stream(source, tmp_path / "out") / "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["quantization_config"]["quant_method"] == "bitfold"


# Bad input: named, and nothing is left behind


def damage(directory: Path, name: str, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named_and_nothing_is_left(tmp_path: Path, source: Path, name: str, value: float) -> None:
    damage(source, name, lambda x: x.index_fill(0, torch.tensor([1]), value))
    plan = plan_directory(source, "nf4")
    with pytest.raises(WeightError, match=name):
        fold_directory(plan, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_config_that_lies_about_shapes(tmp_path: Path, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    words = (
        r"'bert.encoder.layer.0.intermediate.dense.bias' has shape \[96\], expected \[128\] from config.json"
    )
    with pytest.raises(PackedDataError, match=words):
        plan_directory(source, "nf4")


def test_tensor_missing_from_the_checkpoint(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PackedDataError, match=r"no tensor for bert.encoder.layer.1.output\.dense.weight"):
        plan_directory(source, "nf4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": None}, "no model_type"),
        ({"model_type": "nonsense"}, "no model can be built"),
        ({"architectures": ["NonsenseModel"]}, "has no class NonsenseModel"),
        ({"hidden_size": "many"}, "no model can be built"),
        ({"num_attention_heads": 7}, "no model can be built"),
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "trust_remote_code"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
    ],
)
def test_impossible_configs(source: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedDataError, match=words):
        plan_directory(source, "nf4")


def test_config_missing_or_not_json(source: Path) -> None:
    (source / "config.json").write_text("{")
    with pytest.raises(PackedDataError, match="not valid JSON"):
        plan_directory(source, "nf4")
    (source / "config.json").unlink()
    with pytest.raises(PackedDataError, match=r"config.json: missing"):
        plan_directory(source, "nf4")


def test_folded_source_is_refused(tmp_path: Path, source: Path) -> None:
    out = stream(source, tmp_path / "out")
    with pytest.raises(PackedDataError, match=r"already quantized \(bitfold\)"):
        plan_directory(out, "nf4")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"format": "nf5"}, FormatError),
        ({"embeddings": "int9"}, FormatError),
        ({"rules": {"x": "bogus"}}, FormatError),
        ({"skip": ["no_such_module"]}, ValueError),
        ({"method": "guess"}, ValueError),
        ({"max_shard_size": "huge"}, ValueError),
    ],
)
def test_wrong_options(source: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        plan_directory(source, **{"format": "nf4", **options})


# Where it is written


def test_output_that_may_not_be_replaced(tmp_path: Path, source: Path) -> None:
    plan = plan_directory(source, "nf4")
    fold_directory(plan, tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        fold_directory(plan, tmp_path / "out")
    fold_directory(plan_directory(source, "int8-row"), tmp_path / "out", overwrite=True)
    manifest = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {entry.get("format") for entry in manifest["modules"].values()} == {"int8-row", "int8-g64", None}

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photo.jpg").write_text("precious")
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        fold_directory(plan, tmp_path / "home", overwrite=True)
    for bad in (source, tmp_path):
        with pytest.raises(FileExistsError, match="the source"):
            fold_directory(plan, bad, overwrite=True)
    assert (source / "model.safetensors").exists()


def test_disk_space_is_checked_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="10 bytes free"):
        fold_directory(plan_directory(source, "nf4"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TowerConfig(PretrainedConfig):
    model_type = "tower"
    def __init__(self, width=64, **kwargs):
        self.width = width
        super().__init__(**kwargs)

class TowerModel(PreTrainedModel):
    config_class = TowerConfig
    main_input_name = "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.first = torch.nn.Linear(config.width, config.width)
        self.second = torch.nn.Linear(config.width, 8)
        self.post_init()
    def _init_weights(self, module):
        pass
    def forward(self, pixel_values):
        return self.second(self.first(pixel_values))
"""


def test_code_that_comes_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "tower.py").write_text(CODE)
    config = {
        "model_type": "tower",
        "architectures": ["TowerModel"],
        "width": 64,
        "dtype": "float32",
        "auto_map": {"AutoConfig": "tower.TowerConfig", "AutoModel": "tower.TowerModel"},
    }
    (source / "config.json").write_text(json.dumps(config))
    tensors = {"first.weight": torch.randn(64, 64), "first.bias": torch.zeros(64)}
    tensors |= {"second.weight": torch.randn(8, 64), "second.bias": torch.zeros(8)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(PackedDataError, match="trust_remote_code"):
        plan_directory(source, "nf4")
    out = stream(source, tmp_path / "out", "int8-row", trust_remote_code=True)
    assert (out / "tower.py").read_text() == CODE
    assert json.loads((out / "config.json").read_text())["auto_map"] == config["auto_map"]
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, tensors["first.weight"]) @ tensors["second.weight"].t()
    assert torch.nn.functional.cosine_similarity(model(x), expected, dim=-1).min() > 0.999


def test_methods_that_need_data_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="'gptq' needs calibration data, which runs through the whole model"):
        plan_directory(tmp_path, "int4-g64", method="gptq")
