"""The accuracy of packed products: a keyword, an attribute, one call for a whole model; never stored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitfold
from bitfold import ops
from bitfold.nn import QuantConv1D, QuantEmbedding, QuantLinear, TiedHead
from products import assert_promise


class Levels(TorchDispatchMode):
    """Records the level that each product is asked for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.bitfold.linear.default, torch.ops.bitfold.linear_nograd.default):
            self.seen.append(args[4])
        return func(*args, **(kwargs or {}))


def level_of(layer, x):
    with Levels() as levels:
        layer(x)
    (level,) = levels.seen
    return level


def layers():
    return [
        QuantLinear.from_float(nn.Linear(70, 9), "nf4"),
        QuantConv1D(70, 9, format="int8-row"),
        TiedHead(QuantEmbedding.from_float(nn.Embedding(9, 70), "int8-g64")),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_op_gets_the_level_of_the_layer(layer, dtype, needs_grad):
    layer = copy.deepcopy(layer)
    x = torch.randn(2, 70, dtype=dtype, requires_grad=needs_grad)
    assert layer.accuracy == "auto"
    assert level_of(layer, x) == 0
    for name, level in ops.ACCURACY.items():
        layer.accuracy = name
        assert (layer.accuracy, level_of(layer, x)) == (name, level)
        layer.accuracy = level
        assert (layer.accuracy, level_of(layer, x)) == (name, level)


@pytest.mark.parametrize("value", ["best", 3, -1, None, True])
def test_another_accuracy_is_refused_and_changes_nothing(value):
    message = f"accuracy must be one of auto, fp32, int8, got {value!r}"
    with pytest.raises(ValueError, match=message):
        QuantLinear(70, 9, format="nf4", accuracy=value)
    model = nn.Sequential(*layers())
    model[0].accuracy = "fp32"
    with pytest.raises(ValueError, match=message):
        model[0].accuracy = value
    with pytest.raises(ValueError, match=message):
        bitfold.set_accuracy(model, value)
    assert [layer.accuracy for layer in model] == ["fp32", "auto", "auto"]


def test_copies_keep_it_and_files_do_not():
    layer = QuantLinear(70, 9, format="nf4", accuracy="int8")
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.accuracy == "int8"
    plain = QuantLinear(70, 9, format="nf4")
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert layer.manifest_entry() == plain.manifest_entry()
    plain.load_state_dict(layer.state_dict())
    assert plain.accuracy == "auto"
    layer.half()
    assert layer.accuracy == "int8"


def test_modules_pickled_before_there_was_a_choice_are_auto():
    layer = QuantLinear(70, 9, format="nf4")
    del layer.__dict__["_accuracy"]
    assert layer.accuracy == "auto"
    assert layer(torch.randn(2, 70)).shape == (2, 9)


def test_repr_shows_it_only_where_it_was_chosen():
    for layer in layers():
        assert "accuracy" not in repr(layer)
        layer.accuracy = "fp32"
        assert repr(layer).count("accuracy=fp32") == 1


def test_a_whole_model_at_once():
    model = nn.ModuleDict({"block": nn.Sequential(*layers()), "head": nn.Linear(3, 4)})
    model["again"] = model["block"]
    assert bitfold.set_accuracy(model, "fp32") == 3
    assert [layer.accuracy for layer in model["block"]] == ["fp32"] * 3
    assert bitfold.set_accuracy(nn.Linear(3, 4), "fp32") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(ops.ACCURACY))
def test_layers_keep_the_promise_of_their_level(name, dtype):
    linear = QuantLinear.from_float(nn.Linear(1100, 64), "nf4")
    transposed = QuantConv1D(1100, 64, format="nf4", accuracy=name)
    transposed.load_state_dict(linear.state_dict())
    head = TiedHead(QuantEmbedding.from_float(nn.Embedding(64, 1100), "int8-row"))
    bitfold.set_accuracy(nn.ModuleList([linear, head]), name)
    x = torch.randn(8, 1100).to(dtype)
    for layer, owner in ((linear, linear), (transposed, linear), (head, head.source)):
        with torch.no_grad():
            exact = x.double() @ owner.dequantize().double().T
            if layer is not head:
                exact += layer.bias.to(dtype).double()
            for rows in (1, 8):
                y = torch.cat([layer(part) for part in x.split(rows)])
                assert y.dtype == dtype
                assert_promise(y, exact.numpy(), name)


def test_compiled_code_follows_a_change():
    layer = QuantLinear.from_float(nn.Linear(70, 9), "nf4")
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=keep)
    x = torch.randn(2, 70)
    for name, level in ops.ACCURACY.items():
        layer.accuracy = name
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        (node,) = [node for node in graphs[-1].graph.nodes if "bitfold" in str(node.target)]
        assert node.args[4] == level
