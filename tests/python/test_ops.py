"""Every op against the second reader of docs/format.md: values, dtypes, strides, gradients, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import reference
from bitfold import _C, Format, ops
from bitfold.errors import FormatError, WeightError
from products import HALF_ULP, PROMISED, assert_product, assert_promise
from support import EVERY_FORMAT, SOME_FORMATS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
raw = torch.ops.bitfold

formats = st.sampled_from(EVERY_FORMAT)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 197]))


def folded(shape: tuple[int, int], fmt: str, seed: int = 0) -> tuple[list[Tensor], list[int], np.ndarray]:
    """Packed buffers, spec, and the float64 weight that the bytes stand for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    packed = ops.quantize(weight, fmt)
    return packed, Format(fmt).spec(shape), reference.dequantize(packed, fmt, shape)


def strided(values: Tensor, kind: str) -> Tensor:
    """The same values behind other strides."""
    if kind == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if kind == "sliced":
        wide = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), float("nan"), dtype=values.dtype)
        wide[..., 1::2] = values
        return wide[..., 1::2]
    if kind == "expanded":
        return values[:1].expand_as(values)
    return values


STRIDES = ("contiguous", "transposed", "sliced", "expanded")


# ---- values ----


@given(
    formats,
    sizes,
    sizes,
    st.sampled_from(FLOATS),
    st.sampled_from(STRIDES),
    st.sampled_from(["round", "search", None]),
)
def test_quantize_dequantize(
    fmt: str, rows: int, cols: int, dtype: torch.dtype, stride: str, method: str | None
) -> None:
    weight = strided(
        torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 1000 + cols)).to(dtype), stride
    )
    packed = ops.quantize(weight, fmt, method)
    again = ops.quantize(weight.float().contiguous(), fmt, method)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True)), (
        "dtype and strides must not matter"
    )
    exact = reference.dequantize(packed, fmt, (rows, cols), np.float32)
    assert np.array_equal(ops.dequantize(packed, fmt, (rows, cols)).numpy(), exact)
    for narrow in (torch.float16, torch.bfloat16):
        assert torch.equal(
            ops.dequantize(packed, fmt, (rows, cols), narrow), torch.from_numpy(exact).to(narrow)
        )
    ideal = reference.dequantize(packed, fmt, (rows, cols))
    # a real zero point far off the codes multiplies the rounding of the scale
    assert np.allclose(exact, ideal, rtol=1e-6, atol=2e-4 if Format(fmt).zero == "float" else 2e-6)


@given(
    formats,
    sizes,
    sizes,
    st.sampled_from(FLOATS),
    st.sampled_from(STRIDES),
    st.lists(st.integers(0, 4), max_size=2),
    st.booleans(),
    st.sampled_from(list(ops.ACCURACY)),
)
def test_linear(
    fmt: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    stride: str,
    leading: list[int],
    with_bias: bool,
    accuracy: str,
) -> None:
    packed, spec, _ = folded((rows, cols), fmt)
    x = torch.randn(*leading, cols).to(dtype)
    if x.numel() and (x.dim() > 1 or stride != "expanded"):
        x = strided(x, stride)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    y = ops.linear(x, packed, spec, bias, accuracy)
    assert y.shape == (*leading, rows)
    assert y.dtype == dtype
    assert_product(y, x, packed, fmt, bias, accuracy)


@pytest.mark.parametrize("m", [0, 1, 2, 7, 16, 33])
@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_linear_batches(fmt: str, m: int) -> None:
    packed, spec, _ = folded((33, 515), fmt)
    x = torch.randn(m, 515)
    for accuracy in ops.ACCURACY:
        y = ops.linear(x, packed, spec, accuracy=accuracy)
        assert_product(y, x, packed, fmt, accuracy=accuracy)


