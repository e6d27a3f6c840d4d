"""A small model with everything that can be folded, and what tests ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import bitfold


class Toy(nn.Module):
    """Embedding, two layers, a head that may be tied, norms."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32, padding_idx=0)
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32, bias=False)])
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 50)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.embed(indices)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(self.norm(x))


INDICES = torch.arange(12).reshape(2, 6)


def fold(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return bitfold.quantize(model, *args, progress=False, **kwargs)


def kinds(model: nn.Module) -> dict[str, str]:
    """name -> "nf4" or "float" for everything that could be folded."""
    result = {}
    for name, module in model.named_modules():
        if hasattr(module, "format"):
            result[name] = str(module.format)
        elif isinstance(module, nn.Linear | nn.Embedding):
            result[name] = "float"
    return result


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
