"""bitfold.summary: the bytes of the table are the bytes there are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import bitfold


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.fc = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.conv = nn.Conv1d(2, 2, 3)
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("saved", torch.zeros(3))
        self.register_buffer("cache", torch.zeros(5), persistent=False)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.fixture
def model() -> nn.Module:
    return bitfold.quantize(Toy(), "nf4", progress=False)


def test_before_folding_everything_is_float():
    table = bitfold.summary(Toy()).to_dict()
    assert table["classes"]["float matrices"]["modules"] == 3
    assert table["total"]["ratio"] == 1.0
    assert table["folded"]["ratio"] is None


def test_bytes_equal_those_of_state_dict_and_of_the_buffers(model):
    table = bitfold.summary(model).to_dict()
    assert table["total"]["disk_bytes"] == bytes_of(model.state_dict().values())
    assert table["total"]["resident_bytes"] == bytes_of([*model.parameters(), *model.buffers()])
    float_model = Toy()
    assert table["total"]["before_bytes"] == bytes_of([*float_model.parameters(), float_model.saved])
    assert table["total"]["weights"] == sum(p.numel() for p in float_model.parameters()) + 3


def test_classes(model):
    classes = bitfold.summary(model).to_dict()["classes"]
    assert list(classes) == [
        "linear",
        "embedding",
        "float matrices",
        "norms",
        "biases",
        "other",
        "buffers, not saved",
    ]
    assert classes["linear"]["weights"] == 64 * 128
    assert classes["linear"]["before_bytes"] == 64 * 128 * 4
    assert classes["linear"]["disk_bytes"] == bitfold.Format("nf4").nbytes((128, 64))
    assert classes["linear"]["bits_per_weight"] == pytest.approx(
        bitfold.Format("nf4").bits_per_weight((128, 64))
    )
    assert classes["buffers, not saved"]["disk_bytes"] == 0
    assert classes["buffers, not saved"]["resident_bytes"] == 20


def test_before_is_counted_in_the_dtype_that_was_folded():
    model = bitfold.quantize(Toy().bfloat16(), "nf4", progress=False)
    assert bitfold.summary(model).to_dict()["classes"]["linear"]["before_bytes"] == 64 * 128 * 2


def test_tied_modules_and_float_matrices_are_named(model):
    summary = bitfold.summary(model)
    assert summary.tied == ["head"]
    assert summary.float_matrices == [("conv.weight", (2, 2, 3), 48)]
    assert summary.formats == {"int8-g64": 1, "nf4": 1}
    text = str(summary)
    for part in ("linear", "whole model", "conv.weight [2, 2, 3]", "head", "nf4 (1)", "KiB"):
        assert part in text
    assert len({len(line) for line in text.splitlines()[:1]}) == 1


def test_html_and_json(model):
    summary = bitfold.summary(model)
    page = summary._repr_html_()
    assert page.startswith("<table>")
    assert page.count("<tr>") == len(summary.rows) + 3
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False)) == summary.to_dict()


def test_html_is_escaped():
    model = nn.Module()
    model._parameters["<b>"] = nn.Parameter(torch.zeros(2, 2))
    assert "<b>" not in bitfold.summary(model)._repr_html_().replace("<tbody>", "")


def test_on_meta():
    with torch.device("meta"):
        model = Toy()
    assert bitfold.summary(model).total.disk == bitfold.summary(Toy()).total.disk


def test_empty_model():
    assert bitfold.summary(nn.ReLU()).to_dict()["total"]["disk_bytes"] == 0
    assert "whole model" in str(bitfold.summary(nn.ReLU()))
