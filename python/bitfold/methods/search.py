"""search: scale of each group by least squared error, codes by nearest level."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfold import ops
from bitfold.formats import Format
from bitfold.methods.base import register


@register("search")
def search(weight: Tensor, fmt: Format, statistics: Any = None) -> list[Tensor]:  # noqa: ARG001
    """Tries scales around the extremes and keeps the best; `statistics` is not used."""
    return ops.quantize(weight, fmt, method="search")