def test_linear_without_rows_keeps_leading_dims() -> None:
    packed, spec, _ = folded((5, 64), "nf4")
    assert ops.linear(torch.empty(0, 64), packed, spec).shape == (0, 5)
    assert ops.linear(torch.empty(3, 0, 64), packed, spec).shape == (3, 0, 5)
    assert ops.linear(torch.randn(64), packed, spec).shape == (5,)


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("bias_dtype", FLOATS)
def test_linear_takes_a_bias_of_another_dtype(x_dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    packed, spec, _ = folded((7, 65), "int4-g64")
    x, bias = torch.randn(2, 65).to(x_dtype), torch.randn(14)[::2].to(bias_dtype)
    y = ops.linear(x, packed, spec, bias)
    assert y.dtype == x_dtype
    assert_product(y, x, packed, "int4-g64", bias)


@given(
    formats,
    st.integers(1, 30),
    sizes,
    st.sampled_from(FLOATS),
    st.lists(st.integers(0, 3), max_size=2),
    st.booleans(),
)
def test_embedding(
    fmt: str, rows: int, cols: int, dtype: torch.dtype, shape: list[int], narrow: bool
) -> None:
    packed, spec, _ = folded((rows, cols), fmt)
    table = ops.dequantize(packed, fmt, (rows, cols), dtype)
    indices = torch.randint(0, rows, shape, dtype=torch.int32 if narrow else torch.int64)
    assert torch.equal(ops.embedding(indices, packed, spec, dtype), table[indices.long()])


def test_embedding_of_strided_indices() -> None:
    packed, spec, _ = folded((10, 17), "int8-g64")
    indices = torch.arange(10).view(2, 5).t()
    expected = ops.dequantize(packed, "int8-g64", (10, 17))[indices]
    assert torch.equal(ops.embedding(indices, packed, spec, torch.float32), expected)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 5), st.integers(0, 70))
def test_pack_bits(bits: int, rows: int, cols: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8)
    packed = ops.pack_bits(codes, bits)
    assert (packed.dtype, packed.dim()) == (torch.int8, 1)
    assert packed.numpy().tobytes() == reference.pack(codes.numpy(), bits).tobytes()
    assert torch.equal(ops.unpack_bits(packed, bits, rows, cols), codes)
    assert torch.equal(ops.pack_bits(codes.t().contiguous().t(), bits), packed)
    if rows and cols:
        assert np.array_equal(reference.unpack(packed.numpy(), bits, rows, cols), codes.numpy())


