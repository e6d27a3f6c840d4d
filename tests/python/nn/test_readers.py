"""Which weights a class reads without calling the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitfold.nn._readers import weights_read_by


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.looked_at = nn.Linear(4, 4)
        self.cast_to = nn.Linear(4, 4)
        self.many = nn.ModuleList([nn.Linear(4, 4)])
        self.called.weight.data.zero_()

    def forward(self, x, word_table):
        x = self.called(x) @ self.read.weight
        if isinstance(self.looked_at.weight, torch.Tensor) and self.looked_at.weight is not None:
            x = x.to(self.looked_at.weight.device)
        x = x.to(self.cast_to.weight.dtype)
        return self.inner.deep(x) @ self.inner.deep.weight + self.many[0].weight + word_table.weight

    def tie_weights(self):
        self.called.weight = self.read.weight

    def get_input_embeddings(self):
        return self.called.weight


class Careful(nn.Module):
    def forward(self, x):
        if self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


class Child(Reader):
    def forward(self, x):
        return self.called(x)


def test_what_counts():
    reads = weights_read_by(Reader)
    assert reads.own == {"read", "cast_to", "inner.deep", "many"}
    assert reads.loose == {"word_table"}


def test_a_method_that_knows_int8_may_look_at_the_dtype():
    assert weights_read_by(Careful).own == set()


def test_overridden_methods_do_not_count():
    assert weights_read_by(Child).own == set()


def test_torch_modules_that_do_it():
    assert {"linear1", "linear2"} <= weights_read_by(nn.TransformerEncoderLayer).own
    assert "out_proj" in weights_read_by(nn.MultiheadAttention).own
    assert weights_read_by(nn.TransformerDecoderLayer).own == set()
    assert weights_read_by(nn.Linear).own == set()


def test_a_class_without_source():
    cls = type("Made", (nn.Module,), {"forward": lambda self, x: x})
    assert weights_read_by(cls).own == set()


def test_transformers_models():
    pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaForCausalLM, MambaMixer
    from transformers.models.t5.modeling_t5 import T5DenseActDense

    assert weights_read_by(T5DenseActDense).own == set()
    assert {"dt_proj", "out_proj"} <= weights_read_by(MambaMixer).own
    assert weights_read_by(MambaForCausalLM).own == {"lm_head"}
