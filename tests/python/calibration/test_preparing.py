"""What awq could not scale is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitfold
from bitfold import calibration


class Block(nn.Module):
    """The first norm feeds the residual too, so no scale can be folded into it."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(size), nn.LayerNorm(size)
        self.mix, self.up, self.down = nn.Linear(size, size), nn.Linear(size, 48), nn.Linear(48, size)

    def forward(self, x):
        x = self.norm(x)
        x = x + torch.tanh(self.mix(x))
        return x + self.down(torch.tanh(self.up(self.inner(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:little calibration data")
def test_what_gets_no_scale_is_reported_with_the_reason():
    model = Model().eval()
    data = [torch.randn(64, 32) for _ in range(3)]
    bitfold.quantize(
        model, "int3-g16", method="awq", calibration=data, embeddings=None, checkpoint=False, progress=False
    )
    report = calibration.report(model)
    for i in range(2):
        assert report[f"blocks.{i}.mix"]["no_scale"] == "no legal fold feeds it"
        assert report[f"blocks.{i}.down"]["no_scale"] == "no legal fold feeds it"
        assert report[f"blocks.{i}.up"]["scale"]["source"] == "inner"
        assert "no_scale" not in report[f"blocks.{i}.up"]
    assert report["head"]["no_scale"] == "it is in no block"
    (note,) = (note for note in report.notes if "no scale from norm" in note)  # of two blocks alike, one
    assert note.startswith("blocks.0 and blocks like it: no scale from norm: it feeds more than mix")
