"""One wrapper per native op, with its fake kernel and autograd formula beside it.

The ops live in ``torch.ops.bitfold`` (``csrc/torch/schemas.cc``); these wrappers take a `Format` instead of
bare ints and raise the exceptions of `bitfold.errors`. `packed` is always the list of stored tensors in the
order of `Format.buffers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bitfold import _C, cuda
from bitfold.errors import WeightError
from bitfold.formats import Format, as_format

torch.ops.load_library(str(Path(__file__).with_name("_ops.so")))
cuda.load_with_cuda()
_ops = torch.ops.bitfold
# The overloads themselves: choosing one, and attributes of `torch.ops`, cost time in every call.
_linear, _linear_nograd = _ops.linear.default, _ops.linear_nograd.default
_linear_grad_input = _ops.linear_grad_input.default

METHODS = {"round": 0, "search": 1}
ACCURACY = {"auto": 0, "fp32": 1, "int8": 2}  # what each level promises: `linear`
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ROWS, _COLS = -2, -1  # where a spec holds the logical shape


def quantize(weight: Tensor, fmt: Format | str, method: str | None = None) -> list[Tensor]:
    """Folds a matrix into the buffers of a format.

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, any strides; read once, or twice where all scales
            must be known before the first code (double quantization, learned codebooks).
        fmt: how to store it.
        method: ``"round"`` (scale from absmax or min-max), ``"search"`` (scale by squared error), or None
            for the format's default. Learned codebooks (kmeans) have no scale and come out the same.

    Returns:
        The tensors of ``fmt.buffers((out, in))``, freshly allocated on the weight's device; the same bits on
            every CPU, thread count and GPU. For a weight on a GPU some formats are folded by the CPU, which
            costs the way there and back: learned codebooks, outliers, and one searched scale for the tensor
            (`folds_on_gpu`).

    Raises:
        WeightError: not a float matrix, no elements, or a NaN or infinity (its place is named).

    Example:
        >>> packed = quantize(torch.randn(8, 64), "int4-g64")
        >>> [tuple(t.shape) for t in packed]
        [(256,), (8, 1), (1,), (8,)]
    """
    fmt = as_format(fmt)
    method = fmt.default_method if method is None else method
    if method not in METHODS:
        msg = f"quantize(): method must be one of {', '.join(METHODS)}, got {method!r}"
        raise ValueError(msg)
    if weight.dtype not in _FLOATS:
        msg = f"quantize(): weight must be float32, float16 or bfloat16, got {weight.dtype}"
        raise WeightError(msg)
    if weight.dim() != 2:
        msg = (
            f"quantize(): weight must be 2-D [out, in], got {weight.dim()}-D {tuple(weight.shape)}; "
            "flatten the leading dimensions first"
        )
        raise WeightError(msg)
    if weight.numel() == 0:
        msg = f"quantize(): weight must have at least one element, got {tuple(weight.shape)}"
        raise WeightError(msg)
    weight = weight.detach()
    if weight.is_cuda:
        if not folds_on_gpu(fmt, method):
            return [tensor.to(weight.device) for tensor in quantize(weight.cpu(), fmt, method)]
        check_finite_on_gpu(weight)
    try:
        return _ops.quantize(weight, fmt.spec((weight.shape[0], weight.shape[1])), METHODS[method])
    except RuntimeError as error:
        if "every weight must be finite" in str(error):
            raise WeightError(str(error).splitlines()[0]) from None
        raise


def folds_on_gpu(fmt: Format | str, method: str | None = None) -> bool:
    """Whether `quantize` folds a weight that lies on a GPU there.

    Example:
        >>> folds_on_gpu("nf4"), folds_on_gpu("kmeans4-row")
        (True, False)
    """
    fmt = as_format(fmt)
    method = fmt.default_method if method is None else method
    searched_tensor = fmt.grouping == "tensor" and method == "search"
    return not fmt.code.startswith("kmeans") and fmt.outliers == 0 and not searched_tensor


def _waits_for_gpu(tensor: Tensor) -> bool:
    """Whether numbers on a GPU may be looked at now: not while a CUDA graph is recorded or code compiled."""
    return not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def check_finite_on_gpu(weight: Tensor, op: str = "quantize") -> None:
    """What the CPU's op looks for itself. A kernel can neither raise nor be waited for in a graph: the ops
    for GPUs let such a group decode to NaN, and the question is asked here, at the price of one more reading.
    """
    if not _waits_for_gpu(weight):
        return
    low, high = torch.aminmax(weight)
    if bool(torch.isfinite(torch.stack((low, high))).all()):
        return
    row, col = (~torch.isfinite(weight)).nonzero()[0].tolist()
    kind = "NaN" if bool(weight[row, col].isnan()) else "infinite"
    msg = f"bitfold::{op}: weight[{row}, {col}] is {kind}; every weight must be finite"
    raise WeightError(msg)


def dequantize(
    packed: Sequence[Tensor], fmt: Format | str, shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """The float matrix that the packed one stands for.

    Args:
        packed: the stored tensors; on the CPU codes may lie in panels (`bitfold.set_layout`).
        fmt: their format.
        shape: ``(out, in)``.
        dtype: float32, float16 or bfloat16; each weight is computed in float32 and rounded once.

    Returns:
        ``[out, in]``, contiguous.

    Example:
        >>> w = torch.randn(4, 64)
        >>> dequantize(quantize(w, "int8-row"), "int8-row", (4, 64)).shape
        torch.Size([4, 64])
    """
    return _ops.dequantize(list(packed), as_format(fmt).spec(shape), dtype)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    spec: Sequence[int],
    bias: Tensor | None = None,
    accuracy: str | int = "auto",
) -> Tensor:
    """``x @ dequantize(packed).T + bias`` without a float copy of the weight.

    Args:
        x: ``[..., in]``, float32, float16 or bfloat16, any strides, any number of rows including none.
        packed: the stored tensors; on the CPU codes may lie in panels (`bitfold.set_layout`).
        spec: ``fmt.spec((out, in))``.
        bias: ``[out]``, or None.
        accuracy: how exactly the product is computed, as a name or its number in `ACCURACY`. Errors are
            relative to the root mean square of the product, against float64 on the dequantized weights.

            - ``"auto"``: the fastest way whose error is that of rounding the result: below 2e-4 for
              float32 x, 2e-3 for float16 and bfloat16, with weights and activations as models have them
              (``docs/kernels.md`` tells where not).
            - ``"fp32"``: every product and sum in float32. On a GPU more than 32 rows of x, and at ``"auto"``
              as many of float32 x, are multiplied by torch, in TF32 where it has been told so
              (``torch.set_float32_matmul_precision``).
            - ``"int8"``: x is rounded to 8 bits in blocks of 64 along ``in``; an error of about 1.4e-2.

    Returns:
        ``[..., out]`` in x's dtype, or in autocast's where that is on. Differentiable in x and bias; the
            packed weight is frozen. The gradient is computed in float32 whatever the accuracy; on a GPU
            one of 16 bits is multiplied by torch, with weights that are rounded to its dtype.

    Raises:
        ValueError: an accuracy of another name.
        RuntimeError: tensors that do not fit the spec or each other, an accuracy of another number.

    Example:
        >>> fmt, w = Format("nf4"), torch.randn(8, 64)
        >>> linear(torch.randn(3, 64), quantize(w, fmt), fmt.spec((8, 64))).shape
        torch.Size([3, 8])
    """
    if isinstance(accuracy, str):
        accuracy = accuracy_level(accuracy)
    device = "cpu" if x.is_cpu else x.device.type  # `.type` alone costs a third of a microsecond
    # (The meta device knows no autocast and raises when asked.)
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in _FLOATS:
        x = x.to(torch.get_autocast_dtype(device))  # what F.linear does there
    if not torch.is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _linear_nograd(x, packed, spec, bias, accuracy)
    # Graphs hold the registered op. Its way to the formula costs 50 microseconds a call, so that eager code
    # goes another one.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _linear(x, packed, spec, bias, accuracy)
    return _EagerLinear.apply(x, packed, spec, bias, accuracy)


def linear_mixed(
    x: Tensor,
    packed: Sequence[Tensor],
    spec: Sequence[int],
    bias: Tensor | None = None,
    threshold: float = 6.0,
    columns: Sequence[int] | None = None,
) -> Tensor:
    """``x @ dequantize(packed).T + bias`` as LLM.int8() computes it (arXiv 2208.07339, equation 8).

    Columns j of x with any ``|x[i, j]| > threshold`` are multiplied in float32 with the dequantized weight;
    all others as 8-bit integers, ``q = round(127 x / c)`` with c the largest magnitude left in the row of x:
    sums of integers are exact, and become floats by ``c / 127`` and the scale of the weight's row.

    Args:
        x: ``[..., in]``, float32, float16 or bfloat16. All leading dimensions together are the batch whose
            columns are searched: a row's result depends on the others, unless `columns` are given.
        packed: the stored tensors of ``int8-row`` (also ``int8-row-dq`` and ``int8-tensor``).
        spec: ``fmt.spec((out, in))``.
        bias: ``[out]``, or None.
        threshold: not negative; NaN counts as above it.
        columns: the outlier columns, ascending, where they are known beforehand: none is searched for then,
            and larger values elsewhere are rounded like the rest.

    Returns:
        ``[..., out]`` in x's dtype, or in autocast's. Differentiable in x and bias as `linear` is: through
            the dequantized weight.

    Raises:
        RuntimeError: another format, columns out of range or order, tensors that do not fit.

    Example:
        >>> fmt, w = Format("int8-row"), torch.randn(8, 64)
        >>> x = torch.randn(3, 64)
        >>> x[:, 5] *= 100
        >>> y = linear_mixed(x, quantize(w, fmt), fmt.spec((8, 64)))
        >>> bool((y - x @ w.T).abs().max() < 0.02 * (x @ w.T).abs().max())
        True
    """
    device = "cpu" if x.is_cpu else x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype in _FLOATS:
        x = x.to(torch.get_autocast_dtype(device))
    return _ops.linear_mixed(x, packed, spec, bias, threshold, columns)


def accuracy_level(accuracy: str | int) -> int:
    """The number that `linear` takes, from a key of `ACCURACY` or such a number.

    Example:
        >>> accuracy_level("int8")
        2
    """
    level = ACCURACY.get(accuracy) if isinstance(accuracy, str) else accuracy
    if type(level) is not int or level not in ACCURACY.values():
        msg = f"accuracy must be one of {', '.join(ACCURACY)}, got {accuracy!r}"
        raise ValueError(msg)
    return level


def embedding(indices: Tensor, packed: Sequence[Tensor], spec: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Rows ``indices`` of a packed table ``[rows, dim]``.

    Args:
        indices: int64 or int32, any shape; each within ``[0, rows)``.
        packed: the stored tensors; on the CPU codes may lie in panels (`bitfold.set_layout`).
        spec: ``fmt.spec((rows, dim))``.
        dtype: of the result.

    Returns:
        ``[*indices.shape, dim]``; touches only the bytes of the rows asked for.

    Raises:
        RuntimeError: an index out of range, naming it. On a GPU it fails an assertion there, as in torch's
            own embedding: a sentence on stderr, and CUDA is at an end in this process.

    Example:
        >>> fmt, table = Format("int8-g64"), torch.randn(10, 64)
        >>> embedding(torch.tensor([[1, 2]]), quantize(table, fmt), fmt.spec((10, 64)), torch.float32).shape
        torch.Size([1, 2, 64])
    """
    return _ops.embedding(indices, packed, spec, dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes to bytes: every row starts on a byte, the first code in the high bits (docs/format.md).

    Args:
        codes: uint8 ``[rows, cols]``, each below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        int8, 1-D.

    Example:
        >>> pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
        [18, 48]
    """
    if codes.is_cuda and bits in (2, 3, 4) and codes.numel() > 0 and _waits_for_gpu(codes):
        _check_codes(codes, bits)
    return _ops.pack_bits(codes, bits)


def _check_codes(codes: Tensor, bits: int) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8 or int(codes.max()) < 1 << bits:
        return
    row, col = (codes >= 1 << bits).nonzero()[0].tolist()
    found = f"codes[{row}, {col}] is {int(codes[row, col])}"
    msg = f"bitfold::pack_bits: {found}, too large for {bits} bits"
    raise RuntimeError(msg)


def unpack_bits(packed: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """The codes behind `pack_bits`: int8 1-D to uint8 ``[rows, cols]``.

    Example:
        >>> unpack_bits(torch.tensor([18, 48], dtype=torch.int8), 4, 1, 3).tolist()
        [[1, 2, 3]]
    """
    return _ops.unpack_bits(packed, bits, rows, cols)


def double_quantize(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales as 8-bit codes of the dynamic map, blocks of 256, minus their mean (QLoRA, 2305.14314, section
    3).

    Args:
        scales: float32, any shape.

    Returns:
        codes (int8, same shape), absmax (int32 bits of float32, one per 256 scales), offset (int32 bits of
            float32, ``[1]``).

    Example:
        >>> s = torch.rand(4, 8)
        >>> bool((double_dequantize(*double_quantize(s)) - s).abs().max() < 0.02)
        True
    """
    if scales.is_cuda and scales.numel() > 0 and _waits_for_gpu(scales):
        finite = torch.isfinite(scales).flatten()
        if not bool(finite.all()):
            msg = f"bitfold::double_quantize: scales[{int((~finite).nonzero()[0])}] (flat) is not finite"
            raise RuntimeError(msg)
    return _ops.double_quantize(scales)


def double_dequantize(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    """The float32 scales that `double_quantize` stored: ``map[code] * absmax[block] + offset``."""
    return _ops.double_dequantize(codes, absmax, offset)


def instruction_set() -> str:
    """The name of the instruction set whose kernels run (forced with the environment variable
    ``BITFOLD_ISA``).
    """
    return _C.instruction_sets()[_ops.instruction_set()][0]


# ---- fake kernels: shapes and dtypes, for torch.compile, torch.export and the meta device ----


@torch.library.register_fake("bitfold::quantize")
def _(weight: Tensor, spec: Sequence[int], method: int) -> list[Tensor]:
    buffers = _C.buffers_of_spec(list(spec))
    return [weight.new_empty(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in buffers]


def _check_together(op: str, *tensors: Tensor | None) -> None:
    """Refuse tensors of which some are on the meta device: the result would be memory as it was."""
    places = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(places) > 1:
        msg = f"bitfold::{op}: all tensors must be on one device, got {', '.join(sorted(places))}"
        raise RuntimeError(msg)


@torch.library.register_fake("bitfold::dequantize")
def _(packed: Sequence[Tensor], spec: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check_together("dequantize", *packed)
    return packed[0].new_empty((spec[_ROWS], spec[_COLS]), dtype=dtype)


@torch.library.register_fake("bitfold::linear")
@torch.library.register_fake("bitfold::linear_nograd")
def _fake_linear(
    x: Tensor, packed: Sequence[Tensor], spec: Sequence[int], bias: Tensor | None, accuracy: int
) -> Tensor:
    if x.shape[-1] != spec[_COLS]:
        expected = f"[..., {spec[_COLS]}] (in_features)"
        msg = f"bitfold::linear: x must be {expected}, got {list(x.shape)}"
        raise RuntimeError(msg)
    if accuracy not in ACCURACY.values():
        msg = f"bitfold::linear: accuracy must be 0 (auto), 1 (fp32) or 2 (int8), got {accuracy}"
        raise RuntimeError(msg)
    _check_together("linear", x, *packed, bias)
    return x.new_empty((*x.shape[:-1], spec[_ROWS]))


@torch.library.register_fake("bitfold::linear_mixed")
def _(
    x: Tensor,
    packed: Sequence[Tensor],
    spec: Sequence[int],
    bias: Tensor | None,
    threshold: float,
    columns: Sequence[int] | None,
) -> Tensor:
    return _fake_linear(x, packed, spec, bias, 0)


@torch.library.register_fake("bitfold::linear_grad_input")
def _(grad: Tensor, packed: Sequence[Tensor], spec: Sequence[int]) -> Tensor:
    _check_together("linear_grad_input", grad, *packed)
    return grad.new_empty((*grad.shape[:-1], spec[_COLS]))


@torch.library.register_fake("bitfold::embedding")
def _(indices: Tensor, packed: Sequence[Tensor], spec: Sequence[int], dtype: torch.dtype) -> Tensor:
    _check_together("embedding", indices, *packed)
    return indices.new_empty((*indices.shape, spec[_COLS]), dtype=dtype)


@torch.library.register_fake("bitfold::pack_bits")
def _(codes: Tensor, bits: int) -> Tensor:
    rows, cols = codes.shape
    row_bytes = (cols + 3) // 4 + (cols + 7) // 8 if bits == 3 else (cols * bits + 7) // 8
    return codes.new_empty((rows * row_bytes,), dtype=torch.int8)


@torch.library.register_fake("bitfold::unpack_bits")
def _(packed: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    return packed.new_empty((rows, cols), dtype=torch.uint8)


@torch.library.register_fake("bitfold::double_quantize")
def _(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (scales.numel() + 255) // 256
    return (
        scales.new_empty(scales.shape, dtype=torch.int8),
        scales.new_empty((blocks,), dtype=torch.int32),
        scales.new_empty((1,), dtype=torch.int32),
    )


@torch.library.register_fake("bitfold::double_dequantize")
def _(codes: Tensor, absmax: Tensor, offset: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


# ---- autograd: the gradient of the product in x and bias; codes are integers and have none ----


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    packed, spec, bias = inputs[1:4]
    ctx.save_for_backward(*packed)
    ctx.spec = spec
    ctx.bias_dtype = None if bias is None else bias.dtype


def _grad_bias(ctx: Any, grad: Tensor) -> Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[3]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)


def _backward_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed = ctx.saved_tensors
    grad_x = _linear_grad_input(grad, packed, ctx.spec) if ctx.needs_input_grad[0] else None
    return grad_x, [None] * len(packed), None, _grad_bias(ctx, grad), None


torch.library.register_autograd("bitfold::linear", _backward_linear, setup_context=_setup_linear)


def _setup_linear_mixed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_linear(ctx, inputs, output)
    # Torch takes an empty list of ints for one of tensors, and wants as many gradients.
    ctx.no_columns = [] if inputs[-1] == [] else None


def _backward_linear_mixed(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*_backward_linear(ctx, grad), ctx.no_columns)


torch.library.register_autograd(
    "bitfold::linear_mixed", _backward_linear_mixed, setup_context=_setup_linear_mixed
)


class _EagerLinear(torch.autograd.Function):
    """The same formula around `linear_nograd`, for code that runs op by op."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Sequence[Tensor],
        spec: Sequence[int],
        bias: Tensor | None,
        accuracy: int,
    ) -> Tensor:
        if ctx.needs_input_grad[0]:  # the gradient of the bias needs no weight
            ctx.save_for_backward(*packed)
            ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear_nograd(x, packed, spec, bias, accuracy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _linear_grad_input(grad, ctx.saved_tensors, ctx.spec)
        return grad_x, None, None, _grad_bias(ctx, grad), None
