"""The two searches of AWQ (Lin et al., arXiv 2306.00978): a scale per input channel, and clipped ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import FormatError
from bitfold.formats import Format, as_format
from bitfold.ops import METHODS, folds_on_gpu
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


@dataclass(frozen=True)
class AwqReader:
    """A matrix whose columns a scale multiplies, and what is known of its input x.

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, any strides.
        format: that it will be folded into.
        hessian: ``[in, in]``, mean of ``x xᵀ``, both halves filled.
        mean_abs: ``[in]``, mean of ``|x|``.
        channel: int64 ``[in]``, whose scale each column gets; -1 for none.
        tokens: rows of x that the means are of; the loss of a reader counts in proportion.
    """

    weight: Tensor
    format: Format
    hessian: Tensor
    mean_abs: Tensor
    channel: Tensor
    tokens: int


def awq_scale(readers: Sequence[AwqReader], channels: int) -> tuple[Tensor | None, dict[str, Any]]:
    """The scale of channels with which rounding the matrices that read them costs least.

    Tried are ``x^a`` and ``x^a / w^(1 - a)``, x the mean magnitude of a channel, w that of its weights as a
    share of the largest of their group, a = 0, 0.05, …, 0.95, each divided by the geometric mean of its
    extremes. With W' the weights, their columns multiplied by a scale, rounded by their format's own method,
    and divided by it again, the loss is the sum over readers of ``tokens * tr((W' - W) H (W' - W)ᵀ)``. Of
    matrices of more than 2^31 / in² rows as many are judged, but at least 64, evenly apart.

    Args:
        readers: one or more; formats may differ, columns need not all carry a channel.
        channels: how many there are.

    Returns:
        float32 ``[channels]``, or None where a scale of 1 is best; and ``{"alpha", "by": "x" or "x/w",
            "before", "after"}``, the losses of a scale of 1 and of the one that is returned.

    Raises:
        WeightError: not a float matrix, no elements, or a NaN or infinity; the reader is named.
        RuntimeError: tensors that do not fit each other, a channel that does not exist, a Hessian or mean
            that is not finite; the reader is named.
        ValueError: no reader.

    Example:
        >>> x = torch.randn(200, 32) * torch.where(torch.arange(32) % 8 == 0, 25.0, 1.0)
        >>> reader = AwqReader(
        ...     torch.randn(16, 32), "int3-g32", x.T @ x / 200, x.abs().mean(0), torch.arange(32), 200
        ... )
        >>> scale, report = awq_scale([reader], 32)
        >>> scale.shape, report["after"] < report["before"]
        (torch.Size([32]), True)
    """
    if not readers:
        msg = "awq_scale(): there must be at least one reader of the scaled channels"
        raise ValueError(msg)
    formats = [as_format(reader.format) for reader in readers]
    for reader in readers:
        check_weight("awq_scale", reader.weight)
    specs = [
        number
        for reader, fmt in zip(readers, formats, strict=True)
        for number in fmt.spec((reader.weight.shape[0], reader.weight.shape[1]))
    ]
    arguments = (
        [reader.weight.detach() for reader in readers],
        specs,
        [METHODS[fmt.default_method] for fmt in formats],
        [reader.hessian.float().contiguous() for reader in readers],
        [reader.channel.contiguous() for reader in readers],
        [reader.mean_abs.float().contiguous() for reader in readers],
        [reader.tokens for reader in readers],
        channels,
    )
    weight = readers[0].weight
    try:
        with exact_products(weight):
            if all(folds_on_gpu(fmt) for fmt in formats):
                scale, report = _ops.awq_scale(*arguments)
            else:
                scale, report = through_cpu(_ops.awq_scale, weight.device, *arguments)
    except RuntimeError as error:
        raise weight_error(error) from None
    better, alpha, by_weight, before, after = report.tolist()
    line = {"alpha": alpha, "by": "x/w" if by_weight else "x", "before": before, "after": after}
    return scale if better else None, line


def awq_clip(
    weight: Tensor, fmt: Format | str, hessian: Tensor, *, exact: Tensor | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """Folds a matrix, the range of each group cut off where that pays.

    Candidates for the scale (and zero point) of a group are the one that the format's own method chooses,
    and those of the range cut off at 0.95, 0.9, …, 0.55 of its largest magnitude. The one is taken that
    leaves the least ``e H e``, e the errors of a row over the columns of the group (in tiles of at most 512;
    what tiles share is left out), H the part of the Hessian that belongs to them.

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, any strides.
        fmt: a format with scales of groups or rows, without outliers.
        hessian: ``[in, in]``, mean of ``x xᵀ``, both halves filled.
        exact: bool or uint8 ``[out, in]`` or None: weights that are stored elsewhere without an error; their
            codes mean nothing.

    Returns:
        The packed tensors, and ``{"groups", "clipped", "before", "after"}``: how many groups of rows there
            are, of how many the range was cut, and the sum of ``e H e`` over all of them with the scales of
            the format's own method and with those chosen.

    Raises:
        WeightError: not a float matrix, no elements, or a NaN or infinity.
        FormatError: one scale for the tensor, learned levels, or outliers.
        RuntimeError: a Hessian of another shape, or one that is not finite.

    Example:
        >>> x, w = torch.randn(256, 32) @ torch.randn(32, 32), torch.randn(8, 32)
        >>> packed, report = awq_clip(w, "int3-g16", x.T @ x / 256)
        >>> report["groups"], report["after"] < report["before"]
        (16, True)
    """
    fmt = dense("awq_clip", fmt)
    check_weight("awq_clip", weight)
    if not can_clip(fmt):
        msg = f"awq_clip(): {fmt} has no ranges of groups or rows to clip; fold it by ops.quantize"
        raise FormatError(msg)
    try:
        with exact_products(weight):
            packed, report = _ops.awq_clip(
                weight.detach(),
                hessian.float().contiguous(),
                fmt.spec((weight.shape[0], weight.shape[1])),
                METHODS[fmt.default_method],
                None if exact is None else exact.to(torch.uint8).contiguous(),
            )
    except RuntimeError as error:
        raise weight_error(error) from None
    groups, clipped, before, after = report.tolist()
    return packed, {"groups": int(groups), "clipped": int(clipped), "before": before, "after": after}


def can_clip(fmt: Format) -> bool:
    """Whether a format has ranges of groups or rows."""
    return fmt.grouping != "tensor" and not fmt.code.startswith("kmeans")


@torch.library.register_fake("bitfold::awq_scale")
def _(weights: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
    channels = options[-1]
    return weights[0].new_empty((channels,), dtype=torch.float32), report_like(5)


@torch.library.register_fake("bitfold::awq_clip")
def _(
    weight: Tensor,
    hessian: Tensor,  # noqa: ARG001
    spec: Sequence[int],
    *_options: Any,
) -> tuple[list[Tensor], Tensor]:
    return empty_packed(weight, spec), report_like(4)
