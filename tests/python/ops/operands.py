"""Packed weights, strides and expected errors that the tests of ops share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from bitfold import Format, ops

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STRIDES = ("contiguous", "transposed", "sliced", "expanded")
raw = torch.ops.bitfold


def folded(shape: tuple[int, int], fmt: str, seed: int = 0) -> tuple[list[Tensor], list[int], np.ndarray]:
    """Packed buffers, spec, and the float64 weight that the bytes stand for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = ops.quantize(weight, fmt)
    return packed, Format(fmt).spec(shape), reference.dequantize(packed, fmt, shape)


def strided(values: Tensor, kind: str) -> Tensor:
    """The same values behind other strides."""
    if kind == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if kind == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"), dtype=values.dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if kind == "expanded":
        return values[:1].expand_as(values)
    return values


def fails(words: list[str], kind: type[Exception], call: Any, *args: Any) -> None:
    """`call(*args)` raises `kind`, with all `words` in its message."""
    with pytest.raises(kind) as error:
        call(*args)
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in: {error.value}"
