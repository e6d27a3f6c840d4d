"""Products on a GPU against float64 on the dequantized weight, and against the CPU's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops
from support import EVERY_FORMAT, SOME_FORMATS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What the operands of each way lose before y is stored, relative root mean square: bfloat16 holds a
# level of a codebook, and a weight as such, to 8 bits; fp32 sums of many terms.
PROMISED = {torch.float32: 2e-6, torch.float16: 3e-4, torch.bfloat16: 1.2e-3}


def folded(fmt: str, shape: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """Random codes, so that every one occurs, with scales of a folded weight. Not of the seed that x is drawn
    from: a row of x times itself adds up what each level is off, in place of averaging it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    packed = ops.quantize(weight, fmt, "round")
    if Format(fmt).bits in (4, 8):  # whole bytes, but for the padding of odd rows
        codes = torch.randint(-128, 128, packed[0].shape, dtype=torch.int8, generator=generator)
        if shape[1] % 2 == 0:
            packed[0] = codes
    return packed


Exact = tuple[Tensor, float]  # and how large its terms are, which cancellation does not lessen


def exact_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Exact:
    x, weight = x.cpu().double(), weight.cpu().double()
    y, size = x @ weight.T, x.square() @ weight.T.square()
    if bias is not None:
        y, size = y + bias.cpu().double(), size + bias.cpu().double().square()
    return y, float(size.mean().sqrt())


def assert_near(y: Tensor, exact: Exact, promised: float) -> None:
    product, size = exact
    assert y.shape == product.shape

    def distance(other: Tensor) -> float:
        return float((other.cpu().double() - product).square().mean().sqrt()) / max(size, 1e-60)

    rounding = distance(product.to(y.dtype))
    assert distance(y) <= 1.05 * math.hypot(promised, rounding) + 1e-7, f"{distance(y)}, rounding {rounding}"


def check(
    fmt: str,
    shape: tuple[int, int],
    m: int,
    dtype: torch.dtype,
    accuracy: str = "auto",
    most_from_codes: int = 128,  # rows of x; of more the weight is rounded to their dtype first
) -> None:
    packed = folded(fmt, shape)
    spec = Format(fmt).spec(shape)
    x = torch.randn(m, shape[1]).to(dtype)
    bias = torch.randn(shape[0])
    on_gpu = [t.cuda() for t in packed]
    y = ops.linear(x.cuda(), on_gpu, spec, bias.cuda(), accuracy)
    assert y.dtype == dtype
    assert y.is_cuda
    promised = PROMISED[torch.float32 if accuracy == "fp32" else dtype]
    if m > most_from_codes:
        promised *= 2.0
    # A few weights over and over: each may be off by half a unit.
    if m > most_from_codes and Format(fmt).grouping == "tensor":
        promised = max(promised, torch.finfo(dtype).eps / 2)
    assert_near(y, exact_product(x, ops.dequantize(packed, fmt, shape), bias.to(dtype)), promised)
    assert torch.equal(y, ops.linear(x.cuda(), on_gpu, spec, bias.cuda(), accuracy)), (
        "not the same bits twice"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", EVERY_FORMAT)
def test_every_format(fmt: str, dtype: torch.dtype) -> None:
    """Whole units, groups and chunks; a row that ends within all of them; one weight."""
    for shape in ((80, 640), (33, 384), (7, 136), (5, 197), (1, 1)):
        for m in (1, 3, 70, 130):
            check(fmt, shape, m, dtype, most_from_codes=32)  # of odd shapes and groups


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int3-g64", "int2-g64", "int8-row", "int8-g64-zp", "nf3"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_every_batch(fmt: str, m: int, dtype: torch.dtype) -> None:
    check(fmt, (130, 1152), m, dtype)


@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "int8-row"])
@pytest.mark.parametrize(
    ("shape", "m"),
    [
        ((16, 16384), 1),  # few rows: slices of the columns
        ((48, 12288), 64),  # and slabs
        ((20000, 256), 1),  # more tiles than multiprocessors
        ((20000, 256), 40),
        ((4096, 4096), 16),
        ((1, 32), 5),
    ],
)
def test_cuts(fmt: str, shape: tuple[int, int], m: int) -> None:
    for dtype in DTYPES[1:]:
        check(fmt, shape, m, dtype)


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_fp32_arithmetic(fmt: str) -> None:
    for dtype in DTYPES:
        for m in (1, 5, 40):
            check(fmt, (24, 448), m, dtype, "fp32")


