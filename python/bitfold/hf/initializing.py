"""Folded modules kept out of reach while transformers initializes what a checkpoint does not hold.

`_init_weights(parent)` may fill a child's weight by its shape (WhisperEncoder does), which a flat packed
weight does not have; and it must still run, since it also fills position ids and the like.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from bitfold.nn import PackedModule

__all__ = ["shield_folded", "unshield"]


class _StandIn(nn.Module):
    """What `_init_weights` sees of a folded child: a weight of the logical shape that holds no data."""

    def __init__(self, packed: PackedModule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(packed.shape, device="meta"), requires_grad=False)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]


def shield_folded(model: nn.Module) -> None:
    """Have every `_init_weights` in `model` meet stand-ins instead of folded children, until `unshield`."""
    for part in model.modules():
        original: Any = getattr(part, "_init_weights", None)
        if original is None:
            continue

        @functools.wraps(original)
        def initialize(module: nn.Module, original: Any = original) -> None:
            folded = {name: m for name, m in module._modules.items() if isinstance(m, PackedModule)}
            try:
                module._modules.update({name: _StandIn(packed) for name, packed in folded.items()})
                original(module)
            finally:
                module._modules.update(folded)

        part.__dict__["_init_weights"] = initialize


def unshield(model: nn.Module) -> None:
    """Undo `shield_folded`, so that the model can be copied and pickled."""
    for part in model.modules():
        part.__dict__.pop("_init_weights", None)
