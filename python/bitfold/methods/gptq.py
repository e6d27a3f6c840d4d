"""gptq: codes column by column, each error made good by the columns to come (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bitfold import solvers
from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register


@register("gptq", calibrated=True)
def gptq(weight: Tensor, fmt: Format, statistics: Statistics | None = None, **options: Any) -> Solution:
    """Minimize tr(E H Eᵀ) of the error E. Options: those of `solvers.gptq_quantize`.

    Where `statistics` has the cross term (`Settings(float_stream=True)`), what earlier layers did to the
    input is made good too (GPTAQ, arXiv 2504.02692).
    """
    assert statistics is not None  # fold_weight sees to it
    packed, report = solvers.gptq_quantize(weight, fmt, statistics.hessian, cross=statistics.cross, **options)
    return Solution(packed, report)
