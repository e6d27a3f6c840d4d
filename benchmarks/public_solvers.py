"""What public implementations of GPTQ and HQQ do, written out in torch, and the package `hqq`.

The Hessian as one full product per sequence; the solve as Cholesky, inverse, Cholesky, then one column after
the other in blocks of 128, the rest of the matrix updated after each block, with min-max scales of static
groups; the half-quadratic loop from min-max scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitfold import Format

SEQUENCE = 2048  # rows of a batch of calibration data
BLOCK = 128


def public_hessian(x: Tensor) -> Tensor:
    """Mean of x xᵀ, one full product per sequence."""
    hessian, tokens = torch.zeros(x.shape[1], x.shape[1]), 0
    for batch in x.split(SEQUENCE):
        hessian *= tokens / (tokens + len(batch))
        tokens += len(batch)
        scaled = batch * tokens**-0.5
        hessian += scaled.T @ scaled
    return hessian


def public_gptq(weight: Tensor, hessian: Tensor, group: int, damping: float) -> Tensor:
    """Codes of 4 bits in falling order of the diagonal, decoded."""
    n = weight.shape[1]
    groups = weight.reshape(len(weight), n // group, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / 15).half().float().clamp(min=1e-8)
    zero = torch.round(-low / scale)
    order = torch.argsort(hessian.diag(), descending=True)
    h = hessian[order][:, order]
    h += damping * h.diag().mean() * torch.eye(n)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    u = torch.linalg.cholesky(inverse, upper=True)
    # Transposed, so that a column lies in one piece.
    w, scale, zero = weight.T[order], scale.T.contiguous(), zero.T.contiguous()
    q = torch.empty_like(w)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        block, errors = w[begin:end].clone(), torch.empty(end - begin, w.shape[1])
        inside = u[begin:end, begin:end]
        for i, column in enumerate(order[begin:end].tolist()):
            s, z = scale[column // group], zero[column // group]
            value = (torch.clamp(torch.round(block[i] / s) + z, 0, 15) - z) * s
            errors[i] = (block[i] - value) / inside[i, i]
            block[i:].addr_(inside[i, i:], errors[i], alpha=-1)
            q[begin + i] = value
        w[end:].addmm_(u[begin:end, end:].T, errors, alpha=-1)
    out = torch.empty_like(q)
    out[order] = q
    return out.T.contiguous()


def public_hqq(weight: Tensor, fmt: Format) -> Tensor:
    """The published loop in float32 torch, min-max scales; returns the decoded weights."""
    assert fmt.group_size is not None
    w, top = weight.reshape(-1, fmt.group_size), 2**fmt.bits - 1
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low) / top
    zero, beta, least = -low / step, 10.0, float("inf")
    for _ in range(20):
        codes = (w / step + zero).round_().clamp_(0, top)
        residual = w - (codes - zero) * step
        size = residual.abs()
        error = residual.sign() * (size - size**-0.3 / beta).clamp_min_(0)
        zero = (codes - (w - error) / step).mean(1, keepdim=True)
        beta *= 1.01
        mean = float(size.mean())
        if mean >= least:
            break
        least = mean
    codes = (w / step + zero).round_().clamp_(0, top)
    return ((codes - zero) * step).reshape(weight.shape)


def hqq_package(weight: Tensor, fmt: Format) -> Tensor:
    """The public package, as its own defaults have it on a CPU."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight,
        nbits=fmt.bits,
        group_size=fmt.group_size,
        axis=1,
        optimize=True,
        round_zero=False,
        device="cpu",
        compute_dtype=torch.float32,
    )
    return Quantizer.dequantize(packed, meta)
