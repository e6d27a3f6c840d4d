"""QuantEmbedding for every format: look-up, output dtype, scaled word embeddings, state, bad data."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from bitfold.errors import WeightError
from bitfold.nn import QuantEmbedding

ROWS, DIM = 53, 67


def folded(fmt: str, padding_idx: int | None = None) -> QuantEmbedding:
    return QuantEmbedding.from_float(nn.Embedding(ROWS, DIM, padding_idx=padding_idx), fmt)


def test_rows_are_those_of_the_dequantized_table(fmt):
    table = folded(fmt)
    for indices in (torch.randint(0, ROWS, (2, 3)), torch.tensor(5), torch.empty(0, dtype=torch.long)):
        assert torch.equal(table(indices), table.dequantize()[indices])
    assert torch.equal(table(torch.tensor([1, 2], dtype=torch.int32)), table.dequantize()[1:3])


def test_padding_row_stays_zero_and_padding_idx_is_kept(fmt):
    float_table = nn.Embedding(ROWS, DIM, padding_idx=7)
    table = QuantEmbedding.from_float(float_table, fmt)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (ROWS, DIM, 7)
    # a format without a zero level stores a group of zeros with a scale near zero; a codebook for the whole
    # tensor has only its level nearest to zero
    allowed = 0.05 if fmt.startswith("kmeans") and fmt.endswith("tensor") else 0.01
    assert table(torch.tensor(7)).abs().max() <= allowed * float_table.weight.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_output_dtype_follows_the_model(fmt, dtype):
    indices = torch.randint(0, ROWS, (4,))
    table = folded(fmt)
    state = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    rows = table(indices)
    assert rows.dtype == torch.float32
    for cast in (lambda m: m.to(dtype), lambda m: m.to("cpu", dtype), lambda m: m.type(dtype)):
        twin = cast(copy.deepcopy(table))
        assert twin(indices).dtype == dtype
        assert torch.equal(twin(indices), rows.to(dtype))
        assert all(torch.equal(tensor, state[name]) for name, tensor in twin.state_dict().items())
    assert QuantEmbedding.from_float(nn.Embedding(3, 4, dtype=dtype), fmt)(torch.tensor(1)).dtype == dtype


def test_default_dtype_at_construction():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert QuantEmbedding(4, 8, format="int8-g64").dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_state_copies_and_meta(fmt):
    table = folded(fmt, padding_idx=0)
    indices = torch.randint(0, ROWS, (4,))
    fresh = QuantEmbedding(ROWS, DIM, 0, format=fmt)
    fresh.load_state_dict(table.state_dict(), strict=True)
    on_meta = QuantEmbedding(ROWS, DIM, 0, format=fmt, device="meta")
    assert on_meta(torch.empty(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, DIM)
    on_meta.load_state_dict(table.state_dict(), assign=True)
    for twin in (fresh, on_meta, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(twin(indices), table(indices))
        assert twin.padding_idx == 0
    assert not list(table.parameters())


def test_compile_and_export(fmt):
    table = folded(fmt)
    indices = torch.randint(0, ROWS, (4, 5))
    torch._dynamo.reset()
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), table(indices))
    program = torch.export.export(table, (indices,))
    assert torch.equal(program.module()(indices), table(indices))


def test_repr():
    text = repr(folded("int8-g64", padding_idx=3))
    for part in (f"{ROWS}, {DIM}", "padding_idx=3", "int8-g64", "bytes", "x smaller than float32"):
        assert part in text


def test_isinstance_and_attributes_of_an_embedding():
    table = folded("nf4")
    assert isinstance(table, nn.Embedding)
    assert (table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse) == (
        None,
        2.0,
        False,
        False,
    )
    table.reset_parameters()


def test_max_norm_is_refused_with_the_reason():
    with pytest.raises(WeightError, match=r"max_norm=1.0 rewrites rows at each look-up"):
        QuantEmbedding.from_float(nn.Embedding(4, 8, max_norm=1.0), "nf4")


def test_bad_weights_and_indices():
    table = nn.Embedding(4, 8)
    table.weight.data[1, 1] = float("nan")
    with pytest.raises(WeightError, match=r"Embedding\.weight: 1 of 32"):
        QuantEmbedding.from_float(table, "nf4")
    with pytest.raises(RuntimeError, match="99"):
        folded("nf4")(torch.tensor([99]))
    with pytest.raises(RuntimeError):
        folded("nf4")(torch.tensor([-1]))


def test_float_table_is_not_loaded_silently():
    table = folded("int8-g64")
    with pytest.raises(RuntimeError, match="weight: found float32"):
        table.load_state_dict(nn.Embedding(ROWS, DIM).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_word_embeddings_of_transformers(dtype):
    pytest.importorskip("transformers")
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    indices = torch.randint(0, ROWS, (4,))
    for cls in (BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding):
        plain = cls(ROWS, DIM, 0, embed_scale=DIM**0.5)
        plain.weight.data.normal_()
        table = QuantEmbedding.from_float(plain, "int8-g64").to(dtype)
        plain.weight.data = table.dequantize(dtype)
        assert torch.equal(table(indices), plain(indices)), cls.__name__
        assert "scale=8.18" in repr(table)
