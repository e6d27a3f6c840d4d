"""The searches of AWQ, by what they leave of the products: tr(E H Eᵀ), E the error of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitfold import ops
from bitfold.folds import columns_of
from bitfold.formats import Format
from bitfold.methods.base import Statistics

_ALPHAS = [i / 20 for i in range(20)]
_CLIPS = [1 - i / 20 for i in range(10)]
_WORK = 1 << 31  # multiplications per candidate scale: of large matrices some rows are judged for all
_TILE = 512  # columns at a time where groups are larger; what they share is left out
_AT_ONCE = 1 << 24  # weights


@dataclass(frozen=True)
class Reader:
    """A matrix `[out, in]` whose columns a scale multiplies; `channel` `[in]` as in `ScaleFold.readers`."""

    weight: Tensor
    format: Format
    statistics: Statistics
    channel: Tensor


def search_scale(readers: list[Reader], channels: int) -> tuple[Tensor | None, dict[str, Any]]:
    """The scale `[channels]` with which rounding the readers costs least, or None where 1 is best.

    Tried are x^a and x^a / w^(1 - a), x the mean |input| of a channel, w its mean |weight| within its group,
    a from 0 to 0.95, each divided by the geometric mean of its extremes.

    Returns:
        The scale, and {"alpha", "by": "x" or "x/w", "before", "after": losses of the rows that were judged}.
    """
    inputs = _mean_per_channel(readers, [reader.statistics.mean_abs for reader in readers], channels)
    weights = _mean_per_channel(readers, [_relative_magnitude(reader) for reader in readers], channels)
    inputs = inputs.clamp_min(1e-4 * float(inputs.mean()) + 1e-30)
    weights = weights.clamp_min(1e-4)
    sampled = [_sampled(reader) for reader in readers]
    before = best = _loss(readers, sampled, torch.ones_like(inputs))
    scale: Tensor | None = None
    line: dict[str, Any] = {"alpha": 0.0, "by": "x"}
    for by in ("x", "x/w"):
        for alpha in _ALPHAS:
            tried = inputs**alpha if by == "x" else inputs**alpha / weights ** (1 - alpha)
            tried = tried / (tried.max() * tried.min()).sqrt()
            if (by == "x" and alpha == 0) or not bool((torch.isfinite(tried) & (tried > 0)).all()):
                continue
            loss = _loss(readers, sampled, tried)
            if loss < best:
                best, scale, line = loss, tried, {"alpha": alpha, "by": by}
    return scale, {**line, "before": before, "after": best}


def _loss(readers: list[Reader], sampled: list[Tensor], scale: Tensor) -> float:
    total = 0.0
    for reader, weight in zip(readers, sampled, strict=True):
        by = columns_of(reader.channel, scale)
        packed = ops.quantize(weight * by, reader.format)
        error = ops.dequantize(packed, reader.format, (weight.shape[0], weight.shape[1])) / by - weight
        share = reader.weight.shape[0] / weight.shape[0] * reader.statistics.tokens
        total += share * loss_of(error, reader.statistics.hessian)
    return total


def loss_of(error: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ): the mean over tokens of |E x|²."""
    return float(torch.einsum("ij,ij->", error @ hessian, error))


