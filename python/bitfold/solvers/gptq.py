"""GPTQ and what goes with it: codes column by column, and scales fitted again (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bitfold.formats import Format, as_format
from bitfold.solvers._checks import (
    check_weight,
    dense,
    empty_packed,
    exact_products,
    report_like,
    through_cpu,
    weight_error,
)

_ops = torch.ops.bitfold

ORDERS = {"none": 0, "descending": 1, "groups": 2}
SCALES = {"range": 0, "search": 1, "search-factor": 2}

# What the native report holds, in its order.
GPTQ_REPORT = (
    "loss",
    "loss_damped",
    "loss_feedback",
    "predicted",
    "plain",
    "plain_damped",
    "measured",
    "tracked",
    "damping",
    "dead",
    "fp64",
    "fallback",
    "measured_rows",
    "refitted",
    "seconds_factor",
    "seconds_scales",
    "seconds_products",
    "seconds_columns",
)
_COUNTS = ("dead", "measured_rows", "refitted")
_FLAGS = ("fp64", "fallback")


def gptq_quantize(
    weight: Tensor,
    fmt: Format | str,
    hessian: Tensor,
    *,
    cross: Tensor | None = None,
    alpha: float = 1.0,
    order: str = "descending",
    damping: float = 0.01,
    scales: str = "search-factor",
    dynamic: bool = False,
    sweeps: int = 0,
    refit: int = 0,
    exact: Tensor | None = None,
    measured_rows: int = 64,
    timed: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Folds a matrix such that its products with the calibrated inputs change least (GPTQ, 2210.17323).

    Columns are rounded one after the other; what each leaves as an error is made good by those after it.
    With ``H = R Rᵀ``, R upper triangular, column k is rounded from ``w_k + sum_{j<k} e_j R_jk / R_kk``, which
    gives GPTQ's codes from a single Cholesky factorization. The loss that is left is
    ``sum_k R_kk² (that - q_k)²``, and ``tr(E H Eᵀ)`` at the same time.

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, any strides. The other tensors are on its device.
            What a GPU has no form of (`solves_on_gpu`) is solved by the CPU, which costs the way there and
            back; on a GPU the loss is that of the CPU to 1e-3, not every code.
        fmt: any format without outliers. Learned codebooks (kmeans) are weighted by the diagonal of H.
        hessian: ``[in, in]`` mean of ``x xᵀ``, both halves filled, float32 or float64.
        cross: ``[in, in]`` from `cross_update`, or None. Given, the matrix that is rounded is
            ``W + alpha W cross H⁻¹``, the least-squares answer to ``||W x_float - Q x||²``: the layer then
            makes good what quantizing the layers before it has done to its input. Losses are around that
            matrix.
        alpha: how far to go there, 0 to 1.
        order: of rounding. ``"descending"``: inputs by falling mean square ("act-order"); scales stay those
            of contiguous groups, nothing is permuted in storage. ``"groups"``: the same inside each group,
            and groups by their means. ``"none"``: first to last.
        damping: part of the mean diagonal of H added to its diagonal. Where H is not positive definite the
            factorization is tried in float64, then with more damping, in growing steps up to 0.5.
        scales: ``"range"`` (absmax or min-max of each group), ``"search"`` (least squared error weighted by
            the diagonal of H), ``"search-factor"`` (weighted by a geometric mean of that and R_kk², what an
            error costs once later columns have made good what they can).
        dynamic: choose the scales of a group when its first column is due, for the weights as the feedback
            has made them by then. Not with ``order="descending"``; no effect where a group is a whole row.
        sweeps: of cyclic coordinate descent after the columns (QuantEase, 2309.01885): each code in turn
            becomes the best one while all others stay. Never raises the loss.
        refit: rounds of fitting the scales again with codes fixed (`refit_scales`), each followed by one more
            sweep if ``sweeps`` is not 0. Never raises the loss.
        exact: bool or uint8 ``[out, in]`` or None: weights that are stored elsewhere without an error. They
            take no part in scales and pass no error on; their codes mean nothing.
        measured_rows: how many rows the report's direct measurements are taken of; all if negative. Each row
            costs ``4 in²`` operations.
        timed: whether the report holds the seconds of each part (else 0).

    Returns:
        The packed tensors, and a report; losses are sums over rows of ``e H eᵀ``:

            - ``loss``: of what is stored. ``loss_damped``: with the damped H, which is what was minimized.
            - ``loss_feedback``: the sum of squares that the column pass adds up, damped H, before sweeps and
              refits.
            - ``predicted``: what the column pass should leave, ``sum_k R_kk² mean(e_k²)``, with the errors of
              plain rounding. ``plain``, ``plain_damped``: what rounding without feedback would leave, same
              scales. All three are extrapolated from the measured rows.
            - ``measured``, ``tracked``: ``loss_damped`` of the measured rows, as ``tr(E H Eᵀ)`` and as added
              up on the way; equal but for rounding.
            - ``damping``: what was used. ``dead``: inputs that are always 0 (their weights become 0).
            - ``fp64``: the factorization took float64. ``fallback``: no damping helped, the weights were
              rounded plainly with searched scales.
            - ``measured_rows``, ``refitted`` (scales that refits changed); ``seconds_*`` where `timed`.

    Raises:
        WeightError: not a float matrix, no elements, or a NaN or infinity.
        FormatError: a format with outliers; solve for its `dense` with `exact`.
        ValueError: an option that does not exist.
        RuntimeError: a Hessian of another shape or dtype, or one that is not finite.

    Example:
        >>> x = torch.randn(256, 32) @ torch.randn(32, 32)
        >>> packed, report = gptq_quantize(torch.randn(8, 32), "nf4-g32", x.T @ x / 256, sweeps=2)
        >>> report["fallback"], report["dead"]
        (False, 0)
    """
    fmt = dense("gptq_quantize", fmt)
    check_weight("gptq_quantize", weight)
    by_order = _choice("gptq_quantize", "order", order, ORDERS)
    by_scales = _choice("gptq_quantize", "scales", scales, SCALES)
    spec = fmt.spec((weight.shape[0], weight.shape[1]))

    def solve(weight: Tensor, hessian: Tensor, cross: Tensor | None, exact: Tensor | None) -> Any:
        options = (
            by_order,
            damping,
            by_scales,
            dynamic,
            sweeps,
            refit,
            cross,
            alpha,
            exact,
            measured_rows,
            timed,
        )
        return _ops.gptq_quantize(weight, hessian, spec, *options)

    tensors = weight.detach(), hessian, cross, exact
    try:
        with exact_products(weight):
            if weight.is_cuda and not solves_on_gpu(fmt, scales, refit):
                packed, report = through_cpu(solve, weight.device, *tensors)
            else:
                packed, report = solve(*tensors)
    except RuntimeError as error:
        raise weight_error(error) from None
    values: dict[str, Any] = dict(zip(GPTQ_REPORT, report.tolist(), strict=True))
    values |= {name: int(values[name]) for name in _COUNTS} | {name: bool(values[name]) for name in _FLAGS}
    if not timed:
        values = {name: value for name, value in values.items() if not name.startswith("seconds_")}
    return packed, values


