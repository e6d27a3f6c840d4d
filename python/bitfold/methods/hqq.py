"""hqq: zero points under a norm that lets outliers keep their error; no data (Badri and Shaji, 2023)."""

from __future__ import annotations

from torch import Tensor

from bitfold import solvers
from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register


@register("hqq", suits=lambda fmt: fmt.zero == "float")
def hqq(
    weight: Tensor,
    fmt: Format,
    statistics: Statistics | None = None,  # noqa: ARG001
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 10,
) -> Solution:
    """Searched scales, then zero points that lower sum |w - decoded|^p; `statistics` is not used.

    Formats with real zero points (`-fz`) of groups or rows only: rounded to whole codes, such a zero point is
    one that `search` tries anyway, so other formats raise `FormatError` with the name of one that fits.
    """
    return Solution(solvers.hqq_solve(weight, fmt, p=p, beta=beta, kappa=kappa, iterations=iterations))
