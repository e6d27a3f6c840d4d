"""What a fold is, and how it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.nn.conv1d import is_conv1d


@dataclass(frozen=True)
class ScaleFold:
    """A legal fold: the output of `source` may be divided by s `[channels]`, its readers' columns multiplied.

    Args:
        source: module whose weight (and bias) is divided; a norm or a linear, named relative to the block.
        form: `"gain"` (weight / s), `"one_plus_gain"` ((1 + weight) / s - 1) or `"rows"` (of a linear).
        channels: of the source's output.
        readers: module -> int64 `[in]`, the channel that each of its input columns carries, -1 for none.
    """

    source: str
    form: str
    channels: int
    readers: dict[str, Tensor] = field(hash=False)


@torch.no_grad()
def apply_folds(block: nn.Module, folds: Sequence[ScaleFold], scales: Sequence[Tensor]) -> None:
    """Divide sources by their scale and multiply readers, in place; the block computes what it did.

    Args:
        block: that `folds` were found in.
        folds: any of them.
        scales: one per fold, `[channels]`, positive and finite; without effect on -1 columns.

    Raises:
        ValueError: a scale of another size, or not positive and finite.

    Example:
        >>> from bitfold.folds import find_folds
        >>> block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
        >>> x = torch.randn(5, 16)
        >>> expected, folds = block(x), find_folds(block, [((x,), {})]).folds
        >>> apply_folds(block, folds, [torch.rand(16) + 0.5])
        >>> bool(torch.allclose(block(x), expected, atol=1e-5))
        True
    """
    for fold, scale in zip(folds, scales, strict=True):
        if scale.shape != (fold.channels,):
            size = list(scale.shape)
            msg = f"apply_folds(): the scale of {fold.source} must be [{fold.channels}], got {size}"
            raise ValueError(msg)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            msg = f"apply_folds(): the scale of {fold.source} must be positive and finite"
            raise ValueError(msg)
        divide(block.get_submodule(fold.source), fold.form, scale)
        for name, channel in fold.readers.items():
            multiply(block.get_submodule(name), columns_of(channel, scale))


def columns_of(channel: Tensor, scale: Tensor) -> Tensor:
    """The factor of each column `[in]` of a reader, from the scale `[channels]` and its `channel` map."""
    channel = channel.to(scale.device)
    return torch.where(channel >= 0, scale[channel.clamp_min(0)], torch.ones((), device=scale.device))


def divide(module: nn.Module, form: str, scale: Tensor) -> None:
    """Divide the output of a norm or linear; `form` as in `ScaleFold`."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    by = scale.float()
    if form == "one_plus_gain":
        weight.copy_((1 + weight.float()) / by - 1)
    elif form == "rows" and not is_conv1d(module):
        weight.copy_(weight.float() / by[:, None])
    else:
        weight.copy_(weight.float() / by)
    if bias is not None:
        bias.copy_(bias.float() / by)


def multiply(module: nn.Module, columns: Tensor) -> None:
    """Multiply the columns of a linear by `[in]`."""
    weight: Any = module.weight
    by = columns.float()
    weight.copy_(weight.float() * (by[:, None] if is_conv1d(module) else by))
