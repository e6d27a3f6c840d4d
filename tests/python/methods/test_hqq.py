"""hqq: at least the published algorithm, and clear words for what it cannot fold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bitfold
from bitfold import Format, methods, ops, solvers
from bitfold.errors import FormatError, WeightError


def published(weight, group, bits, p=0.7, beta=10.0, kappa=1.01, iterations=20):
    """The public package's loop in float64: min-max scales, beta in units of weights, one stop for all."""
    w, top = weight.double().reshape(-1, group), 2**bits - 1
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low) / top
    zero, least = -low / step, float("inf")
    for _ in range(iterations):
        codes = (w / step + zero).round().clamp(0, top)
        residual = w - (codes - zero) * step
        size = residual.abs()
        error = residual.sign() * (size - size.clamp_min(1e-30) ** (p - 1) / beta).clamp_min(0)
        zero = (codes - (w - error) / step).mean(1, keepdim=True)
        beta *= kappa
        if size.mean() >= least:
            break
        least = size.mean()
    codes = (w / step + zero).round().clamp(0, top)
    return ((codes - zero) * step).reshape(weight.shape)


def decoded(packed, fmt, shape):
    return ops.dequantize(packed, fmt, shape).double()


DRAWS = {
    "gaussian": lambda: torch.randn(64, 512),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((64, 512)),
    "uniform": lambda: torch.rand(64, 512) - 0.5,
    "outliers": lambda: torch.randn(64, 512) * torch.where(torch.rand(64, 512) < 0.01, 12.0, 1.0),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_below_those_of_the_published_algorithm(bits, draw):
    weight, fmt = DRAWS[draw]() * 0.02, f"int{bits}-g64-fz"
    ours = decoded(solvers.hqq_solve(weight, fmt), fmt, (64, 512)) - weight
    theirs = published(weight, 64, bits) - weight
    assert ours.square().mean() < theirs.square().mean()
    assert ours.abs().pow(0.7).mean() < theirs.abs().pow(0.7).mean()


@pytest.mark.parametrize(
    "fmt", ["int2-g64-fz", "int3-g32-fz", "int4-g128-fz", "int8-row-fz", "int4-g64-fz-dq"]
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 197), (16, 256)])
def test_every_format_with_real_zero_points_and_any_shape(fmt, shape):
    weight = torch.randn(shape)
    solution = methods.fold_weight(weight, Format(fmt), "hqq")
    assert [tuple(t.shape) for t in solution.packed] == [size for _, _, size in Format(fmt).buffers(shape)]
    plain = decoded(ops.quantize(weight, fmt, "round"), fmt, shape)
    error = (decoded(solution.packed, fmt, shape) - weight).abs().mean()
    assert error <= 1.02 * (plain - weight).abs().mean() + 2e-3


def test_scale_of_the_weights_does_not_matter():
    weight, fmt = torch.randn(16, 128), "int3-g64-fz"
    small = decoded(solvers.hqq_solve(weight * 2**-12, fmt), fmt, (16, 128)) * 2**12
    assert torch.allclose(small, decoded(solvers.hqq_solve(weight, fmt), fmt, (16, 128)), atol=2e-3)


def test_any_strides_and_dtypes():
    weight, fmt = torch.randn(24, 96).bfloat16(), "int4-g32-fz"
    expected = solvers.hqq_solve(weight.float(), fmt)
    for other in (weight, weight.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(solvers.hqq_solve(other, fmt), expected, strict=True))


@pytest.mark.parametrize(
    ("fmt", "named"),
    [("int4-g64", "int4-g64-fz"), ("int3-g32-sym", "int3-g32-fz"), ("nf4", "int4-g64-fz"), ("kmeans4", "fz")],
)
def test_other_formats_are_refused_with_one_that_fits(fmt, named):
    with pytest.raises(FormatError, match=f"use [^ ]*{named}"):
        methods.fold_weight(torch.randn(4, 64), Format(fmt), "hqq")


def test_bad_input_is_named():
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match="p must be in"):
        solvers.hqq_solve(weight, "int4-g64-fz", p=2.0)
    with pytest.raises(ValueError, match="iterations"):
        solvers.hqq_solve(weight, "int4-g64-fz", iterations=0)
    for iterations in (-5, 101, 2**40):
        with pytest.raises(ValueError, match=rf"iterations in \[1, 100\], got .* and {iterations}$"):
            solvers.hqq_solve(weight, "int4-g64-fz", iterations=iterations)
    weight[2, 5] = float("nan")
    with pytest.raises(WeightError, match=r"weight\[2, 5\] is NaN"):
        solvers.hqq_solve(weight, "int4-g64-fz")
    with pytest.raises(WeightError, match="float64"):
        solvers.hqq_solve(weight.double(), "int4-g64-fz")


def test_a_model_without_data():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(7, 64)
    expected = model(x)
    bitfold.quantize(model, "int4-g32-fz", method="hqq", progress=False)
    assert (model(x) - expected).norm() < 0.15 * expected.norm()


def test_fake_kernel_agrees():
    from torch._subclasses.fake_tensor import FakeTensorMode

    fmt = Format("int4-g64-fz")
    with FakeTensorMode() as mode:
        fake = solvers.hqq_solve(mode.from_tensor(torch.randn(8, 128)), fmt)
    real = solvers.hqq_solve(torch.randn(8, 128), fmt)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
