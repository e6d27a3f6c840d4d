"""search: scale of each group by least squared error, codes by nearest level."""

from __future__ import annotations

from torch import Tensor

from bitfold import ops
from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register


@register("search")
def search(weight: Tensor, fmt: Format, statistics: Statistics | None = None) -> Solution:  # noqa: ARG001
    """Tries scales around the extremes and keeps the best; `statistics` is not used."""
    return Solution(ops.quantize(weight, fmt, method="search"))
