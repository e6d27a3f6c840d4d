"""Native solvers of calibrated quantization: one wrapper per op with its fake kernel, a file per problem.

A solver sees one matrix ``W`` ``[out, in]`` and statistics of its input ``x`` ``[tokens, in]``, never a
model. What counts is ``||(W - Q) x||²`` summed over the tokens, which is ``tokens * tr(E H Eᵀ)`` with
``E = W - Q`` and ``H = mean(x xᵀ)``, the Hessian of that error.

    >>> import torch
    >>> x, weight = torch.randn(512, 64) @ torch.randn(64, 64), torch.randn(32, 64)
    >>> hessian = torch.zeros(64, 64)
    >>> hessian_update(hessian, x)
    (512, 0)
    >>> packed, report = gptq_quantize(weight, "int4-g16", hessian_finish(hessian))
    >>> report["loss"] < report["plain"]  # of rounding without feedback
    True
"""

from bitfold.solvers.awq import AwqReader, awq_clip, awq_scale
from bitfold.solvers.gptq import GPTQ_REPORT, ORDERS, SCALES, gptq_quantize, refit_scales, solves_on_gpu
from bitfold.solvers.hessian import cross_update, hessian_finish, hessian_update
from bitfold.solvers.hqq import hqq_solve

__all__ = [
    "GPTQ_REPORT",
    "ORDERS",
    "SCALES",
    "AwqReader",
    "awq_clip",
    "awq_scale",
    "cross_update",
    "gptq_quantize",
    "hessian_finish",
    "hessian_update",
    "hqq_solve",
    "refit_scales",
    "solves_on_gpu",
]
