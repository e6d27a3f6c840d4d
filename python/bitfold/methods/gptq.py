"""gptq: codes column by column, each error spread over the columns to come (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register


@register("gptq", calibrated=True)
def gptq(weight: Tensor, fmt: Format, statistics: Statistics | None = None, **options: Any) -> Solution:
    """Minimize tr(E H Eᵀ) of the error E in the Hessian H of the calibration data."""
    from bitfold import solvers

    assert statistics is not None  # fold_weight sees to it
    return solvers.gptq_quantize(weight, statistics.hessian, fmt, **options)
