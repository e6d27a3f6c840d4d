"""Fixtures of the module tests: one format of every family, with every kind of buffer."""

from __future__ import annotations

import pytest
import torch

FORMATS = (
    "nf4",
    "nf4-nodq",
    "nf3",
    "nf2",
    "fp4",
    "log4",
    "int8-row",
    "int8-tensor",
    "int8-g64",
    "int4-g64",
    "int4-g64-sym",
    "int4-g64-fz",
    "int4-g64-dq",
    "int3-g64",
    "int2-g64",
    "int2-g64-zp",
    "kmeans4-row",
    "kmeans3-tensor",
    "kmeans2-row",
)


@pytest.fixture(params=FORMATS)
def fmt(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def every_format() -> tuple[str, ...]:
    return FORMATS


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
