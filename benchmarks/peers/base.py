"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


class NotMeasured(Exception):
    """Why a peer cannot run here: a shape that it does not take, an instruction that the CPU lacks."""


@dataclass(frozen=True)
class Peer:
    """One way of another library to compute ``x @ W.T`` [m, n].

    Attributes:
        name: in tables. dtype: of the activations that it takes. int8: whether it rounds activations to int8;
        "exact" peers do not. nbytes: of one copy of its weight. weight: float32 [n, k] that its bytes stand
        for: its own error is measured against this. bind: given x, the call of turn i. Turns rotate through
        cold copies. The result is a tensor [m, n], which
            the next call may overwrite.
        dense: whether the weight is not packed.
    """

    name: str
    dtype: torch.dtype
    int8: bool
    nbytes: int
    weight: torch.Tensor
    bind: Callable[[torch.Tensor], Callable[[int], torch.Tensor]]
    dense: bool = False
