"""Tiny random transformers models, one per thing that an architecture does to its weights.

Imported by the tests and by the scripts that they start in fresh processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 99


@dataclass(frozen=True)
class Tiny:
    """How to make one model, and what to feed it."""

    build: Callable[[], Any]
    auto_class: str
    inputs: Callable[[], dict[str, torch.Tensor]]


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    return (torch.arange(rows * length) * 13 % VOCABULARY).reshape(rows, length)


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def _encoder_decoder() -> dict[str, torch.Tensor]:
    return {**_text(), "decoder_input_ids": tokens(2, 5)}


def _llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)


def _bert_config() -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
    )


def _bert_masked() -> Any:
    from transformers import BertForMaskedLM

    return BertForMaskedLM(_bert_config())


def _bert_classifier() -> Any:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config())


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return T5ForConditionalGeneration(config)


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        sliding_window=16,
    )
    return Gemma3ForCausalLM(config)


MODELS: dict[str, Tiny] = {
    "llama": Tiny(lambda: _llama(False), "AutoModelForCausalLM", _text),
    "llama-tied": Tiny(lambda: _llama(True), "AutoModelForCausalLM", _text),
    "gpt2": Tiny(_gpt2, "AutoModelForCausalLM", _text),
    "bert-masked": Tiny(_bert_masked, "AutoModelForMaskedLM", _text),
    "bert-classifier": Tiny(_bert_classifier, "AutoModelForSequenceClassification", _text),
    "t5": Tiny(_t5, "AutoModelForSeq2SeqLM", _encoder_decoder),
    "gemma": Tiny(_gemma, "AutoModelForCausalLM", _text),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The named model, same weights at each call, biases and norms not at their trivial start values."""
    torch.manual_seed(7)
    model = MODELS[name].build().eval()
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            # Not the buffers: a model that is loaded keeps its rotary table in fp32.
            parameter.data = parameter.to(dtype)
    return model


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    """Logits of the named model's inputs; the model decides the dtype."""
    inputs = {key: value.to(model.device) for key, value in MODELS[name].inputs().items()}
    return copy.copy(model(**inputs).logits)
