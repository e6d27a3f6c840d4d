"""Places in a block where a scale per channel can be folded into the weights before and after, exactly.

A norm that feeds linears, a value projection and what reads its attention, the two ends of a gated MLP:
dividing the output channels of the one by s and multiplying the input columns of the others by s changes
nothing but what each of them is easy to quantize to (AWQ, arXiv 2306.00978). Nothing is known by name. A
candidate is tried: its output is scaled at random in a copy of the block, the linears whose input scales
along are found, column by column, and undone; where the block's output is then what it was, the fold is
legal. So norms with 1 + weight, grouped key-value heads, routers, experts and architectures yet to come are
covered, and a norm that also feeds a residual is not.
"""

from __future__ import annotations

from bitfold.folds.finding import Findings, find_folds, holds
from bitfold.folds.scaling import ScaleFold, apply_folds, columns_of
from bitfold.folds.trial import TOLERANCE, Inputs

__all__ = [
    "TOLERANCE",
    "Findings",
    "Inputs",
    "ScaleFold",
    "apply_folds",
    "columns_of",
    "find_folds",
    "holds",
]
