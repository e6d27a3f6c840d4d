"""torch's `_weight_int4pack_mm_for_cpu`: asymmetric int4, groups of 64; bf16 scales, zeros, activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import copies_of

from peers.base import NotMeasured, Peer

GROUP = 64
_mm = torch.ops.aten._weight_int4pack_mm_for_cpu


def int4pack(name: str, weight: torch.Tensor, threads: int) -> Peer:
    del threads
    n, k = weight.shape
    if n % 16 or k % GROUP:
        raise NotMeasured(f"takes only multiples of 16 rows and {GROUP} columns")
    groups = weight.view(n, k // GROUP, GROUP)
    low, high = groups.aminmax(dim=-1)
    scale = ((high - low) / 15).clamp(min=1e-9).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()  # the value of code 8
    codes = torch.round((groups - zero[..., None]) / scale[..., None] + 8).clamp(0, 15)
    stands_for = ((codes - 8) * scale[..., None] + zero[..., None]).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    scale_and_zero = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()  # [k/g, n, 2]
    stored = [packed, scale_and_zero]
    copies = copies_of(stored)

    def bind(x: torch.Tensor) -> Callable[[int], torch.Tensor]:
        return lambda i: _mm(x, copies[i % len(copies)][0], GROUP, copies[i % len(copies)][1])

    nbytes = sum(t.numel() * t.itemsize for t in stored)
    return Peer(name, torch.bfloat16, False, nbytes, stands_for, bind)


PEERS = {"torch int4pack g64": int4pack}
