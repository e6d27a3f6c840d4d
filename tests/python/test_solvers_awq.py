"""AWQ: the scale is the best of the grid, clipping lowers the error of products, bad input is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops, solvers
from bitfold.errors import FormatError, WeightError
from bitfold.solvers import AwqReader
from support import SOME_FORMATS

CLIPPED = [
    text
    for text in SOME_FORMATS
    if not (Format(text).outliers or Format(text).grouping == "tensor" or text.startswith("kmeans"))
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(tokens: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    mixed = torch.randn(tokens, n, generator=g) @ (torch.eye(n) + 0.2 * torch.randn(n, n, generator=g))
    return mixed * torch.exp(0.7 * torch.randn(n, generator=g))


def weight_of(rows: int, n: int) -> Tensor:
    torch.manual_seed(2)
    return torch.distributions.Laplace(0.0, 0.02).sample((rows, n))


def reader_of(weight: Tensor, fmt: str, x: Tensor, channel: Tensor | None = None) -> AwqReader:
    channel = torch.arange(weight.shape[1]) if channel is None else channel
    return AwqReader(weight, Format(fmt), x.T @ x / len(x), x.abs().mean(0), channel, len(x))


def loss_with(scale: Tensor, weight: Tensor, fmt: str, x: Tensor) -> float:
    shape = (weight.shape[0], weight.shape[1])
    error = ops.dequantize(ops.quantize(weight * scale, fmt), fmt, shape) / scale - weight
    return float((x @ error.T).square().sum())


@pytest.mark.parametrize("fmt", ["int3-g32", "nf4", "int4-row", "int2-g16-dq", "kmeans4-row", "int8-tensor"])
def test_the_scale_is_the_best_of_those_tried(fmt: str) -> None:
    x, weight = inputs_of(400, 64), weight_of(40, 64)
    x[:, ::9] *= 25
    scale, report = solvers.awq_scale([reader_of(weight, fmt, x)], 64)
    assert (scale is None) == (report["after"] == report["before"])
    assert scale is not None or fmt.startswith("int2")
    scale = torch.ones(64) if scale is None else scale
    assert report["before"] == pytest.approx(loss_with(torch.ones(64), weight, fmt, x), rel=1e-3)
    assert report["after"] == pytest.approx(loss_with(scale, weight, fmt, x), rel=1e-3)
    size = Format(fmt).group_size or 64
    shares = [part.abs() / part.abs().amax(1, keepdim=True) for part in weight.split(size, dim=1)]
    mean, share = x.abs().mean(0), torch.cat(shares, dim=1).mean(0)
    for i in range(20):
        for power in (mean ** (i / 20), mean ** (i / 20) / share ** (1 - i / 20)):
            tried = power / (power.max() * power.min()).sqrt()
            assert report["after"] <= 1.001 * loss_with(tried, weight, fmt, x)


def test_large_matrices_are_judged_by_some_rows() -> None:
    x, weight = inputs_of(64, 2048), weight_of(700, 2048)
    x[:, ::31] *= 30
    scale, report = solvers.awq_scale([reader_of(weight, "int4-g128", x)], 2048)
    judged = torch.linspace(0, 699, 512).long()
    assert scale is not None
    for tried, loss in ((torch.ones(2048), report["before"]), (scale, report["after"])):
        expected = loss_with(tried, weight[judged], "int4-g128", x) * 700 / 512
        assert loss == pytest.approx(expected, rel=1e-3)


def test_readers_count_by_their_tokens() -> None:
    x, other = inputs_of(300, 32), inputs_of(100, 32).flip(1)
    weight = weight_of(24, 32)
    channel = torch.cat([torch.arange(16) // 2, torch.full((16,), -1)])  # two columns to a channel
    readers = [reader_of(weight, "int3-g16", x), reader_of(-weight.half(), "nf4", other, channel)]
    scale, report = solvers.awq_scale(readers, 40)
    ones = torch.ones(32)
    assert scale is not None and scale.shape == (40,)  # noqa: PT018
    by = torch.where(channel >= 0, scale[channel.clamp_min(0)], 1.0)
    for tried, narrow, loss in ((ones, ones, report["before"]), (scale[:32], by, report["after"])):
        expected = loss_with(tried, weight, "int3-g16", x)
        expected += loss_with(narrow, -weight.half().float(), "nf4", other)
        assert loss == pytest.approx(expected, rel=1e-3)
    assert solvers.awq_scale([reader_of(weight, "int3-g16", 0 * x)], 32)[0] is None


@pytest.mark.parametrize("fmt", CLIPPED)
def test_clipping_lowers_the_error_of_products(fmt: str) -> None:
    shape = (40, 150)
    x, weight = inputs_of(900, 150), weight_of(*shape)
    hessian = x.T @ x / 900

    def losses(packed: list[Tensor]) -> tuple[float, float]:
        """Of all, and of the groups on their own."""
        error = ops.dequantize(packed, fmt, shape) - weight
        size = Format(fmt).group_size or 150
        parts = [
            ((e @ hessian[i * size :, i * size :][: e.shape[1], : e.shape[1]]) * e).sum()
            for i, e in enumerate(error.split(size, dim=1))
        ]
        return float(((error @ hessian) * error).sum()), float(sum(parts))

    packed, report = solvers.awq_clip(weight, fmt, hessian)
    plain = ops.quantize(weight, fmt)
    assert [(t.shape, t.dtype) for t in packed] == [(t.shape, t.dtype) for t in plain]
    slack = 0.05 if Format(fmt).double_quant else 1e-3  # 8-bit scales are known once all of them are
    assert report["before"] == pytest.approx(losses(plain)[1], rel=slack)
    assert report["after"] == pytest.approx(losses(packed)[1], rel=slack)
    assert losses(packed)[0] < 1.001 * losses(plain)[0]
    assert 0 < report["clipped"] <= report["groups"]
    for kind in (torch.float16, torch.bfloat16):  # and strides
        narrow = weight.to(kind)
        columns, wide = narrow.T.contiguous().T, narrow.float()
        found = [solvers.awq_clip(w, fmt, h)[0] for w, h in ((columns, hessian.double()), (wide, hessian))]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_two_threads_choose_the_same() -> None:
    x, weight = inputs_of(600, 300), weight_of(500, 300)
    hessian, found = x.T @ x / 600, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        scale, _ = solvers.awq_scale([reader_of(weight, "int4-g64", x)], 300)
        found.append((scale, *solvers.awq_clip(weight, "int4-g64", hessian)[0]))
    # Products of matrices may be added in another order, and a tie or two fall the other way.
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None  # noqa: PT018
        assert (a != b).double().mean() < 1e-3


def test_weights_stored_elsewhere() -> None:
    x, weight = inputs_of(300, 64), weight_of(16, 64)
    hessian, mask = x.T @ x / 300, torch.rand(16, 64) < 0.05
    _, report = solvers.awq_clip(weight, "int3-g32", hessian, exact=mask)
    assert report["after"] < solvers.awq_clip(weight, "int3-g32", hessian)[1]["after"]


def test_what_cannot_be_clipped_is_refused() -> None:
    weight, hessian = weight_of(4, 64), torch.eye(64)
    for fmt in ("int8-tensor", "kmeans4-row"):
        with pytest.raises(FormatError, match=f"{fmt} has no ranges of groups or rows"):
            solvers.awq_clip(weight, fmt, hessian)
    with pytest.raises(FormatError, match="outliers"):
        solvers.awq_clip(weight, "nf4-outliers", hessian)
    with pytest.raises(WeightError, match="must be float32, float16 or bfloat16"):
        solvers.awq_clip(weight.double(), "nf4", hessian)
    with pytest.raises(RuntimeError, match=r"hessian must be a contiguous float32 CPU tensor \[64, 64\]"):
        solvers.awq_clip(weight, "nf4", torch.eye(32))
    with pytest.raises(RuntimeError, match=r"exact must be a contiguous uint8 CPU tensor \[4, 64\]"):
        solvers.awq_clip(weight, "nf4", hessian, exact=torch.zeros(4, 32))
    broken = hessian.clone()
    broken[2, 2] = torch.nan
    with pytest.raises(RuntimeError, match=r"hessian\[2, 2\] is NaN"):
        solvers.awq_clip(weight, "nf4", broken)
    weight[1, 5] = torch.inf
    with pytest.raises(WeightError, match=r"weight\[1, 5\] is infinite"):
        solvers.awq_clip(weight, "nf4", hessian)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(8)}, r"reader 1: hessian must be .* \[16, 16\], got float32 \[8, 8\]"),
        ({"mean_abs": torch.ones(8)}, r"reader 1: mean_abs must be .* \[16\]"),
        ({"mean_abs": torch.full((16,), torch.nan)}, r"reader 1: mean_abs\[0\] must be finite"),
        ({"channel": torch.arange(16).int()}, r"reader 1: channel must be .* int64 .* got int32"),
        ({"channel": torch.arange(16) + 1}, r"reader 1: channel\[15\] must be -1 or below 16, .* got 16"),
        ({"tokens": -3}, r"reader 1: tokens must be .* got -3"),
        ({"weight": torch.full((4, 16), torch.inf)}, r"reader 1: weight\[0, 0\] is infinite"),
        ({"weight": torch.ones(4)}, r"weight must be \[out, in\]"),
    ],
)
def test_readers_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    reader = reader_of(weight_of(4, 16), "int4-g16", inputs_of(40, 16))
    with pytest.raises((RuntimeError, WeightError), match=message):
        solvers.awq_scale([reader, AwqReader(**(vars(reader) | change))], 16)


def test_no_reader_and_no_channel() -> None:
    with pytest.raises(ValueError, match="at least one reader"):
        solvers.awq_scale([], 4)
    with pytest.raises(RuntimeError, match="channels must be at least 1, got 0"):
        solvers.awq_scale([reader_of(weight_of(4, 16), "int4-g16", inputs_of(40, 16))], 0)


def test_opcheck() -> None:
    x, weight = inputs_of(40, 16), weight_of(4, 16)
    spec, hessian = Format("int4-g16").spec((4, 16)), x.T @ x / 40
    raw: Any = torch.ops.bitfold
    lists = ([weight] * 2, spec * 2, [0, 1], [hessian] * 2, [torch.arange(16)] * 2, [x.abs().mean(0)] * 2)
    torch.library.opcheck(raw.awq_scale.default, (*lists, [40, 40], 20))
    torch.library.opcheck(raw.awq_clip.default, (weight, hessian, spec, 1, None))
    torch.library.opcheck(raw.awq_clip.default, (weight, hessian, spec, 0, (weight > 1).byte()))
    with pytest.raises(RuntimeError, match="method must be 0"):
        raw.awq_clip(weight, hessian, spec, 2, None)
    with pytest.raises(RuntimeError, match="for each of the 2 weights"):
        raw.awq_scale(*lists, [40], 20)
