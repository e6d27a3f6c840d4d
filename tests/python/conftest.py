"""Shared by all Python tests: the helpers beside this file, hypothesis without a clock, fixed seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # reference.py and support.py, under importlib mode

settings.register_profile(
    "bitfold",
    max_examples=60,
    deadline=None,  # a busy machine is no failure
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bitfold")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where calibrated runs keep their state


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
