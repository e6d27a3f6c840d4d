"""What each format costs on Gaussian weights: mean squared error over variance, 2^20 draws.

Expected figures come from Monte Carlo runs of the same grids, or from Lloyd-Max for learned levels. Scales
from extremes (`round`) leave nothing to choose and must hold from both sides; a search may only get better.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfold import ops

SHAPE = (1024, 1024)
WITHIN = 0.02


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def distortion(weight: Tensor, fmt: str, method: str) -> float:
    packed = ops.quantize(weight, fmt, method)
    off = (ops.dequantize(packed, fmt, SHAPE) - weight).double()
    return float((off * off).mean() / (weight.double() ** 2).mean())


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("nf4-nodq", 0.00846),
        ("nf4", 0.00846),
        ("nf4-g128-nodq", 0.00916),
        ("fp4-nodq", 0.0149),
        ("int4-g64", 0.00830),
        ("int4-g128", 0.0101),
        ("int3-g128", 0.0466),
        ("int2-g128-sym", 0.59),
        ("int2-g128-zp", 0.254),
    ],
)
def test_scale_from_extremes(gaussian: Tensor, fmt: str, expected: float) -> None:
    assert distortion(gaussian, fmt, "round") == pytest.approx(expected, rel=WITHIN)


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [
        ("int4-g64", 0.00764),
        ("int4-g128", 0.0091),
        ("int4-g64-dq", 0.0076),
        ("int3-g128", 0.0350),
        ("int2-g128-zp", 0.136),
        ("int2-g128", 0.117),
        ("int2-g64", 0.114),
        ("int2-g32", 0.108),
        ("kmeans4-row", 0.00950),
        ("kmeans3-row", 0.0345),
        ("kmeans2-row", 0.1175),
        ("kmeans2-tensor", 0.1175),
    ],
)
def test_scale_by_search(gaussian: Tensor, fmt: str, expected: float) -> None:
    assert distortion(gaussian, fmt, "search") <= expected * (1 + WITHIN)
