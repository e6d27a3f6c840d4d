"""Running means of products of activations: what calibrated solvers know of the input of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitfold import ops  # noqa: F401  (loads the library)
from bitfold.solvers._checks import tf32_products

_ops = torch.ops.bitfold


def hessian_update(
    hessian: Tensor, x: Tensor, mask: Tensor | None = None, tokens: int = 0
) -> tuple[int, int]:
    """Takes a batch of inputs into the running mean of ``x xᵀ``; any split in batches gives one answer.

    Args:
        hessian: ``[in, in]``, float32 or float64, contiguous; updated in place. With ``tokens=0`` what it
            holds is not read. Sums are made in its dtype. Only what lies on and below the diagonal (and some
            more) is kept up to date: `hessian_finish` fills in the rest once all batches are in.
        x: ``[..., in]``, float32, float16 or bfloat16, on the same device. On a GPU products of float32 x are
            as exact as torch has been told (``torch.set_float32_matmul_precision``); those of 16-bit x, which
            TF32 holds exactly, are summed by tensor cores whatever it has been told.
        mask: bool or uint8, one entry per row of x: rows where it is 0 (padding) are passed over. None counts
            all.
        tokens: how many rows the mean stands for so far, i.e. the sum of what earlier calls counted.

    Returns:
        How many rows were counted, and how many were dropped because they hold a NaN or an infinity. Masked
            rows are neither.

    Raises:
        RuntimeError: shapes or dtypes that do not fit.

    Example:
        >>> h = torch.empty(4, 4)
        >>> first = hessian_update(h, torch.ones(3, 4))
        >>> hessian_update(h, torch.tensor([[1.0, 2, 3, 4], [float("nan")] * 4]), tokens=first[0])
        (1, 1)
        >>> hessian_finish(h)[0].tolist()
        [1.0, 1.25, 1.5, 1.75]
    """
    if x.is_cuda and x.dtype != torch.float32 and not torch.compiler.is_compiling():
        with tf32_products():
            return _ops.hessian_update(hessian, x.detach(), mask, tokens)
    return _ops.hessian_update(hessian, x.detach(), mask, tokens)


def hessian_finish(hessian: Tensor) -> Tensor:
    """Makes an updated Hessian symmetric, in place, and returns it.

    Example:
        >>> hessian_finish(torch.tensor([[1.0, float("nan")], [2.0, 3.0]])).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    _ops.hessian_finish(hessian)
    return hessian


def cross_update(
    cross: Tensor, x_float: Tensor, x: Tensor, mask: Tensor | None = None, tokens: int = 0
) -> tuple[int, int]:
    """Takes a batch into the running mean of ``(x_float - x) xᵀ`` (GPTAQ, 2504.02692).

    Args:
        cross: ``[in, in]``, float32 or float64, contiguous; updated in place, all of it.
        x_float: ``[..., in]``, what the float model would have fed.
        x: the same shape, what the model quantized so far does feed.
        mask: as in `hessian_update`.
        tokens: as in `hessian_update`.

    Returns:
        Rows counted, and rows dropped because either input is not finite there.

    Example:
        >>> c = torch.zeros(2, 2)
        >>> cross_update(c, torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
        (1, 0)
        >>> c.tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    return _ops.cross_update(cross, x_float.detach(), x.detach(), mask, tokens)


@torch.library.register_fake("bitfold::hessian_update")
def _(hessian: Tensor, x: Tensor, mask: Tensor | None, tokens: int) -> tuple[Any, Any]:  # noqa: ARG001
    context = torch.library.get_ctx()
    return context.new_dynamic_size(), context.new_dynamic_size()


@torch.library.register_fake("bitfold::hessian_finish")
def _(hessian: Tensor) -> None:
    pass


@torch.library.register_fake("bitfold::cross_update")
def _(
    cross: Tensor,  # noqa: ARG001
    x_float: Tensor,  # noqa: ARG001
    x: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    tokens: int,  # noqa: ARG001
) -> tuple[Any, Any]:
    context = torch.library.get_ctx()
    return context.new_dynamic_size(), context.new_dynamic_size()
