"""What takes the place of what when a matrix is folded."""

from __future__ import annotations

from torch import nn

from bitfold.choosing import Fold
from bitfold.manifest import bias_owner
from bitfold.nn import PackedModule, TiedEmbedding, TiedHead


def swaps_of(model: nn.Module, fold: Fold, packed: PackedModule) -> dict[nn.Module, nn.Module]:
    """What takes the place of what when `packed` comes for the matrix of `fold` and what is tied to it."""
    swaps: dict[nn.Module, nn.Module] = {fold.owner.module: packed}
    for use in fold.tied:
        if use.kind == "embedding":
            swaps[use.module] = TiedEmbedding.from_float(use.module, packed)
        else:
            swaps[use.module] = TiedHead.from_float(use.module, packed, bias_owner(model, use.module))
    return swaps