@given(st.integers(1, 700), st.floats(1e-30, 1e30), st.floats(0, 3))
def test_double_quantization(n: int, size: float, spread: float) -> None:
    scales = (torch.rand(n, generator=torch.Generator().manual_seed(n)) * spread + 0.1) * size
    codes, absmax, offset = ops.double_quantize(scales)
    assert (codes.shape, absmax.shape, offset.shape) == (scales.shape, (-(-n // 256),), (1,))
    assert offset.view(torch.float32).item() == np.float32(scales.double().mean().item())
    back = ops.double_dequantize(codes, absmax, offset)
    level = reference.dynamic_map()[codes.numpy().view(np.uint8)]
    block = absmax.view(torch.float32).numpy()[np.arange(n) // 256]
    assert np.array_equal(back.numpy(), level * block + offset.view(torch.float32).numpy())
    # neighbouring entries of the map are at most 0.045 apart
    assert ((back - scales).abs().numpy() <= 0.0225 * block * 1.001 + size * 1e-6).all()


def test_extreme_magnitudes_keep_their_relative_error() -> None:
    unit = torch.rand(4, 100) * 2 - 1
    for fmt in SOME_FORMATS:
        for method in ("round", "search"):
            ideal = (
                reference.dequantize(ops.quantize(unit, fmt, method), fmt, (4, 100)) - unit.double().numpy()
            ).std()
            for scale in (1e-30, 1e-7, 1e7, 1e38, 2e38):
                packed = ops.quantize(unit * scale, fmt, method)
                off = reference.dequantize(packed, fmt, (4, 100)) / scale - unit.double().numpy()
                assert off.std() <= 2.5 * ideal, (fmt, method, scale)
                assert ops.dequantize(packed, fmt, (4, 100)).isfinite().all()


def test_zeros_are_bytes_77() -> None:
    for fmt in ("nf4", "nf4-nodq"):
        packed = ops.quantize(torch.zeros(3, 64), fmt)
        assert set(packed[0].tolist()) == {0x77}
        assert not ops.dequantize(packed, fmt, (3, 64)).any()


def test_threads_do_not_change_a_bit() -> None:
    weight, x, before = torch.randn(301, 515), torch.randn(13, 515), torch.get_num_threads()
    try:
        for fmt in SOME_FORMATS:
            results, spec = [], Format(fmt).spec((301, 515))
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                packed = ops.quantize(weight, fmt)
                products = [
                    ops.linear(x[:m], packed, spec, None, level)
                    for level in ops.ACCURACY.values()
                    for m in (1, 13)
                ]
                results.append([*packed, *products])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), fmt
    finally:
        torch.set_num_threads(before)


def test_linear_under_autocast() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    x, bias = torch.randn(3, 70), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, packed, spec, bias)
        for dtype in (torch.float64, torch.int64):
            fails(["x must be float32"], RuntimeError, ops.linear, torch.ones(2, 70).to(dtype), packed, spec)
        assert ops.linear(torch.empty(3, 70, device="meta"), [t.to("meta") for t in packed], spec).is_meta
    assert y.dtype == torch.bfloat16
    assert_product(y, x.bfloat16(), packed, "nf4", bias)


# ---- gradients ----


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients(fmt: str, dtype: torch.dtype) -> None:
    packed, spec, weight = folded((37, 131), fmt)
    x = torch.randn(2, 5, 131).to(dtype).requires_grad_()
    bias = torch.randn(37).to(dtype).requires_grad_()
    grad = torch.randn(2, 5, 37).to(dtype)
    ops.linear(x, packed, spec, bias).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
    assert x.grad.shape == x.shape
    g = grad.double().numpy().reshape(10, 37)
    expected, terms = g @ weight, np.abs(g) @ np.abs(weight)
    error = np.abs(x.grad.double().numpy().reshape(10, 131) - expected)
    assert (error <= (37 + 24) * 2.0**-24 * terms + HALF_ULP[dtype] * 1.01 * np.abs(expected) + 1e-7).all()
    assert np.allclose(bias.grad.double().numpy(), g.sum(0), rtol=2 * HALF_ULP[dtype], atol=1e-5)


def test_gradients_only_where_wanted() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    x, bias = torch.randn(2, 16), torch.randn(3, requires_grad=True)
    y = ops.linear(x, packed, spec, bias)
    y.sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full((3,), 2.0))
    with torch.no_grad():
        assert not ops.linear(x, packed, spec, bias).requires_grad
    with torch.inference_mode():
        assert ops.linear(x, packed, spec, bias).is_inference()
    assert not ops.linear(x, packed, spec, bias.detach()).requires_grad
    x = torch.randn(4, 2, 16).transpose(0, 1).requires_grad_()
    expanded = torch.ones(1).expand(2, 4, 3)
    (grad,) = torch.autograd.grad(ops.linear(x, packed, spec), x, expanded)
    assert grad.shape == x.shape


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", ["nf4", "int4-g64-fz", "int8-row", "kmeans3-tensor"])
def test_eager_gradients_are_those_of_the_registered_op(fmt: str, dtype: torch.dtype) -> None:
    packed, spec, _ = folded((37, 131), fmt)
    x = torch.randn(2, 5, 131).to(dtype)
    grad = torch.randn(2, 5, 37).to(dtype)
    for bias in (None, torch.randn(37), torch.randn(37).to(dtype)):
        results = []
        for function in (lambda *a: raw.linear(*a, 0), ops.linear):
            a = x.clone().requires_grad_()
            b = None if bias is None else bias.clone().requires_grad_()
            y = function(a, packed, spec, b)
            y.backward(grad)
            results.append((y.detach(), a.grad, torch.zeros(0) if b is None else b.grad))
        for registered, eager in zip(*results, strict=True):
            assert registered.dtype == eager.dtype
            assert torch.equal(registered, eager)


def saved_by(call: Any) -> list[Tensor]:
    """What `call` keeps for its backward pass."""
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return saved


def test_only_the_packed_weight_is_kept_for_backward() -> None:
    packed, spec, _ = folded((37, 131), "nf4")
    x, bias = torch.randn(2, 131), torch.randn(37, requires_grad=True)
    kept = saved_by(lambda: ops.linear(x.clone().requires_grad_(), packed, spec, bias))
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in packed]
    assert saved_by(lambda: ops.linear(x, packed, spec, bias)) == []  # the bias needs no weight


