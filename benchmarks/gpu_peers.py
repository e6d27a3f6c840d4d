"""What `gpu.py` compares with: torch's bf16 and int4 products; bitsandbytes and Marlin where installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Calls = Sequence[Callable[[], Any]]
Copies = Callable[[Sequence[Tensor]], list[list[Tensor]]]
DEVICE = "cuda"


def random(*shape: int, seed: int = 0) -> Tensor:
    """From a generator of its own: torch's stays in capture mode, and raises, once a capture has failed."""
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


def random_codes(*shape: int, dtype: torch.dtype) -> Tensor:
    """Every bit by chance."""
    generator, info = torch.Generator(DEVICE).manual_seed(0), torch.iinfo(dtype)
    return torch.randint(info.min, info.max, shape, dtype=dtype, device=DEVICE, generator=generator)


@dataclass(frozen=True)
class Peer:
    """calls(x, copies_of): one call per cold copy. fold(copies of a weight), unfold(copies_of): likewise.

    Products and unfolding are recorded in graphs, folding is not.
    """

    nbytes: int
    calls: Callable[[Tensor, Copies], Calls]
    fold: Callable[[list[list[Tensor]]], Calls] | None = None
    unfold: Callable[[Copies], Calls] | None = None


def torch_bf16(weight: Tensor) -> Peer:
    dense = weight.bfloat16()

    def calls(x: Tensor, copies_of: Copies) -> Calls:
        return [lambda w=w: torch.nn.functional.linear(x, w[0]) for w in copies_of([dense])]

    return Peer(2 * dense.numel(), calls)


def torch_int4(weight: Tensor) -> Peer:
    """`_weight_int4pack_mm`, groups of 64 with bf16 scales and zeros; random codes: only time counts."""
    n, k = weight.shape

    def calls(x: Tensor, copies_of: Copies) -> Calls:
        codes = random_codes(n, k // 2, dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = random(k // 64, n, 2).bfloat16()
        return [
            lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 64, w[1])
            for w in copies_of([packed, scales])
        ]

    return Peer(n * k // 2 + n * k // 64 * 4, calls)


def bitsandbytes_nf4(weight: Tensor) -> Peer:
    """Blocks of 64, fp32 absmax. Where it is not installed every row says so."""

    def package() -> Any:
        import bitsandbytes

        return bitsandbytes

    def state_of(copy: list[Tensor], like: Any) -> Any:
        functional = package().functional
        return functional.QuantState(
            copy[1], like.shape, like.code, like.blocksize, like.quant_type, like.dtype
        )

    def stored() -> tuple[Tensor, Any]:
        codes, state = package().functional.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4")
        return codes, state

    def calls(x: Tensor, copies_of: Copies) -> Calls:
        codes, state = stored()
        copies = [(c[0], state_of(c, state)) for c in copies_of([codes, state.absmax])]
        return [lambda c=c: package().matmul_4bit(x, c[0].t(), quant_state=c[1]) for c in copies]

    def fold(weights: list[list[Tensor]]) -> Calls:
        package()
        # The bare op: the function around it also copies sixteen levels to the GPU.
        quantize = torch.ops.bitsandbytes.quantize_4bit.default
        return [lambda w=w: quantize(w[0], 64, "nf4", torch.uint8) for w in weights]

    def unfold(copies_of: Copies) -> Calls:
        codes, state = stored()
        copies = [(c[0], state_of(c, state)) for c in copies_of([codes, state.absmax])]
        return [lambda c=c: package().functional.dequantize_4bit(c[0], c[1]) for c in copies]

    return Peer(weight.numel() // 2 + weight.numel() // 16, calls, fold, unfold)


def marlin_int4(weight: Tensor) -> Peer:
    """Groups of 128, fp16; random codes: only time counts."""
    n, k = weight.shape

    def calls(x: Tensor, copies_of: Copies) -> Calls:
        try:
            from marlin import mul
        except ImportError as error:
            msg = "Marlin is not installed: its source, IST-DASLab/marlin, is compiled for the torch at hand"
            raise ImportError(msg) from error
        packed = random_codes(k // 16, 2 * n, dtype=torch.int32), random(k // 128, n).half()
        half, out = x.half(), torch.empty(len(x), n, dtype=torch.float16, device=DEVICE)
        locks = torch.zeros(n // 8, dtype=torch.int32, device=DEVICE)
        return [lambda w=w: mul(half, w[0], out, w[1], locks) for w in copies_of(packed)]

    return Peer(n * k // 2 + n * k // 128 * 2, calls)


PEERS: dict[str, Callable[[Tensor], Peer]] = {
    "torch bf16": torch_bf16,
    "torch int4pack g64": torch_int4,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "Marlin int4 g128": marlin_int4,
}
