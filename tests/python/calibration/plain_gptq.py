"""A slow GPTQ in a few lines of torch: error feedback from group to group; and the models that tests fold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfold import Format, methods, ops
from bitfold.methods import Solution, Statistics

NAME = "plain-gptq"


def plain_gptq(
    weight: Tensor, fmt: Format, statistics: Statistics | None = None, damping: float = 0.01
) -> Solution:
    assert statistics is not None
    size = fmt.group_size or weight.shape[1]
    hessian = statistics.hessian.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(hessian.shape[0]).double()
    # U upper with H^-1 = Uᵀ U
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    work, result = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], size):
        stop = min(start + size, weight.shape[1])
        part = work[:, start:stop].contiguous()
        folded = ops.dequantize(ops.quantize(part, fmt, "search"), fmt, tuple(part.shape))
        result[:, start:stop] = folded
        error = torch.linalg.solve_triangular(
            factor[start:stop, start:stop], part - folded, upper=True, left=False
        )
        work[:, stop:] -= error @ factor[start:stop, stop:]
    packed = ops.quantize(result, fmt, "search")
    final = weight - ops.dequantize(packed, fmt, tuple(weight.shape))
    loss = float(torch.einsum("oi,ij,oj->", final, statistics.hessian, final))
    return Solution(packed, {"loss": loss, "damping": damping})


def install() -> None:
    if NAME not in methods.names():
        methods.register(NAME, calibrated=True)(plain_gptq)


def parameters() -> dict[str, Any]:
    return {"method": NAME, "progress": False}
