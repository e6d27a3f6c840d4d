"""torch.library.opcheck of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from operands import STRIDES, folded, raw, strided
from torch.library import opcheck

from bitfold import ops
from support import SOME_FORMATS


def check(op: Any, *args: Any) -> None:
    opcheck(op, args)


@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int3-g64-fz", "int8-row", "kmeans2-tensor"])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_linear(fmt: str, stride: str, needs_grad: bool) -> None:
    packed, spec, _ = folded((5, 70), fmt)
    x = strided(torch.randn(3, 70), stride).requires_grad_(needs_grad)
    bias = torch.randn(5, requires_grad=needs_grad)
    for level in ops.ACCURACY.values():
        check(raw.linear.default, x, packed, spec, bias, level)
    check(raw.linear.default, x.detach().bfloat16(), packed, spec, None, 0)
    if not needs_grad:
        check(raw.linear_nograd.default, x, packed, spec, bias, 0)
        check(raw.linear_grad_input.default, strided(torch.randn(3, 5), stride), packed, spec)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_opcheck_the_others(fmt: str) -> None:
    packed, spec, _ = folded((5, 70), fmt)
    check(raw.dequantize.default, packed, spec, torch.float16)
    check(raw.embedding.default, torch.tensor([[0, 4], [2, 2]]).t(), packed, spec, torch.float32)
    for stride in STRIDES:
        for method in (0, 1):
            check(raw.quantize.default, strided(torch.randn(5, 70), stride), spec, method)


def test_opcheck_packing() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (13, 5), dtype=torch.uint8).t()
        check(raw.pack_bits.default, codes, bits)
        check(raw.unpack_bits.default, ops.pack_bits(codes, bits), bits, 5, 13)
    scales = torch.rand(7, 90).t()
    check(raw.double_quantize.default, scales)
    check(raw.double_dequantize.default, *ops.double_quantize(scales))
