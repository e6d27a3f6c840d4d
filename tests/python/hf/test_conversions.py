"""What transformers computes between file and model must not touch packed bytes; nor must offload to disk."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

import bitfold

FIVE = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture
def fused_llama(monkeypatch):
    """Have transformers store Llama's gate and up projections as one tensor, as it does for other models."""
    if not FIVE:
        pytest.skip("transformers 4 has no weight conversions")
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

    def mapping():
        return [
            WeightConverter(
                source_patterns="mlp.gate_up_proj.weight",
                target_patterns=["mlp.gate_proj.weight", "mlp.up_proj.weight"],
                operations=[Chunk(dim=0)],
            ),
            WeightRenaming(source_patterns=r"\.attention\.", target_patterns=".self_attn."),
        ]

    original = conversion_mapping.get_checkpoint_conversion_mapping
    replacement = lambda name: mapping() if name == "llama" else original(name)  # noqa: E731
    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", replacement)


@pytest.mark.parametrize("origin", ["loaded", "made"])
def test_folded_tensors_pass_as_they_are(origin, fused_llama, tmp_path):
    from transformers import LlamaForCausalLM

    model = tiny_models.make("llama")
    if origin == "loaded":
        model.save_pretrained(tmp_path / "float")
        names = load_file(tmp_path / "float" / "model.safetensors")
        assert "model.layers.0.mlp.gate_up_proj.weight" in names  # the conversion is at work
        assert "model.layers.0.attention.q_proj.weight" in names
        model = LlamaForCausalLM.from_pretrained(tmp_path / "float")
    bitfold.quantize(model, "int4-g64", skip=[r".*\.o_proj"], progress=False)
    model.save_pretrained(tmp_path / "folded")
    names = load_file(tmp_path / "folded" / "model.safetensors")
    assert "model.layers.0.mlp.gate_proj.weight" in names
    again = LlamaForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.equal(tiny_models.logits(again, "llama"), tiny_models.logits(model, "llama"))
    again.save_pretrained(tmp_path / "again")
    other = load_file(tmp_path / "again" / "model.safetensors")
    assert names.keys() == other.keys()
    assert all(torch.equal(other[key], value) for key, value in names.items())


def test_conversions_of_what_stays_float_still_work(fused_llama, tmp_path):
    from transformers import LlamaForCausalLM

    model = bitfold.quantize(tiny_models.make("llama"), "nf4", skip=[r".*\.mlp"], progress=False)
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.gate_up_proj.weight" in load_file(tmp_path / "model.safetensors")
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.logits(again, "llama"), tiny_models.logits(model, "llama"))


@pytest.mark.parametrize("buffers", [False, True])
def test_offload_to_disk_is_right_or_refused(buffers, tmp_path):
    model = bitfold.quantize(tiny_models.make("llama", torch.bfloat16), "nf4", progress=False)
    bitfold.save_pretrained(model, tmp_path / "m")
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    options = {
        "device_map": {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"},
        "offload_folder": tmp_path / "offload",
        "offload_buffers": buffers,
    }
    if not FIVE:
        with pytest.raises(ValueError, match="disk"):
            bitfold.load(tmp_path / "m", **options)
        return
    loaded = bitfold.load(tmp_path / "m", **options)
    assert torch.equal(tiny_models.logits(loaded, "llama"), tiny_models.logits(model, "llama"))


@pytest.mark.parametrize("name", ["llama-tied", "t5", "bert-masked"])
def test_tied_weights_left_in_float_stay_tied(name, tmp_path):
    model = bitfold.quantize(tiny_models.make(name), "nf4", embeddings=None, progress=False)
    bitfold.save_pretrained(model, tmp_path / "m")
    stored = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["modules"]
    assert not any("embed" in key for key in stored)
    again = bitfold.load(tmp_path / "m")
    assert torch.equal(tiny_models.logits(again, name), tiny_models.logits(model, name))
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
