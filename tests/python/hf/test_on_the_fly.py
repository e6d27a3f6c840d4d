"""Folding while transformers loads: from_pretrained(…, quantization_config=BitfoldConfig(…))."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

import bitfold
from bitfold.errors import CoverageError, FormatError
from bitfold.nn import QuantConv1D, QuantEmbedding, QuantLinear, TiedHead


@pytest.fixture
def float_directory(tmp_path: Path):
    def save(name: str, dtype: torch.dtype = torch.float32) -> Path:
        tiny_models.make(name, dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def load(directory: Path, name: str, **options):
    auto = getattr(transformers, tiny_models.MODELS[name].auto_class)
    return auto.from_pretrained(directory, dtype="auto", **options)


@pytest.mark.parametrize("name", tiny_models.MODELS)
def test_gives_the_model_that_quantize_gives(name, float_directory, tmp_path):
    directory = float_directory(name)
    model = load(directory, name, quantization_config=bitfold.BitfoldConfig("nf4"))
    expected = bitfold.quantize(load(directory, name), "nf4", progress=False)
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert model.config.quantization_config.to_dict() == expected.config.quantization_config

    model.save_pretrained(tmp_path / "folded")
    again = load(tmp_path / "folded", name)
    assert torch.equal(tiny_models.logits(again, name), tiny_models.logits(model, name))


def test_options_reach_quantize(float_directory):
    recipe = bitfold.BitfoldConfig(
        "nf4",
        embeddings=None,
        skip=["lm_head"],
        rules={r".*\.down_proj": "int8-row", r".*\.o_proj": None},
        method="round",
    )
    model = load(float_directory("llama"), "llama", quantization_config=recipe)
    layer = model.model.layers[0]
    assert type(model.lm_head) is torch.nn.Linear
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert type(layer.self_attn.o_proj) is torch.nn.Linear
    assert str(layer.mlp.down_proj.format) == str(bitfold.Format("int8-row"))
    assert str(layer.mlp.up_proj.format) == str(bitfold.Format("nf4"))


@pytest.mark.parametrize(
    "options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}]
)
def test_placement_options(options, float_directory):
    directory = float_directory("llama-tied", torch.float16)
    model = load(directory, "llama-tied", quantization_config=bitfold.BitfoldConfig("int4-g64"), **options)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert isinstance(model.lm_head, TiedHead)
    assert tiny_models.logits(model, "llama-tied").dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_at_load(dtype, float_directory):
    directory = float_directory("gpt2")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(directory, dtype=dtype, quantization_config=bitfold.BitfoldConfig("nf4"))
    assert isinstance(model.transformer.h[0].attn.c_attn, QuantConv1D)
    assert tiny_models.logits(model, "gpt2").dtype == dtype


def test_a_dict_does_as_well_as_the_object(float_directory):
    directory = float_directory("llama")
    recipe = bitfold.BitfoldConfig("int8-row").to_dict()
    model = load(directory, "llama", quantization_config=recipe)
    assert isinstance(model.lm_head, QuantLinear)


def test_float_model_on_disk_is_left_alone(float_directory):
    directory = float_directory("llama")
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    load(directory, "llama", quantization_config=bitfold.BitfoldConfig("nf4"))
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


def test_recipe_for_a_folded_checkpoint_gives_way_to_what_is_stored(float_directory, tmp_path):
    bitfold.quantize(load(float_directory("llama"), "llama"), "nf4", progress=False).save_pretrained(
        tmp_path / "f"
    )
    with pytest.warns(UserWarning, match="quantization_config"):
        model = load(tmp_path / "f", "llama", quantization_config=bitfold.BitfoldConfig("int8-row"))
    assert str(model.lm_head.format) == str(bitfold.Format("nf4"))


def test_mistakes_are_refused(float_directory):
    directory = float_directory("llama")
    with pytest.raises(FormatError, match="nf5"):
        load(directory, "llama", quantization_config=bitfold.BitfoldConfig("nf5"))
    with pytest.raises(ValueError, match="no_such_layer"):
        load(directory, "llama", quantization_config=bitfold.BitfoldConfig("nf4", skip=["no_such_layer"]))


def test_recipe_in_a_config_json_is_not_a_folded_model(float_directory):
    directory = float_directory("llama")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = bitfold.BitfoldConfig("nf4").to_dict()
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="never folded"):
        load(directory, "llama")


def test_uncovered_weights_raise_here_too(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(CoverageError, match="conv1"):
        WhisperForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=bitfold.BitfoldConfig("nf4")
        )
