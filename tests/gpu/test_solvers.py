"""Solvers on a GPU against those of the CPU: the same loss to 1e-3, the same words for what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops, outliers, solvers
from bitfold.errors import WeightError
from support import SOME_FORMATS

DENSE = [fmt for fmt in SOME_FORMATS if not Format(fmt).outliers]
ORDERS = list(solvers.ORDERS)
LOSSES = ("loss", "loss_damped", "loss_feedback", "predicted", "plain", "plain_damped", "measured", "tracked")


def inputs_of(tokens: int, n: int, seed: int = 1) -> Tensor:
    """Correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g))
    return mixed * torch.exp(0.7 * torch.randn(n, generator=g))


def hessian_of(n: int, dead: int | None = None) -> Tensor:
    x = inputs_of(3 * n + 8, n)
    if dead is not None:
        x[:, dead] = 0.0
    return x.T @ x / len(x)


def weight_of(rows: int, n: int, seed: int = 2) -> Tensor:
    return 0.05 * torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def loss_of(weight: Tensor, packed: list[Tensor], fmt: str, hessian: Tensor) -> float:
    decoded = ops.dequantize([t.cpu() for t in packed], fmt, (weight.shape[0], weight.shape[1]))
    error = weight.double() - decoded.double()
    return float(((error @ hessian.double()) * error).sum())


def check_gptq(fmt: str, weight: Tensor, hessian: Tensor, **options: Any) -> dict[str, Any]:
    on_gpu = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    _, expected = solvers.gptq_quantize(weight, fmt, hessian, measured_rows=-1, **options)
    packed, report = solvers.gptq_quantize(weight.cuda(), fmt, hessian.cuda(), measured_rows=-1, **on_gpu)
    assert all(t.is_cuda for t in packed)
    # A tie that falls the other way draws the rest of its row anew, some hundredths of its loss.
    rel = 1e-3 if weight.shape[0] >= 150 else 1e-2
    for name in LOSSES:
        assert report[name] == pytest.approx(expected[name], rel=rel, abs=1e-12), (fmt, name, options)
    for name in ("damping", "dead", "fallback", "measured_rows"):
        assert report[name] == expected[name], (fmt, name)
    if "exact" not in options and "cross" not in options and not report["dead"]:
        assert loss_of(weight, packed, fmt, hessian) == pytest.approx(report["loss"], rel=1e-3)
    return report


@pytest.mark.parametrize("fmt", DENSE)
@pytest.mark.parametrize("order", ORDERS)
def test_gptq(fmt: str, order: str) -> None:
    for rows, n in ((200, 336), (40, 61)):
        for scales in ("search-factor", "range"):
            check_gptq(fmt, weight_of(rows, n), hessian_of(n), order=order, scales=scales)


@pytest.mark.parametrize("fmt", ["int4-g128", "nf4", "int3-g64-fz"])
def test_gptq_of_several_sections(fmt: str) -> None:
    weight, hessian = weight_of(300, 1500), hessian_of(1500, dead=7)
    check_gptq(fmt, weight, hessian)
    check_gptq(fmt, weight, hessian, order="groups", dynamic=True)
    before = check_gptq(fmt, weight, hessian, sweeps=2)
    after = check_gptq(fmt, weight, hessian, sweeps=2, refit=1)
    assert after["loss_damped"] <= before["loss_damped"]


