"""torch's `linear` with a dense weight, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import copies_of
from torch.nn import functional

from peers.base import Peer


def dense(name: str, weight: torch.Tensor, threads: int) -> Peer:
    del threads  # torch's own setting
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    stored = weight.to(dtype)
    copies = [w for (w,) in copies_of([stored])]

    def bind(x: torch.Tensor) -> Callable[[int], torch.Tensor]:
        return lambda i: functional.linear(x, copies[i % len(copies)])

    return Peer(name, dtype, False, stored.numel() * stored.itemsize, stored.float(), bind, dense=True)


PEERS = {"torch fp32": dense, "torch bf16": dense}