def test_a_weight_overwritten_before_backward_is_noticed() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    y = ops.linear(torch.randn(2, 16, requires_grad=True), packed, spec)
    packed[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_refused() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    x = torch.randn(2, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.linear(x, packed, spec).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant: bool) -> None:
    packed, spec, _ = folded((16, 16), "int4-g64")
    bias = torch.randn(16, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return ops.linear(torch.relu(ops.linear(x, packed, spec, bias)), packed, spec, bias)

    grads = []
    x = torch.randn(3, 16)
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        a = x.clone().requires_grad_()
        bias.grad = None
        call(a).sum().backward()
        grads.append((a.grad, bias.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_gradients_of_fake_and_meta_tensors() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 16, requires_grad=True)
        ops.linear(x, packed, spec).sum().backward()
        assert x.grad.shape == (2, 16)
    x = torch.empty(2, 16, device="meta", requires_grad=True)
    ops.linear(x, [t.to("meta") for t in packed], spec).sum().backward()
    assert x.grad.is_meta


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_traces_hold_the_registered_op() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    x = torch.randn(2, 16, requires_grad=True)
    # unchecked: the checker stumbles over the packed tensors, which are constants of the trace
    traced = torch.jit.trace(lambda x: ops.linear(x, packed, spec), (x,), check_trace=False)
    assert "bitfold::linear(" in str(traced.graph)
    (grad,) = torch.autograd.grad(traced(x).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(ops.linear(x, packed, spec).sum(), x)[0])


# ---- accuracy ----


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_errors_that_the_levels_promise(fmt: str, dtype: torch.dtype) -> None:
    packed, spec, weight = folded((64, 1100), fmt)
    x = torch.randn(8, 1100)
    x[:, 7::131] *= 20  # channels far larger than the rest, as layers make them
    x = x.to(dtype)
    exact = x.double().numpy() @ weight.T
    for accuracy in ops.ACCURACY:
        for rows in (1, 8):  # two different walks over the weight
            y = torch.cat([ops.linear(part, packed, spec, accuracy=accuracy) for part in x.split(rows)])
            assert_promise(y, exact, accuracy)


def test_accuracy_by_name_and_number() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    x = torch.randn(2, 70)
    for name, level in ops.ACCURACY.items():
        y = ops.linear(x, packed, spec, accuracy=name)
        assert torch.equal(y, ops.linear(x, packed, spec, None, level))
        assert_product(y, x, packed, "nf4", accuracy=name)
        a = x.clone().requires_grad_()
        ops.linear(a, packed, spec, accuracy=name).sum().backward()
        assert a.grad is not None


def test_another_accuracy_is_refused() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    x = torch.randn(2, 70)
    fails(["auto, fp32, int8", "'best'"], ValueError, ops.linear, x, packed, spec, None, "best")
    for level in (3, -1):
        words = ["accuracy must be 0 (auto), 1 (fp32) or 2 (int8)", str(level)]
        fails(words, RuntimeError, ops.linear, x, packed, spec, None, level)
        fails(words, RuntimeError, ops.linear, x.to("meta"), packed, spec, None, level)
    for level in (3, -1, True, None, 1.0, "FP32"):
        fails(["auto, fp32, int8", repr(level)], ValueError, ops.accuracy_level, level)


def test_linear_grad_input_of_an_empty_batch() -> None:
    packed, spec, _ = folded((3, 16), "nf4")
    x = torch.empty(0, 16, requires_grad=True)
    ops.linear(x, packed, spec).sum().backward()
    assert x.grad.shape == (0, 16)


# ---- opcheck ----


def check(op: Any, *args: Any) -> None:
    opcheck(op, args)


@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int3-g64-fz", "int8-row", "kmeans2-tensor"])
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck_linear(fmt: str, stride: str, needs_grad: bool) -> None:
    packed, spec, _ = folded((5, 70), fmt)
    x = strided(torch.randn(3, 70), stride).requires_grad_(needs_grad)
    bias = torch.randn(5, requires_grad=needs_grad)
    for level in ops.ACCURACY.values():
        check(raw.linear.default, x, packed, spec, bias, level)
    check(raw.linear.default, x.detach().bfloat16(), packed, spec, None, 0)
    if not needs_grad:
        check(raw.linear_nograd.default, x, packed, spec, bias, 0)
        check(raw.linear_grad_input.default, strided(torch.randn(3, 5), stride), packed, spec)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_opcheck_the_others(fmt: str) -> None:
    packed, spec, _ = folded((5, 70), fmt)
    check(raw.dequantize.default, packed, spec, torch.float16)
    check(raw.embedding.default, torch.tensor([[0, 4], [2, 2]]).t(), packed, spec, torch.float32)
    for stride in STRIDES:
        for method in (0, 1):
            check(raw.quantize.default, strided(torch.randn(5, 70), stride), spec, method)


def test_opcheck_packing() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (13, 5), dtype=torch.uint8).t()
        check(raw.pack_bits.default, codes, bits)
        check(raw.unpack_bits.default, ops.pack_bits(codes, bits), bits, 5, 13)
    scales = torch.rand(7, 90).t()
    check(raw.double_quantize.default, scales)
    check(raw.double_dequantize.default, *ops.double_quantize(scales))


# ---- errors ----


def fails(words: list[str], kind: type[Exception], call: Any, *args: Any) -> None:
    with pytest.raises(kind) as error:
        call(*args)
    for word in words:
        assert word in str(error.value), f"{word!r} is missing in: {error.value}"


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_non_finite_weights_name_the_place(fmt: str, value: float, word: str) -> None:
    for dtype in FLOATS:
        weight = torch.randn(4, 70).to(dtype)
        weight[2, 69] = value
        fails(["weight[2, 69]", word, "finite"], WeightError, ops.quantize, weight, fmt)


def test_weights_that_cannot_be_folded() -> None:
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64):
        fails(
            ["weight", "float32", str(dtype)], WeightError, ops.quantize, torch.ones(4, 16).to(dtype), "nf4"
        )
    fails(["weight", "2-D", "(16,)"], WeightError, ops.quantize, torch.ones(16), "nf4")
    fails(["weight", "2-D", "(2, 3, 16)"], WeightError, ops.quantize, torch.ones(2, 3, 16), "nf4")
    for shape in [(0, 16), (16, 0), (0, 0)]:
        fails(["weight", "at least one", str(shape)], WeightError, ops.quantize, torch.ones(shape), "nf4")
    fails(["method", "round, search", "'best'"], ValueError, ops.quantize, torch.ones(2, 16), "nf4", "best")
    fails(["'nf9'"], FormatError, ops.quantize, torch.ones(2, 16), "nf9")


def test_packed_buffers_that_do_not_fit() -> None:
    packed, spec, _ = folded((5, 70), "int4-g64")
    x = torch.randn(2, 70)
    cut = [packed[0][:-1], *packed[1:]]
    fails(
        ["linear", "weight(int4-g64)", "int8", "175", "[5, 70]", "[174]"],
        RuntimeError,
        ops.linear,
        x,
        cut,
        spec,
    )
    floats = [packed[0], packed[1].view(torch.float16), *packed[2:]]
    fails(["weight_scale(int4-g64)", "int16", "float16", "[5, 2]"], RuntimeError, ops.linear, x, floats, spec)
    fails(["must hold 4 tensors, got 3"], RuntimeError, ops.linear, x, packed[:3], spec)
    fails(["must hold 4 tensors, got 0"], RuntimeError, raw.linear_nograd, x, [], spec, None, 0)
    strided_codes = [torch.zeros(350, dtype=torch.int8)[::2], *packed[1:]]
    fails(["weight(int4-g64)", "non-contiguous"], RuntimeError, ops.linear, x, strided_codes, spec)
    for call in (
        lambda p: ops.dequantize(p, "int4-g64", (5, 70)),
        lambda p: ops.embedding(torch.tensor([0]), p, spec, torch.float32),
        lambda p: raw.linear_grad_input(torch.randn(2, 5), p, spec),
    ):
        fails(["weight(int4-g64)", "175", "[174]"], RuntimeError, call, cut)
    for other in ("nf4", "int8-row", "kmeans4-row"):
        fails([other], RuntimeError, ops.dequantize, packed, other, (5, 70))
    fails(["weight", "[6, 70]"], RuntimeError, ops.dequantize, packed, "int4-g64", (6, 70))


def test_specs_that_make_no_sense() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    for broken in ([], spec[:-1], [*spec, 0], [99, *spec[1:]], [spec[0], spec[1], 65, *spec[3:]]):
        fails(["spec", "Format.spec"], RuntimeError, raw.dequantize, packed, broken, torch.float32)
    for shape in ([-5, 70], [0, 70], [2**62, 4], [2**31, 2**31]):
        fails(
            ["shape", f"({shape[0]}, {shape[1]})"],
            RuntimeError,
            raw.dequantize,
            packed,
            [*spec[:-2], *shape],
            torch.float32,
        )
    weight = torch.randn(5, 70)
    fails(
        ["weight", "[5, 71]", "[5, 70]"], RuntimeError, raw.quantize, weight, Format("nf4").spec((5, 71)), 0
    )
    fails(["method", "7"], RuntimeError, raw.quantize, weight, spec, 7)


def test_activations_that_do_not_fit() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    fails(
        ["x", "[..., 70]", "in_features", "[2, 71]"],
        RuntimeError,
        ops.linear,
        torch.randn(2, 71),
        packed,
        spec,
    )
    fails(["x", "[..., 70]"], RuntimeError, ops.linear, torch.tensor(1.0), packed, spec)
    for dtype in (torch.float64, torch.int64, torch.complex64):
        fails(["x must be float32"], RuntimeError, ops.linear, torch.ones(2, 70).to(dtype), packed, spec)
    fails(["float64"], RuntimeError, ops.linear, torch.ones(2, 70, dtype=torch.float64), packed, spec)
    x = torch.randn(2, 70)
    fails(["bias", "[5]", "[4]"], RuntimeError, ops.linear, x, packed, spec, torch.randn(4))
    fails(["bias", "[1, 5]"], RuntimeError, ops.linear, x, packed, spec, torch.randn(1, 5))
    fails(["bias", "float64"], RuntimeError, ops.linear, x, packed, spec, torch.randn(5).double())
    fails(["grad", "[..., 5]"], RuntimeError, raw.linear_grad_input, torch.randn(2, 6), packed, spec)
    fails(["dtype", "float32", "int64"], RuntimeError, ops.dequantize, packed, "nf4", (5, 70), torch.int64)


@pytest.mark.parametrize("index", [-1, 5, 2**40, -(2**40)])
def test_indices_out_of_range(index: int) -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    indices = torch.tensor([[0, 4], [index, 1]])
    fails([f"index {index}", "5 rows"], RuntimeError, ops.embedding, indices, packed, spec, torch.float32)


def test_indices_of_another_dtype() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    fails(
        ["indices", "int64", "float32"],
        RuntimeError,
        ops.embedding,
        torch.tensor([1.0]),
        packed,
        spec,
        torch.float32,
    )


def test_packing_errors() -> None:
    codes = torch.tensor([[1, 2, 16]], dtype=torch.uint8)
    fails(["codes[0, 2]", "16", "4 bits"], RuntimeError, ops.pack_bits, codes, 4)
    fails(["bits", "2, 3, 4 or 8", "5"], RuntimeError, ops.pack_bits, codes, 5)
    fails(["codes", "uint8", "int32"], RuntimeError, ops.pack_bits, codes.int(), 4)
    fails(["codes", "[3]"], RuntimeError, ops.pack_bits, codes[0], 4)
    fails(["packed", "[2]", "[3]"], RuntimeError, ops.unpack_bits, torch.zeros(3, dtype=torch.int8), 4, 1, 4)
    fails(["rows and cols"], RuntimeError, ops.unpack_bits, torch.zeros(0, dtype=torch.int8), 4, -1, 4)
    fails(["scales", "float32", "float64"], RuntimeError, ops.double_quantize, torch.ones(3).double())
    fails(["scales[1]", "finite"], RuntimeError, ops.double_quantize, torch.tensor([1.0, float("nan")]))
    good = ops.double_quantize(torch.rand(300))
    for at in range(3):
        broken = list(good)
        broken[at] = broken[at][:-1]
        if at == 0:
            broken[at] = torch.zeros(600, dtype=torch.int8)
        fails(["double_dequantize"], RuntimeError, ops.double_dequantize, *broken)


# ---- instruction sets ----

FORCED = """
import hashlib, sys, torch
from bitfold import ops
torch.manual_seed(0)
weight, x = torch.randn(7, 197), torch.randn(3, 197)
seen = hashlib.sha256()
for fmt in sys.argv[1:]:
    packed = ops.quantize(weight, fmt)
    decoded = [ops.dequantize(packed, fmt, (7, 197), dtype) for dtype in (torch.float32, torch.float16)]
    for tensor in [*packed, *decoded]:
        seen.update(tensor.numpy().tobytes())
print(ops.instruction_set(), seen.hexdigest())
"""


def run_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FORCED, *SOME_FORMATS],
        env={**os.environ, "BITFOLD_ISA": name},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_instruction_set_writes_the_same_bytes() -> None:
    digests = {}
    for name, _, supported in _C.instruction_sets():
        done = run_with_isa(name)
        if supported:
            assert done.returncode == 0, done.stderr
            ran, digest = done.stdout.split()
            assert ran == name
            digests[name] = digest
        else:
            assert done.returncode != 0
            assert f"BITFOLD_ISA={name}: this CPU lacks" in done.stderr
    assert "portable" in digests
    assert len(set(digests.values())) == 1, digests