@pytest.mark.parametrize("fmt", ["int4-g32", "nf4-g64-nodq", "int4-g64-fz-dq"])
def test_gptq_with_another_target_and_weights_stored_elsewhere(fmt: str) -> None:
    weight, hessian = weight_of(40, 192), hessian_of(192)
    cross = 0.01 * torch.randn(192, 192)
    check_gptq(fmt, weight, hessian, cross=cross, alpha=0.5)
    exact = torch.rand(40, 192) < 0.02
    for dynamic in (False, True):
        check_gptq(fmt, weight, hessian, exact=exact, dynamic=dynamic, order="none", sweeps=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gptq_of_16_bit_weights_of_any_strides(dtype: torch.dtype) -> None:
    weight, hessian = weight_of(33, 130).to(dtype), hessian_of(130)
    _, expected = solvers.gptq_quantize(weight, "int4-g64", hessian)
    for view in (weight.cuda(), weight.cuda().t().contiguous().t()):
        _, report = solvers.gptq_quantize(view, "int4-g64", hessian.double().cuda())
        assert report["loss"] == pytest.approx(expected["loss"], rel=1e-2)


def test_hessians_that_are_hard_to_factor() -> None:
    n, weight = 96, weight_of(20, 96)
    x = inputs_of(5, n)
    for hessian in (x.T @ x, torch.diag(torch.where(torch.arange(n) % 2 == 0, -0.9, 1.0))):
        _, expected = solvers.gptq_quantize(weight, "int4-g32", hessian, damping=0.0)
        _, report = solvers.gptq_quantize(weight.cuda(), "int4-g32", hessian.cuda(), damping=0.0)
        assert report["fallback"] == expected["fallback"]
        assert report["plain"] == pytest.approx(expected["plain"], rel=1e-2)


def test_what_a_gpu_has_no_form_of_is_solved_by_the_cpu() -> None:
    weight, hessian = weight_of(16, 64), hessian_of(64)
    for fmt in ("kmeans4-row", "int8-tensor"):
        assert not solvers.solves_on_gpu(fmt)
        expected, _ = solvers.gptq_quantize(weight, fmt, hessian)
        packed, _ = solvers.gptq_quantize(weight.cuda(), fmt, hessian.cuda())
        assert all(torch.equal(a.cpu(), b) for a, b in zip(packed, expected, strict=True))
        with pytest.raises(RuntimeError, match="is solved on the CPU only"):
            ops._ops.gptq_quantize(
                weight.cuda(), hessian.cuda(), Format(fmt).spec((16, 64)), 0, 0.01, 2, False, 0, 0,
                None, 1.0, None, 64, False,
            )  # fmt: skip


@pytest.mark.parametrize(
    "fmt", ["int3-g64", "int4-g32-fz", "int4-g64-fz-dq", "nf4", "int8-row", "kmeans4-row"]
)
def test_refit_scales(fmt: str) -> None:
    weight, hessian = weight_of(50, 200), hessian_of(200)
    packed = ops.quantize(weight, fmt, "round")
    _, expected = solvers.refit_scales(packed, fmt, weight, hessian)
    refitted, losses = solvers.refit_scales([t.cuda() for t in packed], fmt, weight.cuda(), hessian.cuda())
    assert losses == pytest.approx(expected, rel=1e-3)
    assert all(t.is_cuda for t in refitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean_dtype", [torch.float32, torch.float64])
def test_hessian_update(dtype: torch.dtype, mean_dtype: torch.dtype) -> None:
    for n in (5, 130, 700):
        x = inputs_of(90, n).to(dtype)
        x[3, 0], x[70, n - 1] = float("nan"), float("inf")
        mask = torch.rand(90) < 0.8
        means = []
        for device in ("cpu", "cuda"):
            mean, tokens = torch.full((n, n), float("nan"), device=device, dtype=mean_dtype), 0
            counts = []
            for part in (slice(0, 40), slice(40, 90)):
                part_of = x[part].to(device), mask[part].to(device)
                counts.append(solvers.hessian_update(mean, *part_of, tokens=tokens))
                tokens += counts[-1][0]
            means.append((solvers.hessian_finish(mean).cpu(), counts))
        assert means[0][1] == means[1][1]
        torch.testing.assert_close(means[1][0], means[0][0], rtol=1e-4, atol=1e-4)


def test_cross_update() -> None:
    x, target = inputs_of(60, 130), inputs_of(60, 130, seed=3)
    x[3, 0], target[5, 1] = float("nan"), float("inf")
    found = []
    for device in ("cpu", "cuda"):
        cross = torch.ones(130, 130, device=device)
        counts = solvers.cross_update(cross, target.to(device), x.to(device), tokens=4)
        found.append((cross.cpu(), counts))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["int4-g64-fz", "int2-g32-fz", "int3-g64-fz-dq", "int8-row-fz"])
def test_hqq_solve(fmt: str) -> None:
    for shape in ((40, 256), (3, 61)):
        weight = torch.distributions.Laplace(0.0, 0.02).sample(shape)

        def error(packed: list[Tensor], w: Tensor = weight, shape: tuple[int, int] = shape) -> float:
            decoded = ops.dequantize([t.cpu() for t in packed], fmt, shape)
            return float((decoded - w).abs().pow(0.7).mean())

        expected = error(solvers.hqq_solve(weight, fmt))
        assert error(solvers.hqq_solve(weight.cuda(), fmt)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("fmt", ["int3-g32", "nf4", "int4-g64-fz", "int8-row", "kmeans4-row"])
def test_awq(fmt: str) -> None:
    weight, hessian = weight_of(200, 192), hessian_of(192)
    mean_abs, channel = inputs_of(200, 192).abs().mean(0), torch.arange(192) % 190 - 1
    exact = torch.rand(200, 192) < 0.02
    found = []
    for device in ("cpu", "cuda"):
        w, h, magnitude, of_column = (t.to(device) for t in (weight, hessian, mean_abs, channel))
        reader = solvers.AwqReader(w, Format(fmt), h, magnitude, of_column, tokens=200)
        scale, report = solvers.awq_scale([reader, reader], 190)
        # None: no scale is better, as here for nf4.
        assert scale is None or scale.is_cuda == (device == "cuda")
        losses = [scale is None, report["before"], report["after"], report["alpha"]]
        for marked in (None, exact.to(device)):
            if fmt != "kmeans4-row":
                packed, clipped = solvers.awq_clip(w, fmt, h, exact=marked)
                assert packed[0].is_cuda == (device == "cuda")
                losses += [clipped["groups"], clipped["before"], clipped["after"]]
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_outliers_step_by_step() -> None:
    fmt, weight = Format("int4-g64-outliers"), weight_of(16, 128)
    expected = None
    for device in ("cpu", "cuda"):
        w = weight.to(device)
        mask = outliers.choose_outliers(w, fmt)
        packed = ops.quantize(outliers.set_aside(w, fmt, mask), fmt.dense)
        packed = [t.cpu() for t in outliers.fill_outliers(packed, fmt, w, mask)]
        expected = expected or packed
        assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


def test_runs_on_the_current_stream() -> None:
    weight, hessian = weight_of(64, 256).cuda(), hessian_of(256).cuda()
    expected, _ = solvers.gptq_quantize(2.0 * weight, "int4-g64", hessian)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        weight.mul_(2.0)
        packed, _ = solvers.gptq_quantize(weight, "int4-g64", hessian)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device_than_the_current_one() -> None:
    weight, hessian = weight_of(16, 64), hessian_of(64)
    _, expected = solvers.gptq_quantize(weight, "int4-g32", hessian)
    packed, report = solvers.gptq_quantize(weight.to("cuda:1"), "int4-g32", hessian.to("cuda:1"))
    assert packed[0].device == torch.device("cuda:1")
    assert report["loss"] == pytest.approx(expected["loss"], rel=1e-2)


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision"])
def test_feedback_has_no_tf32(way: str) -> None:
    weight, hessian = weight_of(256, 1024).cuda(), hessian_of(1024).cuda()
    expected, _ = solvers.gptq_quantize(weight, "int4-g64", hessian)
    matmul = torch.backends.cuda.matmul
    try:
        if way == "fp32_precision":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        packed, _ = solvers.gptq_quantize(weight, "int4-g64", hessian)
        assert matmul.fp32_precision == "tf32"
    finally:
        if way == "fp32_precision":
            matmul.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_what_is_not_finite_is_named(value: float, name: str) -> None:
    weight, hessian = weight_of(8, 64).cuda(), hessian_of(64).cuda()
    bad = weight.clone()
    bad[5, 13] = value
    for solve in (
        lambda: solvers.gptq_quantize(bad, "int4-g32", hessian),
        lambda: solvers.gptq_quantize(bad.half(), "int4-g32", hessian),
        lambda: solvers.hqq_solve(bad, "int4-g32-fz"),
        lambda: solvers.awq_clip(bad, "int4-g32", hessian),
    ):
        with pytest.raises(WeightError, match=rf"weight\[5, 13\] is {name}; every weight must be finite"):
            solve()
    spoiled = hessian.clone()
    spoiled[3, 4] = value
    with pytest.raises(RuntimeError, match=rf"hessian\[3, 4\] is {name}; look for non-finite"):
        solvers.gptq_quantize(weight, "int4-g32", spoiled)
    with pytest.raises(RuntimeError, match=rf"cross\[3, 4\] is {name}"):
        solvers.gptq_quantize(weight, "int4-g32", hessian, cross=spoiled)


def test_what_does_not_fit_is_named() -> None:
    weight, hessian = weight_of(8, 64).cuda(), hessian_of(64).cuda()
    with pytest.raises(RuntimeError, match=r"hessian must be .* float64 cuda:0 tensor .* on the CPU"):
        solvers.gptq_quantize(weight, "int4-g32", hessian.cpu())
    with pytest.raises(RuntimeError, match=r"weight must be a cuda:0 tensor .* on the CPU"):
        solvers.gptq_quantize(weight.cpu(), "int4-g32", hessian)
    with pytest.raises(RuntimeError, match=r"hessian must be .* = \[64, 64\], got float32 \[32, 32\]"):
        solvers.gptq_quantize(weight, "int4-g32", hessian[:32, :32].contiguous())
    with pytest.raises(RuntimeError, match="exact must be a bool or uint8 cuda:0 tensor of the weight"):
        solvers.gptq_quantize(weight, "int4-g32", hessian, exact=torch.zeros(8, 64, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="order must be none or groups"):
        solvers.gptq_quantize(weight, "int4-g32", hessian, dynamic=True)
    with pytest.raises(RuntimeError, match="x must be a cuda:0 tensor"):
        solvers.hessian_update(hessian, torch.zeros(3, 64))
    with pytest.raises(RuntimeError, match="mask must be a bool or uint8 cuda:0 tensor"):
        solvers.hessian_update(hessian, torch.zeros(3, 64).cuda(), torch.ones(3, dtype=torch.bool))
    # An op comes to its CUDA kernel even where only a later or optional tensor is on a GPU.
    mask, exact = torch.ones(3, dtype=torch.bool).cuda(), torch.zeros(8, 64, dtype=torch.uint8).cuda()
    with pytest.raises(RuntimeError, match=r"x must be a cuda:0 tensor .* on the CPU"):
        solvers.hessian_update(hessian.cpu(), torch.zeros(3, 64), mask)
    for arguments in ({"cross": hessian}, {"exact": exact}):
        with pytest.raises(RuntimeError, match=r"weight must be a cuda:0 tensor .* on the CPU"):
            solvers.gptq_quantize(weight.cpu(), "int4-g32", hessian.cpu(), **arguments)
    with pytest.raises(RuntimeError, match=r"weight must be a cuda:0 tensor .* on the CPU"):
        solvers.awq_clip(weight.cpu(), "int4-g32", hessian.cpu(), exact=exact)


def test_opcheck() -> None:
    utils = ("test_schema", "test_faketensor")
    ns = torch.ops.bitfold
    weight, hessian = weight_of(8, 64).cuda(), hessian_of(64).cuda()
    spec = list(Format("int4-g32").spec((8, 64)))
    arguments = (weight, hessian, spec, 1, 0.01, 2, False, 1, 1, None, 1.0, None, 64, False)
    torch.library.opcheck(ns.gptq_quantize.default, arguments, test_utils=utils)
    fz = list(Format("int4-g32-fz").spec((8, 64)))
    torch.library.opcheck(ns.hqq_solve.default, (weight, fz, 0.7, 10.0, 1.01, 10), test_utils=utils)
    torch.library.opcheck(ns.hessian_finish.default, (hessian,), test_utils=utils)


def test_a_calibrated_model() -> None:
    import bitfold

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64), torch.nn.Linear(64, 16)
    ).cuda()
    batches = [inputs_of(32, 64, seed).cuda() for seed in range(4)]
    expected = model(batches[0]).detach()
    bitfold.quantize(model, "int4-g32", calibration=batches)
    found = model(batches[0]).detach()
    assert found.is_cuda
    assert float((found - expected).norm() / expected.norm()) < 0.2
