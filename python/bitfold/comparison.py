"""What `bitfold.compare` finds: sums over rows, and how they are shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.tables import Table

__all__ = ["Comparison", "Deviation", "LayerComparison"]


@dataclass
class Deviation:
    """Sums over rows of outputs `[rows, features]`, float ones and folded ones."""

    rows: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    cosines: float = 0.0
    max_error: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Count the rows of one batch."""
        error = other - reference
        self.rows += len(reference)
        self.squared_error += float(error.double().square().sum())
        self.squared_norm += float(reference.double().square().sum())
        self.cosines += float(_cosines(reference, other).double().sum())
        self.max_error = max(self.max_error, float(error.abs().max()))

    @property
    def relative_mse(self) -> float:
        """Sum of squared errors by sum of squared float values."""
        if self.squared_norm == 0:
            return 0.0 if self.squared_error == 0 else math.inf
        return self.squared_error / self.squared_norm

    @property
    def cosine(self) -> float:
        """Mean cosine of rows."""
        return self.cosines / self.rows if self.rows else math.nan

    def to_dict(self) -> dict[str, float]:
        """JSON types."""
        return {
            "relative_mse": self.relative_mse,
            "cosine": self.cosine,
            "max_error": self.max_error,
            "rows": self.rows,
        }


@dataclass
class LayerComparison:
    """One folded module.

    Attributes:
        isolated: its outputs for the inputs that it has in the float model: its own error.
        accumulated: its outputs in the folded model: with the errors of all layers before it. Empty
            (`rows` 0) where the two models give it different numbers of rows, as routed experts.
    """

    name: str
    format: str
    isolated: Deviation = field(default_factory=Deviation)
    accumulated: Deviation = field(default_factory=Deviation)


@dataclass
class Comparison:
    """The result of `bitfold.compare`: prints as a table, shows as HTML in Jupyter, `to_dict()` for JSON.

    Attributes:
        layers: folded modules in the order in which they run; empty with `per_layer=False`.
        output: name of what is compared at the end: `"logits"`, `"last_hidden_state"` or `"output"`.
        final: deviation of that output.
        kl: mean KL(float || folded) in nats per row of logits, or None where there are none.
        top1: share of rows with the same largest logit, or None.
        perplexity: of the float and of the folded model, where targets are known: labels, or the next
            tokens of a causal language model; else None.
    """

    layers: list[LayerComparison]
    output: str
    final: Deviation
    batches: int
    kl: float | None = None
    top1: float | None = None
    perplexity: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "output": self.output,
            "batches": self.batches,
            "final": self.final.to_dict(),
            "kl": self.kl,
            "top1": self.top1,
            "perplexity": None if self.perplexity is None else list(self.perplexity),
            "layers": [
                {
                    "name": layer.name,
                    "format": layer.format,
                    "isolated": layer.isolated.to_dict(),
                    "accumulated": layer.accumulated.to_dict() if layer.accumulated.rows else None,
                }
                for layer in self.layers
            ],
        }

    def table(self) -> Table:
        """One line per layer, and the whole model."""
        cells = [["layer", "format", "own rel. MSE", "cosine", "max", "in place rel. MSE", "cosine", "max"]]
        for layer in self.layers:
            cells.append([layer.name, layer.format, *_cells(layer.isolated), *_cells(layer.accumulated)])
        cells.append([self.output, "", "", "", "", *_cells(self.final)])
        notes = [f"{self.batches} batches, {self.final.rows:,} rows"]
        if self.kl is not None and self.top1 is not None:
            notes.append(f"mean KL {self.kl:.3g} nats, top-1 agreement {self.top1:.2%}")
        if self.perplexity is not None:
            notes.append(f"perplexity {self.perplexity[0]:.4f} -> {self.perplexity[1]:.4f}")
        return Table(cells, notes, totals=1)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row; 1 for two rows of zeros."""
    zeros = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
    return torch.where(
        zeros, torch.ones(()).to(a), nn.functional.cosine_similarity(a.double(), b.double(), -1).to(a)
    )


def _cells(deviation: Deviation) -> list[str]:
    if not deviation.rows:
        return ["-", "-", "-"]
    return [f"{deviation.relative_mse:.3g}", f"{deviation.cosine:.5f}", f"{deviation.max_error:.3g}"]