def test_an_unknown_instruction_set_is_refused() -> None:
    done = run_with_isa("sse9")
    assert done.returncode != 0
    assert "BITFOLD_ISA=sse9: unknown instruction set; known: " in done.stderr


# ---- size ----


@pytest.mark.slow
def test_more_than_two_to_the_31_weights() -> None:
    """Built from bytes; the float matrix (8 GiB) never exists."""
    rows, cols, fmt = 65536, 32800, Format("int2-row")
    shape = (rows, cols)
    assert rows * cols > 2**31
    packed = [torch.zeros(size, dtype=getattr(torch, dtype)) for _, dtype, size in fmt.buffers(shape)]
    packed[0].fill_(0x1B)  # codes 0 1 2 3: -1.5 -0.5 0.5 1.5
    scale = (torch.arange(rows) % 7 + 1).to(torch.float16)
    packed[1].copy_(scale.view(torch.int16).view(rows, 1))
    spec = fmt.spec(shape)
    pattern = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(cols // 4)
    indices = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    rows_read = ops.embedding(indices, packed, spec, torch.float32)
    assert torch.equal(rows_read, scale[indices].float()[:, None] * pattern)
    x = torch.randn(1, cols)
    y = ops.linear(x, packed, spec)
    expected = (x.double() @ pattern.double()) * scale.double()
    error = (y[0].double() - expected).square().mean() / expected.square().mean()
    assert error.sqrt() <= PROMISED["auto"]
    back = torch.ops.bitfold.linear_grad_input(
        torch.nn.functional.one_hot(torch.tensor([rows - 1]), rows).float(), packed, spec
    )
    assert torch.equal(back[0], scale[-1].float() * pattern)
