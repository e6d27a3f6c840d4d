"""How far a product may be from float64 on the dequantized weight, by the levels of docs/kernels.md.

`assert_product` holds every output to the worst case, in which all roundings go the same way;
`assert_promise` holds many outputs together to what their level promises.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import reference
from bitfold import Format

HALF_ULP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PROMISED = {"auto": 2e-4, "fp32": 2e-6, "int8": 2.5e-2}  # relative root mean square, before y is stored
# (many rows of bfloat16 lose a little more, which its rounding hides)
UNIT = 64  # columns that share a scale of x; fewer lose less
LEVEL_LIMIT = {"auto": 7854, "int8": 127}  # a level of a codebook as an integer
SUM_LIMIT = 2**31 // 7854 - 32  # of |x| as integers over a unit, where levels are that large


def relative_error(y: Tensor, exact: np.ndarray) -> float:
    error = y.double().numpy().reshape(exact.shape) - exact
    return float(np.sqrt((error**2).mean() / (exact**2).mean()))


def assert_promise(y: Tensor, exact: np.ndarray, accuracy: str) -> None:
    """The product is as near as its level says, and then rounded once.

    What rounding costs is taken from `exact` itself: in bfloat16 it is 1.6e-3 for values of all sizes, and
    up to 2.3e-3 where most lie just above a power of two.
    """
    rounding = relative_error(torch.from_numpy(exact).to(y.dtype), exact)
    error = relative_error(y, exact)
    assert error <= 1.02 * np.hypot(PROMISED[accuracy], rounding), f"{accuracy}: {error}, rounding {rounding}"


def _with_all_codes(packed: list[Tensor], fmt: str, shape: tuple[int, int], code: int) -> np.ndarray:
    codes = reference.pack(np.full(shape, code, dtype=np.uint8), Format(fmt).bits).view(np.int8)
    return np.abs(reference.dequantize([codes, *packed[1:]], fmt, shape))


def _operands(packed: list[Tensor], fmt: str, shape: tuple[int, int], level: str) -> tuple:
    """Per weight: the magnitude of what is summed for it, and the largest level if those are rounded.

    Of the codes alone: outliers are multiplied as floats at every level.
    """
    packed, fmt = packed[: len(Format(fmt).dense.buffers(shape))], reference.dense(fmt)
    bits, codebook = Format(fmt).bits, reference.parse(fmt).family != "integer"
    if codebook:
        largest = np.max([_with_all_codes(packed, fmt, shape, c) for c in range(2**bits)], axis=0)
        return largest * (3.1 if level == "int8" else 1.01), largest
    zero, top = (_with_all_codes(packed, fmt, shape, c) for c in (0, 2**bits - 1))
    # zero * scale, and codes * scale, of which the last is at most both together
    return 2.0 * (zero + top) * 2**bits / (2**bits - 1), np.zeros(shape)


def allowed_error(
    x: np.ndarray, packed: list[Tensor], fmt: str, shape: tuple[int, int], level: str
) -> np.ndarray:
    """The most that [m, out] can be off before it is stored, for x [m, in] in float64."""
    weight = np.abs(reference.dequantize(packed, fmt, shape))
    cols = x.shape[1]
    sizes = np.abs(x)
    # each weight carries up to three roundings of its own, a chain of K / 16 + 16 additions sums them
    outliers = np.abs(reference.sparse(packed, fmt, shape))
    in_floats = (cols / 16 + 24) * 2.0**-24 * (sizes @ (weight + outliers).T)
    if level == "fp32":
        return in_floats
    size, largest = _operands(packed, fmt, shape, level)
    units = -(-cols // UNIT)
    padded = np.zeros((len(x), units * UNIT))
    padded[:, :cols] = sizes
    padded = padded.reshape(len(x), units, UNIT)
    step = padded.max(axis=2, initial=0.0) / (127 if level == "int8" else 32639)
    if level == "auto" and largest.any():
        step = np.maximum(step, padded.sum(axis=2) / SUM_LIMIT)
    half_step = np.repeat(0.51 * step, UNIT, axis=1)[:, :cols]
    in_floats += (cols + 24) * 2.0**-24 * (sizes @ outliers.T)  # one sum after another
    half_level = 0.51 * largest / LEVEL_LIMIT[level]
    lost = half_step @ (weight + outliers).T + sizes @ half_level.T + half_step @ half_level.T
    if Format(fmt).outliers:
        lost += in_floats
    return lost + (cols / 8 + 24) * 2.0**-24 * ((sizes + half_step) @ size.T)


def assert_product(
    y: Tensor,
    x: Tensor,
    packed: list[Tensor],
    fmt: str,
    bias: Tensor | None = None,
    accuracy: str = "auto",
) -> None:
    """Each output within what its level may lose at worst, and one store in y's dtype."""
    shape = (y.shape[-1], x.shape[-1])
    x64 = x.detach().double().numpy().reshape(-1, shape[1])
    b64 = bias.detach().to(x.dtype).double().numpy() if bias is not None else np.zeros(shape[0])
    expected = x64 @ reference.dequantize(packed, fmt, shape).T + b64
    bound = allowed_error(x64, packed, fmt, shape, accuracy)
    bound += (shape[1] / 8 + 24) * 2.0**-24 * np.abs(b64)
    bound += HALF_ULP[y.dtype] * 1.01 * (np.abs(expected) + bound) + 1e-7 * (y.dtype == torch.float16)
    error = np.abs(y.detach().double().numpy().reshape(expected.shape) - expected)
    if error.size:
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        assert error[worst] <= bound[worst], (
            f"{fmt} {accuracy} y{worst}: off by {error[worst]}, allowed {bound[worst]}"
        )
