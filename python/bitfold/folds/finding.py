"""The search for folds: every norm and linear of a block is tried as a source."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bitfold.folds.scaling import ScaleFold
from bitfold.folds.trial import Inputs, Trial


@dataclass(frozen=True)
class Findings:
    """Legal folds in the order in which their sources run, and what stood against others."""

    folds: list[ScaleFold]
    refused: dict[str, str]


@torch.no_grad()
def find_folds(block: nn.Module, inputs: Inputs, shared: Collection[int] = ()) -> Findings:
    """Try every norm and linear of `block` as the source of a fold.

    Args:
        block: any float module, in eval mode; a float32 copy of it is made and thrown away.
        inputs: `(args, kwargs)` of one or more calls, a few dozen tokens in all; with experts enough to
            reach each of them.
        shared: `id` of parameters that modules outside of the block use too: they are left alone.

    Returns:
        Folds that leave the output the same to `TOLERANCE`, at most one per reader.

    Example:
        >>> block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        >>> found = find_folds(block.eval(), [((torch.randn(8, 16),), {})])
        >>> [(fold.source, fold.form, list(fold.readers)) for fold in found.folds]
        [('0', 'gain', ['1']), ('1', 'rows', ['3'])]
    """
    trial = Trial(block, inputs, shared)
    folds: list[ScaleFold] = []
    refused: dict[str, str] = {}
    taken: set[str] = set()
    for name in trial.order:
        found = trial.try_source(name, taken)
        if isinstance(found, ScaleFold):
            folds.append(found)
            taken |= set(found.readers)
        elif found:
            refused[name] = found
    return Findings(folds, refused)


@torch.no_grad()
def holds(block: nn.Module, inputs: Inputs, folds: Sequence[ScaleFold], shared: Collection[int] = ()) -> bool:
    """Whether `folds`, found in a block like this one, are all legal here; much cheaper than `find_folds`."""
    trial = Trial(block, inputs, shared)
    return trial.try_together(folds)
