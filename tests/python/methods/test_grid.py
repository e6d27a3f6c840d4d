"""Grid: packed tensors come apart into codes, scales and zero points, and go together to the same bytes."""

from __future__ import annotations

import pytest
import torch

from bitfold import Format, ops
from bitfold.errors import FormatError
from bitfold.methods.grid import Grid
from support import EVERY_FORMAT

PLAIN = [name for name in EVERY_FORMAT if not name.startswith("kmeans") and "outliers" not in name]


@pytest.mark.parametrize("shape", [(1, 1), (3, 53), (16, 197)])
def test_every_format_comes_apart_and_together(shape):
    weight = 0.1 * torch.randn(shape)
    for name in PLAIN:
        fmt = Format(name)
        packed = ops.quantize(weight, fmt)
        grid = Grid.unpack(packed, fmt, shape)
        again = grid.pack(packed, fmt)
        assert len(again) == len(packed), name
        for a, b in zip(again, packed, strict=True):
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
        codes = grid.codes.long()
        unit = codes.float() if grid.levels is None else grid.levels[codes]
        value = (unit - grid.spread(grid.zero)) * grid.spread(grid.scale)
        expected = ops.dequantize(packed, fmt, shape)
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-7), name


def test_what_is_changed_is_what_is_stored():
    fmt, shape = Format("int4-g32"), (5, 80)
    packed = ops.quantize(torch.randn(shape), fmt)
    grid = Grid.unpack(packed, fmt, shape)
    grid.codes, grid.scale = 15 - grid.codes, grid.scale * 2
    again = Grid.unpack(grid.pack(packed, fmt), fmt, shape)
    assert torch.equal(again.codes, grid.codes)
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.zero, grid.zero)


def test_scales_that_are_double_quantized_stay():
    fmt, shape = Format("int4-g32-dq"), (5, 80)
    packed = ops.quantize(torch.randn(shape), fmt)
    grid = Grid.unpack(packed, fmt, shape)
    before, grid.scale = grid.scale, grid.scale * 2
    assert torch.equal(Grid.unpack(grid.pack(packed, fmt), fmt, shape).scale, before)


def test_scales_that_grow_too_large_are_cut_not_infinite():
    fmt, shape = Format("int4-g32"), (2, 64)
    packed = ops.quantize(torch.randn(shape), fmt)
    grid = Grid.unpack(packed, fmt, shape)
    grid.scale = grid.scale * 1e30
    assert torch.isfinite(Grid.unpack(grid.pack(packed, fmt), fmt, shape).scale).all()


def test_learned_codebooks_do_not_come_apart():
    fmt = Format("kmeans3-row")
    with pytest.raises(FormatError, match=r"kmeans3.* has a learned codebook"):
        Grid.unpack(ops.quantize(torch.randn(4, 32), fmt), fmt, (4, 32))
