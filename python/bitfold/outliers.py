"""Formats with `-outliers`: which weights get a sparse fp16 value beside their code, and whether stored ones
make sense.

`bitfold.ops.quantize` does all of it for data-free methods. A method of its own kind goes step by step:

    mask = choose_outliers(weight, fmt, importance)        # which weights
    packed = …                                             # fill fmt.dense from set_aside(weight, fmt, mask)
    packed = fill_outliers(packed, fmt, weight, mask)      # what the codes left of the marked weights

On a GPU these steps are taken by the CPU, which costs the way there and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bitfold.errors import WeightError
from bitfold.formats import Format, as_format
from bitfold.ops import METHODS
from bitfold.solvers._checks import through_cpu

__all__ = ["choose_outliers", "fill_outliers", "outlier_problem", "set_aside"]

_ops = torch.ops.bitfold


def choose_outliers(
    weight: Tensor, fmt: Format | str, importance: Tensor | None = None, method: str | None = None
) -> Tensor:
    """Marks the weights that cost a format most: the largest ``importance[col] * (w - q)**2``.

    `q` is what the dense format would store if its scales were chosen without the outliers: first those
    farthest from the middle of their group are set aside and the rest is folded, then what each weight loses
    on that grid is compared (SpQR, arXiv 2306.03078, section 3, with a count in place of its threshold).

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, finite.
        fmt: a format with outliers.
        importance: ``[in]``, finite and not negative; SpQR's sensitivity is ``1 / diag(H^-1)`` (the factor
            1/2 changes nothing). None: all columns alike.
        method: how the scales of the dense format are chosen, default the format's own.

    Returns:
        uint8 ``[out, in]`` with exactly ``fmt.outlier_count((out, in))`` ones.

    Raises:
        WeightError: a NaN or infinite weight.
        RuntimeError: tensors that do not fit each other, a format without outliers.

    Example:
        >>> w = torch.randn(8, 64)
        >>> w[3, 7] = 100.0
        >>> int(choose_outliers(w, "int4-g64-outliers")[3, 7])
        1
    """
    fmt = as_format(fmt)
    if importance is not None:
        importance = importance.detach().float()
    method = fmt.default_method if method is None else method
    try:
        return through_cpu(
            _ops.choose_outliers,
            weight.device,
            weight.detach(),
            _spec(fmt, weight),
            METHODS[method],
            importance,
        )
    except RuntimeError as error:
        if "every weight must be finite" in str(error):
            raise WeightError(str(error).splitlines()[0]) from None
        raise


def set_aside(weight: Tensor, fmt: Format | str, mask: Tensor) -> Tensor:
    """The weight that the dense part is chosen for: outliers moved into the range of their group's others.

    Args:
        weight: ``[out, in]``.
        fmt: a format with outliers.
        mask: what `choose_outliers` returned.

    Returns:
        float32 ``[out, in]``, a copy.

    Example:
        >>> w, mask = torch.tensor([[9.0] + [1.0] * 15]), torch.tensor([[1] + [0] * 15], dtype=torch.uint8)
        >>> float(set_aside(w, "int4-g16-outliers", mask).max())
        1.0
    """
    fmt = as_format(fmt)
    return through_cpu(_ops.set_aside_outliers, weight.device, weight.detach(), _spec(fmt, weight), mask)


def fill_outliers(packed: Sequence[Tensor], fmt: Format | str, weight: Tensor, mask: Tensor) -> list[Tensor]:
    """Completes a dense packed weight with the sparse values: what its codes left of the marked weights.

    Args:
        packed: the tensors of ``fmt.dense`` (or of `fmt`, whose sparse ones are then made anew).
        fmt: a format with outliers.
        weight: ``[out, in]``, what the marked places are to stand for in the end.
        mask: uint8 ``[out, in]`` with exactly ``fmt.outlier_count((out, in))`` ones.

    Returns:
        The tensors of ``fmt.buffers((out, in))``, the dense ones as they were.

    Example:
        >>> fmt, w = Format("int4-g64-outliers"), torch.randn(8, 64)
        >>> mask = choose_outliers(w, fmt)
        >>> packed = fill_outliers(bitfold.ops.quantize(set_aside(w, fmt, mask), fmt.dense), fmt, w, mask)
        >>> len(packed) == len(fmt.buffers((8, 64)))
        True
    """
    fmt = as_format(fmt)
    spec = _spec(fmt, weight)
    dense = list(packed[: len(fmt.dense.buffers((weight.shape[0], weight.shape[1])))])
    return dense + through_cpu(_ops.fill_outliers, weight.device, dense, spec, weight.detach(), mask)


def _spec(fmt: Format, weight: Tensor) -> list[int]:
    if weight.dim() != 2 or weight.numel() == 0:
        msg = f"weight must be a matrix [out, in] with at least one element, got {tuple(weight.shape)}"
        raise WeightError(msg)
    return fmt.spec((weight.shape[0], weight.shape[1]))


def outlier_problem(
    name: str, stored: Mapping[str, Tensor], fmt: Format, shape: tuple[int, int]
) -> str | None:
    """One sentence on why stored row starts and columns cannot be those of a weight, or None where they can.

    Whatever they hold, no kernel leaves its buffers; but what it computes would be nobody's weight.

    Args:
        name: of the parameter, such as ``"fc.weight"``.
        stored: tensors by their suffix; ``_outlier_row`` and ``_outlier_column`` in the dtypes and shapes of
            the format.
        fmt: their format.
        shape: ``(out, in)``.
    """
    if fmt.outliers == 0 or stored["_outlier_row"].is_meta or stored["_outlier_column"].is_meta:
        return None
    cols, count = shape[1], fmt.outlier_count(shape)
    starts, columns = stored["_outlier_row"].long(), stored["_outlier_column"].long()
    if stored["_outlier_column"].dtype == torch.int16:
        columns &= 0xFFFF  # unsigned
    if int(starts[0]) != 0 or int(starts[-1]) != count:
        found = f"from {int(starts[0])} to {int(starts[-1])}"
        return f"{name}_outlier_row: goes {found}, expected from 0 to {count} (format {fmt})"
    falls = (starts.diff() < 0).nonzero()
    if len(falls):
        row = int(falls[0])
        found = f"row {row} goes from {int(starts[row])} to {int(starts[row + 1])}"
        return f"{name}_outlier_row: {found}, expected no row to end before it starts"
    outside = ((columns < 0) | (columns >= cols)).nonzero()
    if len(outside):
        place = int(outside[0])
        return f"{name}_outlier_column: {int(columns[place])} at {place}, expected 0 to {cols - 1}"
    ascends = columns.diff() > 0
    inner = starts[(starts > 0) & (starts < count)]
    ascends[inner - 1] = True  # the first of a row follows the last of another one
    broken = (~ascends).nonzero()
    if len(broken):
        place = int(broken[0])
        found = f"{int(columns[place + 1])} after {int(columns[place])} at {place + 1}"
        return f"{name}_outlier_column: {found} in the same row, expected columns to ascend"
    return None


# ---- fake kernels ----


@torch.library.register_fake("bitfold::choose_outliers")
def _(weight: Tensor, spec: Sequence[int], method: int, importance: Tensor | None) -> Tensor:
    return weight.new_empty(tuple(weight.shape), dtype=torch.uint8)


@torch.library.register_fake("bitfold::set_aside_outliers")
def _(weight: Tensor, spec: Sequence[int], mask: Tensor) -> Tensor:
    return weight.new_empty(tuple(weight.shape), dtype=torch.float32)


@torch.library.register_fake("bitfold::fill_outliers")
def _(dense: Sequence[Tensor], spec: Sequence[int], weight: Tensor, mask: Tensor) -> list[Tensor]:
    from bitfold import _C

    buffers = _C.buffers_of_spec(list(spec))[len(dense) :]
    return [weight.new_empty(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in buffers]
