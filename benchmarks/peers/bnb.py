"""bitsandbytes' nf4 on the CPU, blocks of 64, as its `Linear4bit` runs it.

On a CPU with AVX512-BF16 its first call in inference repacks the weight for a kernel that computes in bf16,
whatever the activations are. It also looks for one more kernel on a model hub; that is not asked for here
(`HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable

import torch
from harness import cold_copies

from peers.base import NotMeasured, Peer

# Before the import below: it looks for a kernel on the hub and warns when it finds none.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
from bitsandbytes import functional as bnb  # noqa: E402
from bitsandbytes.nn import Linear4bit, Params4bit  # noqa: E402


def linear4bit(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear4bit:
    """Its layer around `weight` [n, k], quantized."""
    n, k = weight.shape
    layer = Linear4bit(
        k, n, bias=bias is not None, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    layer.weight = Params4bit(
        weight.to(dtype).clone(), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.to(dtype), requires_grad=False)
    return layer.to("cpu").eval()  # moving quantizes


def nf4(name: str, weight: torch.Tensor, threads: int) -> Peer:
    del threads  # torch's own setting
    n, k = weight.shape
    if n % 32 or k % 64:
        raise NotMeasured("takes its fast way only for multiples of 32 rows and 64 columns")
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
    layer = linear4bit(weight, None, dtype)
    state = layer.weight.quant_state
    stands_for = bnb.dequantize_4bit(layer.weight.data, state).float().view(n, k)
    layer(torch.zeros(1, k, dtype=dtype))  # repacks
    state = layer.weight.quant_state
    if bnb.has_avx512bf16() and not getattr(state, "packing_format_for_cpu", False):
        raise NotMeasured("did not take its fast way")
    nbytes = sum(t.numel() * t.itemsize for t in (layer.weight.data, state.absmax))
    layers = [layer, *(copy.deepcopy(layer) for _ in range(cold_copies(nbytes) - 1))]

    def bind(x: torch.Tensor) -> Callable[[int], torch.Tensor]:
        # Its function, not its module: what the layer adds per call in Python is not counted against it.
        return lambda i: bitsandbytes.matmul_4bit(
            x, layers[i % len(layers)].weight, quant_state=layers[i % len(layers)].weight.quant_state
        )

    return Peer(name, dtype, False, nbytes, stands_for, bind)


PEERS = {"bitsandbytes nf4 fp32": nf4, "bitsandbytes nf4 bf16": nf4}
