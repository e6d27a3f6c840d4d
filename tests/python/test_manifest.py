"""The manifest: describe, prepare, and manifests that lie."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import bitfold
from bitfold import manifest
from bitfold.errors import PackedDataError
from bitfold.nn import QuantEmbedding, QuantLinear, TiedHead


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16, padding_idx=1)
        self.first = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 12)
        self.out = nn.Linear(12, 16, bias=False)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.first.weight = self.embed.weight

    def forward(self, indices):
        return self.head(self.out(self.fc(self.embed(indices))) + self.first(indices))


INDICES = torch.arange(6)


def folded() -> Toy:
    torch.manual_seed(0)
    return bitfold.quantize(Toy(), "nf4", progress=False)


def test_describe():
    model = folded()
    description = manifest.describe(model)
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "quant_method": "bitfold",
        "format_version": 1,
        "modules": {
            "embed": {
                "kind": "embedding",
                "format": "int8-g64",
                "shape": [20, 16],
                "dtype": "float32",
                "padding_idx": 1,
            },
            "first": {"kind": "tied_embedding", "tied_to": "embed"},
            "fc": {"kind": "linear", "format": "nf4", "shape": [12, 16], "dtype": "float32", "bias": True},
            "out": {"kind": "linear", "format": "nf4", "shape": [16, 12], "dtype": "float32", "bias": False},
            "head": {"kind": "tied_head", "tied_to": "embed", "bias": True},
        },
    }
    assert manifest.describe(nn.ReLU())["modules"] == {}


def test_tensors_are_exactly_the_packed_part_of_the_state():
    model = folded()
    table = manifest.tensors(manifest.describe(model))
    state = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    assert set(table) == set(state)
    for name, (dtype, shape) in table.items():
        assert state[name].dtype == getattr(torch, dtype)
        assert tuple(state[name].shape) == shape


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_prepare_and_load(device):
    model = folded()
    with torch.device(device):
        fresh = Toy()
    assert manifest.prepare(fresh, manifest.describe(model)) == []
    assert isinstance(fresh.fc, QuantLinear)
    assert isinstance(fresh.head, TiedHead)
    assert fresh.head.source is fresh.embed
    assert fresh.fc.weight.device.type == device
    fresh.load_state_dict(model.state_dict(), strict=True, assign=device == "meta")
    assert torch.equal(fresh(INDICES), model(INDICES))
    assert manifest.describe(fresh) == manifest.describe(model)
    assert not list(fresh.embed.parameters())


def test_prepared_modules_run_in_the_dtype_of_the_model_and_remember_the_original_one():
    model = folded()
    fresh = Toy().bfloat16()
    manifest.prepare(fresh, manifest.describe(model))
    assert fresh.embed.dtype == fresh.first.dtype == torch.bfloat16
    assert fresh.embed.original_dtype == torch.float32
    assert fresh.fc.bias.dtype == torch.bfloat16


def test_preparing_again_is_a_no_op_and_otherwise_an_error():
    model = folded()
    description = manifest.describe(model)
    modules = list(model.modules())
    manifest.prepare(model, description)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    other = copy.deepcopy(description)
    other["modules"]["fc"]["format"] = "int4-g64"
    with pytest.raises(PackedDataError, match=r"fc: the model has it packed as .*nf4.*int4-g64"):
        manifest.prepare(model, other)


def test_shared_modules_stay_shared():
    layer = nn.Linear(8, 8)
    model = bitfold.quantize(nn.ModuleList([layer, layer]), "nf4", progress=False)
    description = manifest.describe(model)
    assert list(description["modules"]) == ["0"]
    other = nn.Linear(8, 8)
    fresh = nn.ModuleList([other, other])
    manifest.prepare(fresh, description)
    assert fresh[0] is fresh[1]


def changed(**fields: Any) -> dict[str, Any]:
    description = manifest.describe(folded())
    description["modules"]["fc"] |= fields
    return description


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([], "expected a JSON object, found list"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq', expected 'bitfold'"),
        ({"quant_method": "bitfold"}, "format_version is None"),
        ({"quant_method": "bitfold", "format_version": "1"}, "format_version is '1'"),
        ({"quant_method": "bitfold", "format_version": True}, "format_version is True"),
        ({"quant_method": "bitfold", "format_version": 2}, "format_version is 2, this bitfold reads up to 1"),
        ({"quant_method": "bitfold", "format_version": 1}, "modules is NoneType"),
        ({"quant_method": "bitfold", "format_version": 1, "modules": {"a": 3}}, "a: manifest entry is int"),
    ],
)
def test_a_manifest_that_is_none(description, message):
    for function in (manifest.check, manifest.tensors, lambda d: manifest.prepare(Toy(), d)):
        with pytest.raises(PackedDataError, match=message):
            function(description)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lstm"}, r"fc: kind is 'lstm', expected one of linear, conv1d, embedding, tied_head"),
        ({"kind": "embedding"}, r"fc: the manifest says embedding, the model has a Linear there"),
        ({"kind": "conv1d"}, r"fc: the manifest says conv1d, the model has a Linear there"),
        ({"format": "nf5"}, r"fc: format 'nf5'"),
        ({"format": 4}, r"fc: format is 4, expected a string"),
        ({"shape": [12, 17]}, r"fc: the manifest says shape \[12, 17\], the model has \[12, 16\]"),
        ({"shape": [16, 12]}, r"fc: the manifest says shape \[16, 12\], the model has \[12, 16\]"),
        ({"shape": [12]}, r"fc: shape is \[12\], expected \[out, in\]"),
        ({"shape": [12, -16]}, r"fc: shape is \[12, -16\]"),
        ({"shape": [12, 0]}, r"fc: shape is"),
        ({"shape": [12, 16.0]}, r"fc: shape is"),
        ({"shape": [2**62, 2**62]}, r"fc: "),
        ({"shape": None}, r"fc: shape is None"),
        ({"dtype": "float99"}, r"fc: unknown dtype 'float99'"),
        ({"dtype": "nn"}, r"fc: unknown dtype 'nn'"),
        ({"bias": False}, r"fc: the manifest says bias=False, the model has bias=True"),
    ],
)
def test_entries_that_lie_are_named_and_change_nothing(fields, message):
    fresh = Toy()
    before = list(fresh.modules())
    with pytest.raises(PackedDataError, match=message):
        manifest.prepare(fresh, changed(**fields))
    assert list(fresh.modules()) == before


def test_names_that_the_model_does_not_have():
    description = changed()
    description["modules"]["nothing"] = description["modules"]["fc"]
    fresh = Toy()
    with pytest.raises(PackedDataError, match="nothing: named by the manifest but not a module of Toy"):
        manifest.prepare(fresh, description)
    assert isinstance(fresh.fc, nn.Linear)
    assert not isinstance(fresh.fc, QuantLinear)
    assert manifest.prepare(fresh, description, missing="ignore") == ["nothing"]
    assert isinstance(fresh.fc, QuantLinear)
    with pytest.raises(ValueError, match="missing must be"):
        manifest.prepare(Toy(), description, missing="perhaps")


@pytest.mark.parametrize("source", [None, "nothing", "head", 3])
def test_ties_that_lie(source):
    description = changed()
    description["modules"]["head"]["tied_to"] = source
    with pytest.raises(PackedDataError, match="head: tied_to is"):
        manifest.prepare(Toy(), description)


def test_ties_of_another_shape():
    description = changed()
    description["modules"]["head"]["tied_to"] = "fc"
    with pytest.raises(PackedDataError, match="the packed matrix to share is"):
        manifest.prepare(Toy(), description)


@pytest.mark.parametrize("bias", ["fc.nothing", "nowhere.bias"])
def test_bias_owner_that_lies(bias):
    description = changed()
    description["modules"]["head"]["bias"] = bias
    with pytest.raises(PackedDataError, match=f"head: bias is '{bias}'"):
        manifest.prepare(Toy(), description)


def test_base_model_prefix_may_come_or_go():
    class Base(nn.Module):
        base_model_prefix = "base"

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

    class WithHead(nn.Module):
        base_model_prefix = "base"

        def __init__(self) -> None:
            super().__init__()
            self.base = Base()
            self.head = nn.Linear(8, 2)

    description = manifest.describe(bitfold.quantize(WithHead(), "nf4", progress=False))
    base = Base()
    assert manifest.prepare(base, description, missing="ignore") == ["head"]
    assert isinstance(base.fc, QuantLinear)
    with_head = WithHead()
    manifest.prepare(with_head, manifest.describe(base))
    assert isinstance(with_head.base.fc, QuantLinear)
    assert not isinstance(with_head.head, QuantLinear)


def test_ties_across_models_cannot_be_described():
    embed = QuantEmbedding.from_float(nn.Embedding(4, 8), "nf4")
    with pytest.raises(bitfold.BitfoldError, match="not part of this model"):
        manifest.describe(nn.ModuleList([TiedHead(embed)]))
