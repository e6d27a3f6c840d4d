"""Fixtures of the module tests: one format of every family, with every kind of buffer."""

from __future__ import annotations

import pytest

from support import SOME_FORMATS


@pytest.fixture(params=SOME_FORMATS)
def fmt(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def every_format() -> list[str]:
    return SOME_FORMATS
