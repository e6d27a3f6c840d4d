"""transformers draws what a checkpoint lacks, module by module: packed weights must never be in its reach."""

from __future__ import annotations

import pytest
import torch

import bitfold

transformers = pytest.importorskip("transformers")


def test_module_that_initializes_a_folded_child_loads(tmp_path):
    # WhisperEncoder fills embed_positions by its shape, which a flat packed weight does not have.
    config = transformers.WhisperConfig(
        vocab_size=99, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=80,
        max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    float_parts = ["model.encoder.conv1", "model.encoder.conv2", "model.decoder.embed_positions"]
    inputs = {"input_features": torch.randn(1, 80, 40), "decoder_input_ids": torch.tensor([[1, 5]])}
    bitfold.quantize(model, "nf4", skip=float_parts, progress=False)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)


def test_resizing_a_folded_table_is_refused_by_name():
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model.resize_token_embeddings(104)  # still float
    bitfold.quantize(model, "nf4", progress=False)
    model.resize_token_embeddings(104)
    with pytest.raises(bitfold.BitfoldError, match="rows cannot be added or cut; resize the float model"):
        model.resize_token_embeddings(120)
