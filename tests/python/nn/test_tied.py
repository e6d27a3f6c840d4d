"""TiedHead and TiedEmbedding: one packed matrix, several users."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bitfold.errors import PackedDataError
from bitfold.nn import QuantEmbedding, QuantLinear, TiedEmbedding, TiedHead

ROWS, DIM = 30, 40


class Model(nn.Module):
    def __init__(self, fmt: str = "int8-g64", bias: bool = True, head_first: bool = False) -> None:
        super().__init__()
        embed = QuantEmbedding.from_float(nn.Embedding(ROWS, DIM), fmt)
        head = TiedHead(embed, nn.Parameter(torch.randn(ROWS)) if bias else None)
        if head_first:
            self.head, self.embed = head, embed
        else:
            self.embed, self.head = embed, head
        self.second = TiedEmbedding(embed, padding_idx=0)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(indices) + self.second(indices))


def check(model: Model) -> None:
    assert model.head.source is model.embed
    assert model.second.source is model.embed


def test_head_multiplies_with_the_table(fmt):
    model = Model(fmt)
    model.head.accuracy = "fp32"
    x = torch.randn(2, DIM)
    expected = x @ model.embed.dequantize().T + model.head.bias
    assert torch.allclose(model.head(x), expected, atol=1e-4)
    assert torch.equal(model.second(torch.tensor([3])), model.embed(torch.tensor([3])))
    assert torch.equal(model.head.dequantize(), model.embed.dequantize())


def test_state_holds_the_matrix_once():
    model = Model()
    assert sorted(model.state_dict()) == [
        "embed.weight",
        "embed.weight_exponent",
        "embed.weight_scale",
        "head.bias",
    ]
    assert [name for name, _ in model.named_modules()] == ["", "embed", "head", "second"]
    assert sorted(Model(bias=False).state_dict())[-1] == "embed.weight_scale"


@pytest.mark.parametrize("head_first", [False, True])
def test_copies_refer_to_their_own_embedding(head_first):
    model = Model(head_first=head_first)
    indices = torch.randint(0, ROWS, (3,))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        check(twin)
        assert twin.embed is not model.embed
        assert torch.equal(twin(indices), model(indices))
        twin.embed.weight.zero_()
        assert not torch.equal(twin(indices), model(indices))


def test_casts_and_moves_keep_the_tie():
    model = Model()
    indices = torch.randint(0, ROWS, (3,))
    y = model(indices)
    model.bfloat16()
    check(model)
    assert model(indices).dtype == torch.bfloat16
    assert model.second.dtype == torch.bfloat16
    model.float()
    assert torch.allclose(model(indices), y, atol=0.1)
    model.to("meta")
    assert model.head.weight.is_meta


def test_bias_of_another_module_is_read_there():
    model = Model(bias=False)
    model.owner = nn.Linear(1, ROWS)
    model.head = TiedHead(model.embed, model.owner.bias, bias_owner=(model.owner, "bias"))
    assert "head.bias" not in model.state_dict()
    model.head.accuracy = "fp32"
    x = torch.randn(2, DIM)
    assert torch.allclose(model.head(x), x @ model.embed.dequantize().T + model.owner.bias, atol=1e-4)
    model.owner.bias = nn.Parameter(torch.ones(ROWS))  # loaders replace parameters
    assert torch.allclose(model.head(x), x @ model.embed.dequantize().T + 1, atol=1e-4)
    twin = copy.deepcopy(model)
    twin.owner.bias.data.zero_()
    assert torch.allclose(twin.head(x), x @ model.embed.dequantize().T, atol=1e-4)


def test_weight_has_the_dtype_and_rows_that_other_code_looks_at():
    model = Model()
    assert model.head.weight.dtype == torch.int8
    assert model.head.weight.shape[0] == ROWS
    model.head.weight = model.embed.weight  # what tying assigns
    with pytest.raises(PackedDataError, match="cannot be set"):
        model.head.weight = torch.zeros(3)


@pytest.mark.parametrize("strict", [False, True])
def test_compile_and_export(strict):
    model = Model()
    indices = torch.randint(0, ROWS, (3,))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(indices), model(indices), atol=1e-5)
    program = torch.export.export(model, (indices,), strict=strict)
    assert torch.allclose(program.module()(indices), model(indices), atol=1e-5)
    assert sum(name.endswith(".weight") for name in program.state_dict) == 1


def test_ties_to_a_linear_too():
    source = QuantLinear.from_float(nn.Linear(8, 4), "nf4")
    x = torch.randn(2, 8)
    assert torch.allclose(TiedHead(source)(x) + source.bias, source(x), atol=1e-5)


def test_only_packed_modules_can_be_shared():
    with pytest.raises(PackedDataError, match="expected a packed module, got Embedding"):
        TiedHead(nn.Embedding(3, 4))
    source = QuantEmbedding.from_float(nn.Embedding(3, 4), "nf4")
    with pytest.raises(PackedDataError, match=r"weight is \[3, 5\], the packed matrix to share is \[3, 4\]"):
        TiedHead.from_float(nn.Linear(5, 3), source)


def test_gradient_through_both_uses():
    model = Model()
    x = torch.randn(2, DIM, requires_grad=True)
    model.head(x).sum().backward()
    assert torch.allclose(x.grad, model.embed.dequantize().sum(0).expand(2, DIM), atol=1e-4)


def test_repr():
    assert "no bytes of its own" in repr(Model().head)
    assert "int8-g64" in repr(Model().second)
