"""Every op against the second reader of docs/format.md: values, dtypes, strides, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operands import FLOATS, STRIDES, fails, folded, strided

import reference
from bitfold import Format, ops
from products import assert_product
from support import EVERY_FORMAT, SOME_FORMATS

formats = st.sampled_from(EVERY_FORMAT)
sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 197]))


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


def test_rows_without_columns_take_no_time() -> None:
    codes = torch.empty(2**40, 0, dtype=torch.uint8)
    for bits in (2, 3, 4, 8):
        packed = ops.pack_bits(codes, bits)
        assert (packed.dtype, packed.shape) == (torch.int8, (0,))
        assert ops.unpack_bits(packed, bits, 2**40, 0).shape == codes.shape
        assert ops.unpack_bits(packed, bits, 0, 2**62).shape == (0, 2**62)


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