def refit_scales(
    packed: Sequence[Tensor],
    fmt: Format | str,
    weight: Tensor,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    sweeps: int = 2,
) -> tuple[list[Tensor], dict[str, float]]:
    """Fits the scales of a packed weight again in the metric of the Hessian; codes stay.

    With d the unit decode of a group and E the errors of its row, the scale moves by ``(d H E) / (d H d)``,
    a real zero point along with it, one group after the other (Gauss-Seidel). New values are rounded to how
    they are stored and kept where the loss of the row falls; double-quantized scales are kept or left as a
    whole. Learned codebooks come back as they are.

    Args:
        packed: the stored tensors.
        fmt: their format.
        weight: ``[out, in]``, what they should stand for.
        hessian: as in `gptq_quantize`.
        damping: as in `gptq_quantize`.
        sweeps: how often to go over the groups.

    Returns:
        New packed tensors, and ``{"before": …, "after": …}``, the losses ``tr(E H Eᵀ)`` with the damped H.

    Example:
        >>> x, w = torch.randn(256, 32) @ torch.randn(32, 32), torch.randn(8, 32)
        >>> packed = bitfold.ops.quantize(w, "int3-g16")
        >>> packed, losses = refit_scales(packed, "int3-g16", w, x.T @ x / 256)
        >>> losses["after"] < losses["before"]
        True
    """
    fmt = dense("refit_scales", fmt)
    check_weight("refit_scales", weight)
    spec = fmt.spec((weight.shape[0], weight.shape[1]))
    arguments = list(packed), spec, weight.detach(), hessian, damping, sweeps
    try:
        with exact_products(weight):
            if weight.is_cuda and not solves_on_gpu(fmt, "range", refit=1):
                refitted, report = through_cpu(_ops.refit_scales, weight.device, *arguments)
            else:
                refitted, report = _ops.refit_scales(*arguments)
    except RuntimeError as error:
        raise weight_error(error) from None
    return refitted, dict(zip(("before", "after"), report.tolist(), strict=True))


def solves_on_gpu(fmt: Format | str, scales: str = "search-factor", refit: int = 0) -> bool:
    """Whether `gptq_quantize` solves a matrix that lies on a GPU there.

    Example:
        >>> solves_on_gpu("int4-g64"), solves_on_gpu("kmeans4-row"), solves_on_gpu("int8-tensor")
        (True, False, False)
    """
    fmt = as_format(fmt)
    chosen_for_tensor = fmt.grouping == "tensor" and (scales != "range" or refit > 0)
    return not fmt.code.startswith("kmeans") and not chosen_for_tensor


def _choice(op: str, argument: str, value: str, known: dict[str, int]) -> int:
    if value not in known:
        msg = f"{op}(): {argument} must be one of {', '.join(known)}, got {value!r}"
        raise ValueError(msg)
    return known[value]


@torch.library.register_fake("bitfold::gptq_quantize")
def _(weight: Tensor, hessian: Tensor, spec: Sequence[int], *_options: Any) -> tuple[list[Tensor], Tensor]:  # noqa: ARG001
    return empty_packed(weight, spec), report_like(len(GPTQ_REPORT))


@torch.library.register_fake("bitfold::refit_scales")
def _(packed: Sequence[Tensor], spec: Sequence[int], *_options: Any) -> tuple[list[Tensor], Tensor]:  # noqa: ARG001
    return [torch.empty_like(p) for p in packed], report_like(2)
