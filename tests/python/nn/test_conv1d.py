"""QuantConv1D: GPT-2's transposed Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bitfold.nn import QuantConv1D, QuantLinear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def float_conv(out: int = 48, inp: int = 70) -> nn.Module:
    conv = Conv1D(out, inp)
    conv.weight.data.normal_()
    conv.bias.data.normal_()
    return conv


def test_computes_what_conv1d_computes(fmt):
    conv = float_conv()
    packed = QuantConv1D.from_float(conv, fmt)
    assert packed.dequantize().shape == (48, 70)
    conv.weight.data = packed.dequantize().t().contiguous()
    packed.accuracy = "fp32"
    x = torch.randn(2, 3, 70)
    assert torch.allclose(packed(x), conv(x), atol=1e-4)
    assert packed.bias is conv.bias


def test_bytes_equal_those_of_the_same_matrix_in_a_linear(fmt):
    conv = float_conv()
    linear = nn.Linear(70, 48)
    linear.weight.data = conv.weight.data.t()
    a, b = QuantConv1D.from_float(conv, fmt), QuantLinear.from_float(linear, fmt)
    for left, right in zip(a.packed(), b.packed(), strict=True):
        assert torch.equal(left, right)


def test_names_of_conv1d_and_state(fmt):
    packed = QuantConv1D.from_float(float_conv(), fmt)
    assert (packed.nf, packed.nx, packed.out_features, packed.in_features) == (48, 70, 48, 70)
    fresh = QuantConv1D(70, 48, format=fmt)
    fresh.load_state_dict(packed.state_dict(), strict=True)
    x = torch.randn(2, 70)
    assert torch.equal(fresh(x), packed(x))
    assert torch.equal(copy.deepcopy(packed).half()(x.half()), packed.half()(x.half()))
    assert "QuantConv1D(in_features=70, out_features=48" in repr(packed)


def test_compile_and_export(fmt):
    packed = QuantConv1D.from_float(float_conv(), fmt)
    x = torch.randn(3, 70)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))
    assert torch.equal(torch.export.export(packed, (x,)).module()(x), packed(x))
