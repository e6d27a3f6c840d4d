"""round: scale from the extremes of each group, codes by nearest level. One pass."""

from __future__ import annotations

from torch import Tensor

from bitfold import ops
from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register


@register("round")
def round(weight: Tensor, fmt: Format, statistics: Statistics | None = None) -> Solution:  # noqa: ARG001
    """Take absmax (symmetric) or min-max (asymmetric) scales; `statistics` is not used."""
    return Solution(ops.quantize(weight, fmt, method="round"))


register("minmax")(round)  # the name under which papers compare against it