def test_large_batch_of_several_slabs() -> None:
    check("nf4", (8192, 8192), 300, torch.bfloat16)


def test_leading_dimensions_and_empty_batches() -> None:
    fmt, shape = "int4-g64", (24, 128)
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    x = torch.randn(2, 3, 5, 128, device="cuda", dtype=torch.float16)
    y = ops.linear(x, packed, spec)
    assert y.shape == (2, 3, 5, 24)
    assert torch.equal(y.view(30, 24), ops.linear(x.view(30, 128), packed, spec))
    assert ops.linear(x[0, 0, 0], packed, spec).shape == (24,)
    for dtype in DTYPES:
        assert ops.linear(torch.empty(0, 128, device="cuda", dtype=dtype), packed, spec).shape == (0, 24)


def test_views_at_odd_addresses_and_strides() -> None:
    fmt, shape = "nf4", (40, 256)
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    x = torch.randn(4, 256, device="cuda", dtype=torch.bfloat16)
    y = ops.linear(x, packed, spec)
    wide = torch.zeros(4, 300, device="cuda", dtype=torch.bfloat16)
    wide[:, 3:259] = x
    assert torch.equal(ops.linear(wide[:, 3:259], packed, spec), y)
    assert torch.equal(ops.linear(x.t().contiguous().t(), packed, spec), y)
    exact = exact_product(x, ops.dequantize(packed, fmt, shape))
    flat = torch.zeros(4 * 256 + 1, device="cuda", dtype=torch.bfloat16)
    flat[1:] = x.view(-1)
    assert_near(ops.linear(flat[1:].view(4, 256), packed, spec), exact, PROMISED[torch.bfloat16])
    codes = torch.zeros(packed[0].numel() + 1, device="cuda", dtype=torch.int8)
    codes[1:] = packed[0]
    assert_near(ops.linear(x, [codes[1:], *packed[1:]], spec), exact, PROMISED[torch.bfloat16])


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(bias_dtype: torch.dtype) -> None:
    fmt, shape = "int4-g64", (24, 128)
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    bias = torch.randn(24, device="cuda", dtype=bias_dtype)
    for m in (1, 100, 200):
        x = torch.randn(m, 128, device="cuda", dtype=torch.float16)
        exact = exact_product(x, ops.dequantize(packed, fmt, shape), bias.half())
        assert_near(ops.linear(x, packed, spec, bias), exact, 2.0 * PROMISED[torch.float16])


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(fmt: str, dtype: torch.dtype) -> None:
    for shape in ((40, 512), (7, 136), (5, 197)):
        packed = folded(fmt, shape)
        weight = ops.dequantize(packed, fmt, shape)
        for m in (1, 33):
            grad = torch.randn(m, shape[0]).to(dtype)
            found = ops._ops.linear_grad_input(
                grad.cuda(), [t.cuda() for t in packed], Format(fmt).spec(shape)
            )
            assert_near(found, exact_product(grad, weight.T), 2.0 * PROMISED[dtype])