def _sampled(reader: Reader) -> Tensor:
    """Rows evenly apart, as many as the work allows."""
    rows, columns = reader.weight.shape
    wanted = min(rows, max(64, _WORK // (columns * columns)))
    return reader.weight[torch.linspace(0, rows - 1, wanted, device=reader.weight.device).long()]


def _relative_magnitude(reader: Reader) -> Tensor:
    """`[in]`: mean over rows of |w| / max |w| of its group."""
    magnitude = reader.weight.abs()
    size = reader.format.group_size or magnitude.shape[1]
    parts = [part / part.amax(1, keepdim=True).clamp_min(1e-30) for part in magnitude.split(size, dim=1)]
    return torch.cat(parts, dim=1).mean(0)


def _mean_per_channel(readers: list[Reader], values: list[Tensor], channels: int) -> Tensor:
    """Mean over all columns that carry a channel, weighted by tokens; 1 for channels that nobody reads."""
    total = torch.zeros(channels, device=values[0].device)
    count = torch.zeros_like(total)
    for reader, value in zip(readers, values, strict=True):
        read = reader.channel >= 0
        tokens = torch.full_like(value, float(reader.statistics.tokens))
        total.index_add_(0, reader.channel[read], (value * tokens)[read])
        count.index_add_(0, reader.channel[read], tokens[read])
    return torch.where(count > 0, total / count.clamp_min(1), torch.ones_like(total))


def clip(weight: Tensor, fmt: Format, hessian: Tensor) -> tuple[Tensor, int]:
    """The weights, each group cut off at a share of its largest magnitude (1 to 0.55) where that pays.

    Judged is the error of each row and group on its own, e H e over the columns of the group, in tiles of at
    most 512 columns. Formats with one scale per tensor and learned levels are left as they are.

    Args:
        weight: `[out, in]`.
        fmt: folded by its own method.
        hessian: `[in, in]`.

    Returns:
        float32 `[out, in]`, and how many groups were cut.
    """
    weight = weight.float()
    if fmt.grouping == "tensor" or fmt.code.startswith("kmeans"):
        return weight, 0
    columns = weight.shape[1]
    tiles = _Tiles(columns, fmt.group_size or columns, hessian)
    clipped, cut = torch.empty_like(weight), 0
    step = max(1, _AT_ONCE // columns)
    for first in range(0, weight.shape[0], step):
        part = weight[first : first + step]
        limit, count = _limits(part, fmt, tiles)
        clipped[first : first + step] = part.clamp(-limit, limit)
        cut += count
    return clipped, cut


def _limits(weight: Tensor, fmt: Format, tiles: _Tiles) -> tuple[Tensor, int]:
    largest = tiles.per_group(weight.abs(), "amax")
    best = torch.full_like(largest, float("inf"))
    share = torch.ones_like(largest)
    for tried in _CLIPS:
        limit = tiles.per_column(largest * tried)
        packed = ops.quantize(weight.clamp(-limit, limit), fmt)
        error = tiles.errors(ops.dequantize(packed, fmt, (weight.shape[0], weight.shape[1])) - weight)
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, torch.full_like(share, tried), share)
    return tiles.per_column(largest * share), int((share < 1).sum())


class _Tiles:
    """Columns cut in groups, and groups in tiles of at most `_TILE` with the Hessian of each."""

    def __init__(self, columns: int, group: int, hessian: Tensor) -> None:
        self._columns, self._group = columns, min(group, columns)
        self._groups = -(-columns // self._group)
        self._spans = [
            (at, min(at + _TILE, end), g)
            for g in range(self._groups)
            for end in [min((g + 1) * self._group, columns)]
            for at in range(g * self._group, end, _TILE)
        ]
        self._width = max(end - at for at, end, _ in self._spans)
        self._blocks = hessian.new_zeros(len(self._spans), self._width, self._width)
        for block, (at, end, _) in zip(self._blocks, self._spans, strict=True):
            block[: end - at, : end - at] = hessian[at:end, at:end]
        self._group_of = torch.tensor([g for _, _, g in self._spans], device=hessian.device)

    def errors(self, error: Tensor) -> Tensor:
        """The e H e of each row and group: `[out, in]` -> `[out, groups]`."""
        cut = error.new_zeros(len(self._spans), error.shape[0], self._width)
        for block, (at, end, _) in zip(cut, self._spans, strict=True):
            block[:, : end - at] = error[:, at:end]
        of_tiles = (torch.bmm(cut, self._blocks) * cut).sum(-1)
        return error.new_zeros(self._groups, error.shape[0]).index_add_(0, self._group_of, of_tiles).t()

    def per_group(self, values: Tensor, what: str) -> Tensor:
        """`[out, in]` -> `[out, groups]`."""
        return torch.stack([getattr(part, what)(1) for part in values.split(self._group, dim=1)], dim=1)

    def per_column(self, values: Tensor) -> Tensor:
        """`[out, groups]` -> `[out, in]`."""
        return values.repeat_interleave(self._group, dim=1)[:, : self._columns]
