"""gptq: codes column by column, each error made good by the columns to come (GPTQ, arXiv 2210.17323).

More than the paper: scales are chosen when a group is due, codes go through coordinate descent afterwards
(QuantEase, arXiv 2309.01885) and scales are fitted again; the mean error of the outputs goes into the bias,
so that only the deviations of the input from its mean are left to the codes; what earlier layers did to the
input is made good (GPTAQ, arXiv 2504.02692); formats with outliers store the most sensitive weights apart
(SpQR, arXiv 2306.03078).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfold import solvers
from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register
from bitfold.outliers import choose_outliers, fill_outliers

# Few tokens per input get more damping: on a sentence encoder at 3 bits, the mean cosine of held-out
# sentences rose from 0.958 to 0.963 (8 tokens per input) and from 0.968 to 0.971 (50).
_LEAST_DAMPING, _MOST_DAMPING, _DAMPING_OF_FEW = 0.01, 0.3, 2.0
_LADDER_END = 0.5  # as kMostDamping in csrc/solvers/factor.h


@register("gptq", calibrated=True, float_stream=True)
def gptq(
    weight: Tensor,
    fmt: Format,
    statistics: Statistics | None = None,
    *,
    damping: float | None = None,
    alpha: float | None = None,
    order: str = "groups",
    dynamic: bool | None = None,
    sweeps: int = 2,
    refit: int = 2,
    scales: str = "search",
    measured_rows: int = 64,
) -> Solution:
    """Minimize the error of the layer's outputs on the calibration data.

    Args:
        weight: float `[out, in]`.
        fmt: any Format.
        statistics: of the input.
        damping: as of `solvers.gptq_quantize`; None takes 0.01, or 2 by the number of tokens per input where
            that is more, up to 0.3: a Hessian of few tokens promises more than it keeps.
        alpha: how much of what earlier layers did to the input is made good, 0 to 1; None takes the more
            the more tokens there are. Needs the cross statistics (`Settings.float_stream`).
        order: of columns. `"groups"` goes through whole groups by importance; `"descending"` is act-order.
        dynamic: choose the scales of a group when it is due; None does so unless the order is descending.
        sweeps: of coordinate descent.
        refit: rounds of fitting the scales again.
        scales: as of `solvers.gptq_quantize`.
        measured_rows: as of `solvers.gptq_quantize`.

    Returns:
        Solution with a shift of the bias where the module has one.
    """
    assert statistics is not None  # fold_weight sees to it
    depth = statistics.tokens / weight.shape[1]
    if damping is None:
        damping = min(max(_LEAST_DAMPING, _DAMPING_OF_FEW / max(depth, 1e-9)), _MOST_DAMPING)
    if alpha and statistics.cross is None:
        msg = f"gptq: alpha={alpha} needs cross statistics: leave Settings.float_stream at None or True"
        raise ValueError(msg)
    if alpha is None:
        alpha = depth / (depth + 4)
    if dynamic is None:
        dynamic = order != "descending"
    options: dict[str, Any] = {
        "damping": damping,
        "order": order,
        "dynamic": dynamic,
        "sweeps": sweeps,
        "refit": refit,
        "scales": scales,
        "measured_rows": measured_rows,
    }
    hessian, cross = statistics.hessian, statistics.cross if alpha else None
    if statistics.bias:
        hessian, cross = _around_mean(hessian, cross, statistics)
    if fmt.outliers:
        packed, report = _with_outliers(weight, fmt, hessian, cross, alpha, options)
    else:
        packed, report = solvers.gptq_quantize(weight, fmt, hessian, cross=cross, alpha=alpha, **options)
    if cross is not None:
        report["alpha"] = round(alpha, 4)
    shift = _bias_shift(weight, packed, fmt, statistics, cross is not None) if statistics.bias else None
    return Solution(packed, report, shift)


def _around_mean(
    hessian: Tensor, cross: Tensor | None, statistics: Statistics
) -> tuple[Tensor, Tensor | None]:
    """Second moments of x - mean: the bias takes care of the rest.

    One token's worth of the mean stays in, as it is known no better: inputs that did not vary (all of them,
    for a matrix that saw a single token) would be taken for dead and lose their weights.
    """
    mean = statistics.mean
    share = 1 - 1 / max(statistics.tokens, 1)
    hessian = torch.addr(hessian, mean, mean, alpha=-share)
    # No variance is less than nothing, whatever rounding says.
    hessian.diagonal().clamp_(min=0)
    if cross is not None:
        assert statistics.mean_float is not None
        cross = torch.addr(cross, statistics.mean_float - mean, mean, alpha=-share)
    return hessian, cross


def _bias_shift(
    weight: Tensor, packed: list[Tensor], fmt: Format, statistics: Statistics, from_float: bool
) -> Tensor:
    """What the outputs lack on average."""
    from bitfold import ops

    folded = ops.dequantize(packed, fmt, (weight.shape[0], weight.shape[1]))
    source = statistics.mean_float if from_float and statistics.mean_float is not None else statistics.mean
    return weight.float() @ source - folded @ statistics.mean


def _with_outliers(
    weight: Tensor,
    fmt: Format,
    hessian: Tensor,
    cross: Tensor | None,
    alpha: float,
    options: dict[str, Any],
) -> tuple[list[Tensor], dict[str, Any]]:
    """Weights whose error costs most are stored apart; the codes are chosen around them."""
    factor = _factor(hessian, options["damping"])
    target, importance = weight.float(), hessian.diagonal().clamp_min(0)
    if factor is not None:
        if cross is not None:
            target = target + alpha * torch.cholesky_solve((target @ cross).t(), factor).t()
        importance = 1 / torch.cholesky_inverse(factor).diagonal()
        importance = importance.where(hessian.diagonal() > 0, 0)  # what a dead input carries costs nothing
    mask = choose_outliers(target, fmt, importance.contiguous())
    packed, report = solvers.gptq_quantize(target, fmt.dense, hessian, exact=mask, **options)
    report["outliers"] = fmt.outlier_count((weight.shape[0], weight.shape[1]))
    if factor is None:
        report["outliers_by"] = "the diagonal of the Hessian, which cannot be factored"
    return fill_outliers(packed, fmt, target, mask), report


def _factor(hessian: Tensor, damping: float) -> Tensor | None:
    """Cholesky factor of the damped Hessian, with more damping where that fails, as in the solver."""
    diagonal = hessian.diagonal()
    while damping <= _LADDER_END:
        added = damping * diagonal.mean() + (diagonal == 0).float()
        factor, failed = torch.linalg.cholesky_ex(hessian + torch.diag(added))
        if not failed:
            return factor
        damping = max(4 * damping, _LEAST_DAMPING)
    return None
