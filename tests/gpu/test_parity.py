"""The same bits on a GPU as on the CPU, whose results the other tests hold against float64 and the format's
own document.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops
from support import EVERY_FORMAT, SOME_FORMATS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Whole units of eight and groups; a row that ends within a unit, a group and a byte; rows of one unit of a
# 16-bit result and of an fp32 one; one weight.
SHAPES = [(40, 512), (7, 136), (5, 197), (5, 8), (5, 4), (1, 1)]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; `a` on the GPU."""
    flat_a, flat_b = a.cpu().contiguous().view(-1), b.contiguous().view(-1)
    return torch.equal(flat_a.view(torch.uint8), flat_b.view(torch.uint8))


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight.view(-1)[:: 1 + weight.numel() // 5] *= 8.0
    if shape[0] > 4:
        weight[3, :70] = 0.0  # groups of nothing
    return weight


def assert_folded_alike(weight: Tensor, fmt: str, method: str) -> list[Tensor]:
    on_cpu, on_gpu = ops.quantize(weight, fmt, method), ops.quantize(weight.cuda(), fmt, method)
    buffers = Format(fmt).buffers(tuple(weight.shape))
    for (suffix, *_), gpu, cpu in zip(buffers, on_gpu, on_cpu, strict=True):
        assert gpu.is_cuda
        assert same(gpu, cpu), f"{fmt} {method} {tuple(weight.shape)} {weight.dtype}: weight{suffix}"
    return on_gpu


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_fold_and_unfold(fmt: str) -> None:
    for shape in SHAPES:
        weight = weight_of(shape)
        for method in ("round", "search"):
            packed = assert_folded_alike(weight, fmt, method)
            spec = Format(fmt).spec(shape)
            on_cpu = [t.cpu() for t in packed]
            rows = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
            for dtype in DTYPES:
                expected = ops.dequantize(on_cpu, fmt, shape, dtype)
                assert same(ops.dequantize(packed, fmt, shape, dtype), expected), (shape, method, dtype)
                for index in (rows, rows.int()):
                    found = ops.embedding(index.cuda(), packed, spec, dtype)
                    assert same(found, ops.embedding(index, on_cpu, spec, dtype)), (shape, method, dtype)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_fold_16_bit_weights_of_any_strides(fmt: str, dtype: torch.dtype) -> None:
    weight = weight_of((24, 256)).to(dtype)
    wide = torch.zeros(24, 300, dtype=dtype)
    wide[:, 1:257] = weight
    for method in ("round", "search"):
        assert_folded_alike(weight, fmt, method)
        expected = ops.quantize(weight, fmt, method)
        for view in (weight.cuda().t().contiguous().t(), wide.cuda()[:, 1:257]):
            found = ops.quantize(view, fmt, method)
            assert all(same(a, b) for a, b in zip(found, expected, strict=True)), (fmt, method)


@pytest.mark.parametrize(
    "fmt", ["nf4", "nf4-nodq", "int4-g64", "int8-row", "int3-g64", "int2-g64", "int4-g64-dq"]
)
def test_large(fmt: str) -> None:
    packed = assert_folded_alike(weight_of((2048, 4096)), fmt, "round")
    for dtype in DTYPES:
        expected = ops.dequantize([t.cpu() for t in packed], fmt, (2048, 4096), dtype)
        assert same(ops.dequantize(packed, fmt, (2048, 4096), dtype), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int4-g64-fz", "int8-row", "int2-g64-dq"])
def test_extreme_magnitudes(fmt: str, scale: float) -> None:
    for method in ("round", "search"):
        assert_folded_alike(weight_of((9, 192)) * scale, fmt, method)


def test_more_rows_than_a_grid_is_high() -> None:
    shape = (65536 * 33, 8)
    fmt = "int8-tensor"
    codes = torch.randint(-128, 128, (shape[0] * shape[1],), dtype=torch.int8)
    packed = [codes, *ops.quantize(torch.randn(shape[0], 8), fmt, "round")[1:]]
    found = ops.dequantize([t.cuda() for t in packed], fmt, shape, torch.bfloat16)
    assert same(found, ops.dequantize(packed, fmt, shape, torch.bfloat16))


@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 70_000])
def test_double_quantization(n: int, spread: float) -> None:
    """`spread` 20: the sum of scales is not exact, and hangs on the order."""
    scales = torch.randn(n).abs() * torch.exp(torch.randn(n) * spread / 2)
    expected = ops.double_quantize(scales)
    found = ops.double_quantize(scales.cuda())
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert same(ops.double_dequantize(*found), ops.double_dequantize(*expected))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (5, 37), (64, 256)])
def test_pack_bits(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
    packed = ops.pack_bits(codes.cuda(), bits)
    assert same(packed, ops.pack_bits(codes, bits))
    assert same(ops.unpack_bits(packed, bits, *shape), codes)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_codes_at_any_address(fmt: str, offset: int) -> None:
    packed = ops.quantize(weight_of((8, 256)), fmt)
    expected = ops.dequantize(packed, fmt, (8, 256), torch.float16)
    codes = torch.zeros(packed[0].numel() + offset, dtype=torch.int8, device="cuda")[offset:]
    codes.copy_(packed[0])
    moved = [codes, *(t.cuda() for t in packed[1:])]
    assert same(ops.dequantize(moved, fmt, (8, 256), torch.float16), expected)


def test_no_rows_of_an_embedding() -> None:
    fmt = Format("nf4")
    packed = [t.cuda() for t in ops.quantize(torch.randn(4, 64), fmt)]
    none = torch.zeros(0, 3, dtype=torch.long, device="cuda")
    assert ops.embedding(none, packed, fmt.spec((4, 64)), torch.float32).shape == (0, 3, 64)


def test_as_bitsandbytes_on_the_same_gpu() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for dtype in DTYPES:
        weight = torch.randn(256, 1024, device="cuda").to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed = ops.quantize(weight, "nf4-nodq")
        assert torch.equal(packed[0].view(torch.uint8), codes.view(-1))
        assert torch.equal(packed[1].view(torch.float32).view(-1), state.absmax)
        theirs = functional.dequantize_4bit(codes, state)
        assert torch.equal(ops.dequantize(packed, "nf4-nodq", (256, 1024), dtype), theirs)
