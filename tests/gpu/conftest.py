"""Tests of what runs on a GPU. They need torch and pytest only: any machine with a GPU can run them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))  # support.py


def _reason() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    from bitfold import cuda

    torch.cuda.init()
    if not cuda.built():
        return "bitfold was built without nvcc"
    return None if cuda.loaded() else f"_ops_cuda was not loaded: {cuda.problem()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if Path(item.path).parent == Path(__file__).parent]
    reason = _reason() if mine else None
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