@pytest.mark.parametrize("fmt", ["int8-row", "int8-row-dq", "int8-tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [None, [], [0, 5, 100]])
def test_mixed(fmt: str, dtype: torch.dtype, columns: list[int] | None) -> None:
    """The same integers as on the CPU; only the sum over outlier columns may be rounded otherwise."""
    for shape in ((80, 640), (33, 384), (5, 197)):
        packed, spec = folded(fmt, shape), Format(fmt).spec(shape)
        for m in (1, 17, 100):
            x = torch.randn(m, shape[1])
            x[:, 3 :: shape[1] // 4] *= 20.0
            x, bias = x.to(dtype), torch.randn(shape[0])
            expected = ops.linear_mixed(x, packed, spec, bias, columns=columns).double()
            y = ops.linear_mixed(x.cuda(), [t.cuda() for t in packed], spec, bias.cuda(), columns=columns)
            assert y.dtype == dtype
            last = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            assert float((y.cpu().double() - expected).abs().max()) <= last * float(expected.abs().max())


def test_mixed_in_a_graph_and_what_does_not_fit() -> None:
    fmt, shape = "int8-row", (24, 128)
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    x = torch.randn(4, 128, device="cuda")
    x[:, 7] = 30.0
    for columns in (None, [7]):
        ops.linear_mixed(x, packed, spec, columns=columns)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear_mixed(x, packed, spec, columns=columns)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, ops.linear_mixed(x, packed, spec, columns=columns))
    x[1, 3] = float("nan")
    y = ops.linear_mixed(x, packed, spec, columns=[7])
    assert y[1].isnan().all()
    assert not y[0].isnan().any()
    with pytest.raises(RuntimeError, match=r"columns must ascend within \[0, 128\), got 128 after 7"):
        ops.linear_mixed(x, packed, spec, columns=[7, 128])
    with pytest.raises(RuntimeError, match="threshold must not be negative"):
        ops.linear_mixed(x, packed, spec, threshold=-1.0)
    nf4 = [t.cuda() for t in folded("nf4", shape)]
    with pytest.raises(RuntimeError, match="format must be int8-row"):
        ops.linear_mixed(x, nf4, Format("nf4").spec(shape))


def test_autograd() -> None:
    fmt, shape = "nf4", (64, 256)
    packed = folded(fmt, shape)
    spec = Format(fmt).spec(shape)
    grads = []
    for device in ("cpu", "cuda"):
        x = torch.ones(3, 256, device=device, requires_grad=True)
        y = ops.linear(x, [t.to(device) for t in packed], spec)
        (y * torch.arange(64.0, device=device)).sum().backward()
        assert x.grad is not None
        grads.append(x.grad.cpu().double())
    assert torch.allclose(grads[1], grads[0], rtol=1e-4, atol=1e-4 * float(grads[0].abs().max()))


@pytest.mark.parametrize("m", [1, 16, 40, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_graph_and_on_another_stream(m: int, dtype: torch.dtype) -> None:
    fmt, shape = "nf4", (32, 8192)  # slices, so that there is scratch
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    x = torch.randn(m, 8192, device="cuda", dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = ops.linear(x, packed, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, packed, spec)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    x.mul_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, ops.linear(x, packed, spec))


def test_what_does_not_fit_is_named() -> None:
    fmt, shape = "nf4", (24, 128)
    packed, spec = [t.cuda() for t in folded(fmt, shape)], Format(fmt).spec(shape)
    x = torch.randn(2, 128, device="cuda")
    with pytest.raises(RuntimeError, match=r"bitfold::linear: x must be \[\.\.\., 128\]"):
        ops.linear(x[:, :64], packed, spec)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        ops.linear(x.double(), packed, spec)
    with pytest.raises(RuntimeError, match=r"bias must be a tensor \[24\]"):
        ops.linear(x, packed, spec, torch.zeros(23, device="cuda"))
    with pytest.raises(RuntimeError, match="bias must be on the same device as x"):
        ops.linear(x, packed, spec, torch.zeros(24))
    with pytest.raises(RuntimeError, match="same device"):
        ops.linear(x.cpu(), packed, spec)
    with pytest.raises(RuntimeError):
        ops.linear(x, [t.cpu() for t in packed], spec)
