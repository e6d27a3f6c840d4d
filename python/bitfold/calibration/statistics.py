"""What is gathered of one input: Hessian and means; as running means over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold import solvers
from bitfold.methods import Statistics


class InputStatistics:
    """Running statistics of one input x `[..., n]`.

    Args:
        size: n.
        device: where the Hessian is.
        cross: also gather mean (x_float - x) xᵀ.
    """

    def __init__(self, size: int, device: torch.device, cross: bool = False) -> None:
        self.size = size
        self.tokens = 0
        self.dropped = 0  # rows that were not finite
        self.unmasked = False  # some x had another shape than the mask, so its padding was counted
        self.hessian = torch.zeros(size, size, device=device)
        self.mean = torch.zeros(size, device=device)
        self.mean_abs = torch.zeros(size, device=device)
        self.cross = torch.zeros(size, size, device=device) if cross else None
        self.mean_float = torch.zeros(size, device=device)  # with cross

    def add(self, x: Tensor, mask: Tensor | None = None, x_float: Tensor | None = None) -> None:
        """Count the rows of x.

        Args:
            x: `[..., n]`, any float dtype.
            mask: bool, as many elements as x has rows, False for rows that do not count; None counts all.
            x_float: what the float model fed, in x's shape, for `cross`.
        """
        rows = x.detach().reshape(-1, self.size).float()
        keep = torch.isfinite(rows).all(dim=1)
        if mask is not None:
            counted = mask.reshape(-1).to(keep.device)
            self.dropped += int((counted & ~keep).sum())
            keep &= counted
        else:
            self.dropped += int((~keep).sum())
        everything = bool(keep.all())
        rows = rows if everything else rows[keep]
        count = rows.shape[0]
        if count == 0:
            return
        solvers.hessian_update(self.hessian, rows, tokens=self.tokens)
        share = count / (self.tokens + count)
        self.mean.lerp_(rows.mean(dim=0), share)
        self.mean_abs.lerp_(rows.abs().mean(dim=0), share)
        if self.cross is not None:
            self._add_cross(rows, None if everything else keep, x_float)
        self.tokens += count

    def _add_cross(self, rows: Tensor, keep: Tensor | None, x_float: Tensor | None) -> None:
        assert self.cross is not None
        other = None if x_float is None else x_float.detach().reshape(-1, self.size).float()
        if other is not None and keep is not None and other.shape[0] == keep.shape[0]:
            other = other[keep]
        if other is None or other.shape != rows.shape or not bool(torch.isfinite(other).all()):
            self.cross = None  # the two models routed differently, or one of them overflowed
            return
        solvers.cross_update(self.cross, other, rows, tokens=self.tokens)
        self.mean_float.lerp_(other.mean(dim=0), rows.shape[0] / (self.tokens + rows.shape[0]))

    def complete(self) -> None:
        """Fill in the other half of the Hessian, once all is counted."""
        solvers.hessian_finish(self.hessian)

    def blend(self, other: InputStatistics, tokens: float) -> float:
        """Mix in `tokens` tokens' worth of `other`; returns the share of `other` in the result."""
        share = tokens / (self.tokens + tokens)
        for name in ("hessian", "mean", "mean_abs"):
            getattr(self, name).lerp_(getattr(other, name), share)
        self.cross = None
        return share

    def finish(self) -> Statistics:
        """The statistics as methods get them."""
        mean_float = None if self.cross is None else self.mean_float
        return Statistics(self.hessian, self.tokens, self.mean, self.mean_abs, self.cross, mean_float)

    def effective_rank(self) -> float:
        """(tr H)² / |H|²: how many directions of equal power would be as spread out as these."""
        trace = float(self.hessian.diagonal().double().sum())
        power = float(torch.linalg.vector_norm(self.hessian, dtype=torch.float64)) ** 2
        return trace * trace / power if power > 0 else 0.0


def mean_of(parts: list[InputStatistics]) -> InputStatistics:
    """The token-weighted mean over several inputs of one size (the experts of one role)."""
    total = InputStatistics(parts[0].size, parts[0].hessian.device)
    for part in parts:
        if part.tokens:
            share = part.tokens / (total.tokens + part.tokens)
            for name in ("hessian", "mean", "mean_abs"):
                getattr(total, name).lerp_(getattr(part, name), share)
            total.tokens += part.tokens
    return total
