"""Calibrated solvers against GPTQ as it was published, in float64, and against their own promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops, solvers
from bitfold.errors import FormatError, WeightError
from support import SOME_FORMATS

ORDERS = list(solvers.ORDERS)
DENSE = [fmt for fmt in SOME_FORMATS if not Format(fmt).outliers]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(tokens: int, n: int, seed: int = 1) -> Tensor:
    """Correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, n, generator=g) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=g))
    return mixed * torch.exp(0.7 * torch.randn(n, generator=g))


def hessian_of(x: Tensor) -> Tensor:
    hessian = torch.empty(x.shape[-1], x.shape[-1])
    solvers.hessian_update(hessian, x)
    return solvers.hessian_finish(hessian)


def weight_of(rows: int, n: int, seed: int = 2) -> Tensor:
    return 0.05 * torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    wide = hessian.double()
    return wide + damping * wide.diag().mean() * torch.eye(len(wide), dtype=torch.float64)


def loss_of(weight: Tensor, packed: list[Tensor], fmt: str, hessian: Tensor) -> float:
    error = weight.double() - ops.dequantize(packed, fmt, (weight.shape[0], weight.shape[1])).double()
    return float(((error @ hessian.double()) * error).sum())


def published(weight: Tensor, hessian: Tensor, order: list[int], grid: Tensor, size: int) -> Tensor:
    """Cholesky, inverse, Cholesky, column by column. grid: scale and zero point, [2, out, groups]."""
    h = damped(hessian)[order][:, order]
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w = weight.double()[:, order].clone()
    q = torch.empty_like(w)
    for i, column in enumerate(order):
        scale, zero = grid[:, :, column // size].double()
        q[:, i] = (torch.clamp(torch.round(w[:, i] / scale + zero), 0, 15) - zero) * scale
        w[:, i:] -= ((w[:, i] - q[:, i]) / u[i, i])[:, None] * u[i, i:]
    out = torch.empty_like(q)
    out[:, order] = q
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_gptq_is_the_published_algorithm(order: str) -> None:
    rows, n, size = 512, 200, 64  # one row with a tie that falls the other way must not show
    weight, hessian = weight_of(rows, n), hessian_of(inputs_of(600, n))
    packed, report = solvers.gptq_quantize(weight, "int4-g64-sym", hessian, order=order)
    scales = packed[1].view(torch.float16).float() * 2.0 ** packed[2].item()
    grid = torch.stack([scales, torch.full_like(scales, 8.0)])
    diagonal = hessian.diag()
    columns = sorted(range(n), key=lambda i: -float(diagonal[i])) if order == "descending" else list(range(n))
    if order == "groups":
        means = [float(diagonal[g : g + size].double().mean()) for g in range(0, n, size)]
        columns.sort(key=lambda i: (-means[i // size], -float(diagonal[i])))
    reference = published(weight, hessian, columns, grid, size)
    got = ops.dequantize(packed, "int4-g64-sym", (rows, n)).double()
    assert ((got - reference).abs() > 1e-6).double().mean() < 0.01  # ties that fell the other way
    error = weight.double() - reference
    loss = float(((error @ damped(hessian)) * error).sum())
    assert report["loss_feedback"] == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("fmt", DENSE)
def test_the_loss_added_up_is_the_loss(fmt: str) -> None:
    weight, hessian = weight_of(35, 197), hessian_of(inputs_of(500, 197))
    for order in ORDERS:
        packed, report = solvers.gptq_quantize(weight, fmt, hessian, order=order, measured_rows=-1)
        loss = loss_of(weight, packed, fmt, damped(hessian))
        assert report["loss_feedback"] == pytest.approx(loss, rel=1e-3), order
        assert report["measured"] == pytest.approx(report["tracked"], rel=1e-3), order
        assert report["loss"] == pytest.approx(loss_of(weight, packed, fmt, hessian), rel=1e-3), order
        assert report["loss_damped"] < report["plain_damped"]
        # What the factor promises; clipping and zero errors at few levels are not foreseen.
        assert 0.6 < report["predicted"] / report["loss_feedback"] < 1.2, order


@pytest.mark.parametrize("fmt", DENSE)
def test_sweeps_and_refits_only_lower_the_loss(fmt: str) -> None:
    weight, hessian = weight_of(20, 130), hessian_of(inputs_of(400, 130))
    before = float("inf")
    for sweeps, refit in ((0, 0), (1, 0), (3, 0), (3, 2)):
        packed, report = solvers.gptq_quantize(weight, fmt, hessian, sweeps=sweeps, refit=refit)
        assert report["loss_damped"] <= before * (1 + 1e-6)
        assert report["loss_damped"] == pytest.approx(
            loss_of(weight, packed, fmt, damped(hessian)), rel=1e-3
        ), "what is stored"
        before = report["loss_damped"]


@pytest.mark.parametrize("scales", list(solvers.SCALES))
@pytest.mark.parametrize(
    "fmt", ["int4-g32", "int3-g64-fz", "int2-g16-dq", "nf3", "int4-g128-sym-dq", "nf4-nodq"]
)
def test_dynamic_scales(fmt: str, scales: str) -> None:
    weight, hessian = weight_of(20, 300), hessian_of(inputs_of(700, 300))
    for order in ("none", "groups"):
        packed, report = solvers.gptq_quantize(weight, fmt, hessian, order=order, scales=scales, dynamic=True)
        assert report["loss_damped"] == pytest.approx(loss_of(weight, packed, fmt, damped(hessian)), rel=1e-3)
        assert report["loss_damped"] < report["plain_damped"]
    with pytest.raises(RuntimeError, match="order must be none or groups"):
        solvers.gptq_quantize(weight, fmt, hessian, order="descending", dynamic=True)


@pytest.mark.parametrize("fmt", DENSE)  # every one: tests/cpp/solvers/gptq_test.cc
def test_formats_at_ragged_shapes(fmt: str) -> None:
    for rows, n in ((1, 1), (3, 53), (17, 97)):
        weight, hessian = weight_of(rows, n), hessian_of(inputs_of(3 * n + 8, n))
        packed, report = solvers.gptq_quantize(
            weight, fmt, hessian, order="groups", sweeps=1, refit=1, measured_rows=-1
        )
        stored = [(tuple(t.shape), t.dtype) for t in packed]
        assert stored == [(tuple(t.shape), t.dtype) for t in ops.quantize(weight, fmt)]
        assert report["loss_damped"] <= report["plain_damped"] * 1.001 + 1e-12
        assert report["loss_damped"] == pytest.approx(
            loss_of(weight, packed, fmt, damped(hessian)), rel=1e-3, abs=1e-12
        )


def test_static_groups_of_a_descending_order_stay_contiguous() -> None:
    weight, hessian = weight_of(8, 128), hessian_of(inputs_of(300, 128))
    for scales in solvers.SCALES:
        if scales == "search-factor":
            continue  # weighs columns by the order
        one, _ = solvers.gptq_quantize(weight, "int4-g16", hessian, order="none", scales=scales)
        other, _ = solvers.gptq_quantize(weight, "int4-g16", hessian, order="descending", scales=scales)
        assert torch.equal(one[1], other[1]), "scales do not hang on the order"
        assert not torch.equal(one[0], other[0])


def test_range_scales_are_those_of_rounding() -> None:
    weight, hessian = weight_of(8, 100), hessian_of(inputs_of(300, 100))
    for fmt in ("int4-g16", "int8-row", "nf4", "int2-g64", "int4-g32-fz", "int4-tensor"):
        packed, _ = solvers.gptq_quantize(weight, fmt, hessian, scales="range")
        rounded = ops.quantize(weight, fmt, "round")
        assert all(torch.equal(a, b) for a, b in zip(packed[1:], rounded[1:], strict=True)), fmt


def test_dead_inputs() -> None:
    x = inputs_of(300, 70)
    x[:, [0, 33, 69]] = 0
    weight, hessian = weight_of(8, 70), hessian_of(x)
    for fmt in ("int4-g16", "nf4", "int2-g64"):
        packed, report = solvers.gptq_quantize(weight, fmt, hessian, sweeps=1, refit=1)
        assert report["dead"] == 3
        assert report["loss"] == pytest.approx(loss_of(weight, packed, fmt, hessian), rel=1e-3)
    assert solvers.gptq_quantize(weight, "int4-g16", torch.zeros(70, 70))[1]["dead"] == 70


def test_hessians_that_are_no_good() -> None:
    weight = weight_of(8, 40)
    few = inputs_of(3, 40)  # rank 3
    packed, report = solvers.gptq_quantize(weight, "int4-g16", hessian_of(few), damping=0.0)
    assert not report["fallback"]
    assert 0 < report["damping"] <= 0.5
    indefinite = torch.eye(40)
    indefinite[3, 4] = indefinite[4, 3] = 8.0
    packed, report = solvers.gptq_quantize(weight, "int4-g16", indefinite)
    assert report["fallback"]
    assert report["damping"] == 0.5
    searched = ops.quantize(weight, "int4-g16", "search")
    shape = (8, 40)
    error, best = (
        float((ops.dequantize(p, "int4-g16", shape) - weight).square().sum()) for p in (packed, searched)
    )
    assert error == pytest.approx(best, rel=0.02), "searched rounding"
    for bad in (float("nan"), float("inf")):
        broken = torch.eye(40)
        broken[7, 9] = bad
        with pytest.raises(RuntimeError, match=r"hessian\[7, 9\] is"):
            solvers.gptq_quantize(weight, "int4-g16", broken)
    with pytest.raises(RuntimeError, match=r"hessian must be .* \[40, 40\]"):
        solvers.gptq_quantize(weight, "int4-g16", torch.eye(39))


def test_any_number_of_rows_may_be_measured() -> None:
    weight = weight_of(40, 16)
    for asked, measured in ((0, 0), (1, 16), (17, 32), (40, 40), (2**63 - 1, 40), (-1, 40), (-(2**63), 40)):
        _, report = solvers.gptq_quantize(weight, "nf4", torch.eye(16), measured_rows=asked)
        assert report["measured_rows"] == measured


def test_bad_weights_and_options() -> None:
    weight, hessian = weight_of(4, 16), torch.eye(16)
    weight[2, 5] = float("nan")
    with pytest.raises(WeightError, match=r"weight\[2, 5\] is NaN"):
        solvers.gptq_quantize(weight, "nf4", hessian)
    with pytest.raises(WeightError, match="must be float32"):
        solvers.gptq_quantize(weight.double(), "nf4", hessian)
    with pytest.raises(ValueError, match="order must be one of none, descending, groups"):
        solvers.gptq_quantize(weight, "nf4", hessian, order="act")
    with pytest.raises(ValueError, match="scales must be one of"):
        solvers.gptq_quantize(weight, "nf4", hessian, scales="best")
    with pytest.raises(RuntimeError, match="damping must be between"):
        solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, damping=2.0)
    for alpha in (7.0, -1.0, float("nan")):
        with pytest.raises(RuntimeError, match="alpha must be between"):
            solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, alpha=alpha)
    with pytest.raises(RuntimeError, match=r"cross\[0, 0\] is NaN"):
        solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, cross=torch.full((16, 16), float("nan")))
    with pytest.raises(RuntimeError, match="sweeps must be between 0 and 1000, got 1001"):
        solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, sweeps=1001)
    with pytest.raises(RuntimeError, match="refits must be between 0 and 1000, got -1"):
        solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, refit=-1)
    packed, _ = solvers.gptq_quantize(weight_of(4, 16), "nf4", hessian, sweeps=1000)  # is allowed
    for damping in (-0.5, 5.0, float("nan")):
        with pytest.raises(RuntimeError, match="damping must be between"):
            solvers.refit_scales(packed, "nf4", weight_of(4, 16), hessian, damping=damping)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_and_strides(dtype: torch.dtype) -> None:
    weight, hessian = weight_of(20, 50).to(dtype), hessian_of(inputs_of(200, 50))
    want, _ = solvers.gptq_quantize(weight.float(), "int4-g16", hessian)
    for same in (weight, weight.T.contiguous().T, torch.stack([weight, weight])[1]):
        got, _ = solvers.gptq_quantize(same, "int4-g16", hessian)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_change_nothing() -> None:
    weight, hessian = weight_of(100, 260), hessian_of(inputs_of(700, 260))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, _ = solvers.gptq_quantize(weight, "int4-g64", hessian, sweeps=1, refit=1)
        results.append(ops.dequantize(packed, "int4-g64", (100, 260)))
    for other in results[1:]:  # BLAS may add in another order
        assert ((other - results[0]).abs() > 1e-6).float().mean() < 0.01


def test_a_moved_target_makes_good_what_the_input_lost() -> None:
    x_float = inputs_of(600, 60)
    x = x_float + 0.3 * torch.roll(x_float, 1, dims=1)
    weight, hessian, cross = weight_of(30, 60), hessian_of(x), torch.empty(60, 60)
    assert solvers.cross_update(cross, x_float, x) == (600, 0)
    losses = {}
    for alpha in (0.0, 0.25, 1.0):
        packed, report = solvers.gptq_quantize(
            weight, "int4-g16", hessian, cross=cross, alpha=alpha, measured_rows=-1
        )
        q = ops.dequantize(packed, "int4-g16", (30, 60))
        losses[alpha] = float((x_float @ weight.T - x @ q.T).square().sum())
        assert report["measured"] == pytest.approx(report["tracked"], rel=1e-3)
    assert losses[1.0] < 0.5 * losses[0.25]
    assert losses[0.25] < losses[0.0]


def test_exact_entries() -> None:
    weight, hessian = weight_of(20, 90), hessian_of(inputs_of(300, 90))
    exact = torch.zeros(20, 90, dtype=torch.bool)
    exact.view(-1)[::37] = True
    weight[exact] *= 50
    packed, report = solvers.gptq_quantize(weight, "int4-g16", hessian, exact=exact, sweeps=1, refit=1)
    q = torch.where(exact, weight, ops.dequantize(packed, "int4-g16", (20, 90)))
    error = (weight - q).double()
    assert report["loss_damped"] == pytest.approx(float(((error @ damped(hessian)) * error).sum()), rel=1e-3)
    assert report["loss_damped"] < 0.3 * solvers.gptq_quantize(weight, "int4-g16", hessian)[1]["loss_damped"]
    with pytest.raises(RuntimeError, match="exact must be"):
        solvers.gptq_quantize(weight, "int4-g16", hessian, exact=exact[:1])


@pytest.mark.parametrize("fmt", ["int4-g16", "int3-g64-fz", "nf4", "int8-row", "int4-tensor", "kmeans4-row"])
def test_refit_keeps_codes_and_lowers_the_loss(fmt: str) -> None:
    weight, hessian = weight_of(20, 90), hessian_of(inputs_of(300, 90))
    packed = ops.quantize(weight, fmt)
    refitted, losses = solvers.refit_scales(packed, fmt, weight, hessian)
    assert torch.equal(packed[0], refitted[0])
    assert losses["before"] == pytest.approx(loss_of(weight, packed, fmt, damped(hessian)), rel=1e-3)
    assert losses["after"] == pytest.approx(loss_of(weight, refitted, fmt, damped(hessian)), rel=1e-3)
    assert losses["after"] <= losses["before"]


# ---- statistics ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 33, 300])
def test_hessian_of_any_split(n: int, dtype: torch.dtype) -> None:
    x = inputs_of(50, n).reshape(5, 10, n)
    mask = torch.ones(5, 10, dtype=torch.bool)
    mask[1, 4:] = False
    x[1, 5] = float("nan")  # masked
    x[3, 3, 0] = float("inf")
    hessian, tokens, dropped = torch.full((n, n), float("nan"), dtype=dtype), 0, 0
    for batch in ([0], [1, 2, 3], [4]):
        counted, bad = solvers.hessian_update(hessian, x[batch], mask[batch], tokens)
        tokens, dropped = tokens + counted, dropped + bad
    solvers.hessian_finish(hessian)
    mask[3, 3] = False
    kept = x[mask].double()
    assert (tokens, dropped) == (len(kept), 1)
    want = kept.T @ kept / len(kept)
    torch.testing.assert_close(hessian.double(), want, rtol=0, atol=1e-5 * want.max().item())
    assert torch.equal(hessian, hessian.T)


def test_hessian_of_halves_views_and_chunks() -> None:
    x = inputs_of(64, 40).to(torch.bfloat16)
    want = torch.empty(40, 40)
    solvers.hessian_update(want, x.float())
    got = torch.empty(40, 40)
    solvers.hessian_update(got, torch.cat([x, x], 1)[:, :40])  # rows apart
    torch.testing.assert_close(solvers.hessian_finish(got), solvers.hessian_finish(want))
    tall = torch.randn(150_000, 64)  # more than one chunk of rows
    many = torch.empty(64, 64)
    assert solvers.hessian_update(many, tall) == (150_000, 0)
    wide = tall.double()
    torch.testing.assert_close(
        solvers.hessian_finish(many).double(), wide.T @ wide / 150_000, rtol=0, atol=1e-5
    )


def test_statistics_say_what_is_wrong() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"hessian must be .* \[8, 8\], got float32 \[7, 7\] on the CPU"):
        solvers.hessian_update(torch.empty(7, 7), x)
    with pytest.raises(RuntimeError, match="mask must be a bool or uint8"):
        solvers.hessian_update(torch.empty(8, 8), x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        solvers.hessian_update(torch.empty(8, 8), x.long())
    with pytest.raises(RuntimeError, match="x_float must have the shape of x"):
        solvers.cross_update(torch.empty(8, 8), x[:3], x)
    with pytest.raises(RuntimeError, match="tokens must be"):
        solvers.hessian_update(torch.empty(8, 8), x, tokens=-1)


def test_opcheck() -> None:
    x = inputs_of(30, 16)
    hessian = hessian_of(x)
    weight, spec = weight_of(4, 16), Format("int4-g16").spec((4, 16))
    bitfold: Any = torch.ops.bitfold
    counting = ("test_schema",)  # numbers of rows are known only once the op has run
    options = (2, 0.01, 1, False, 1, 1, None, 1.0, None, 64, False)
    torch.library.opcheck(bitfold.gptq_quantize.default, (weight, hessian, spec, *options))
    packed = ops.quantize(weight, "int4-g16")
    torch.library.opcheck(bitfold.refit_scales.default, (packed, spec, weight, hessian, 0.01, 2))
    torch.library.opcheck(bitfold.hessian_update.default, (hessian.clone(), x, None, 0), test_utils=counting)
    torch.library.opcheck(bitfold.hessian_finish.default, (hessian.clone(),))
    torch.library.opcheck(bitfold.cross_update.default, (hessian.clone(), x, x, None, 0), test_utils=counting)


def test_formats_with_outliers_are_refused() -> None:
    weight, hessian = torch.randn(4, 64), torch.eye(64)
    with pytest.raises(FormatError, match="exact=mask"):
        solvers.gptq_quantize(weight, "int4-g64-outliers", hessian)


@pytest.mark.parametrize("way", ["set_float32_matmul_precision", "fp32_precision"])
def test_products_on_a_gpu_lose_tf32_for_a_while(way: str) -> None:
    """The two settings that torch has, of which neither may be read where the other was used."""
    from types import SimpleNamespace

    from bitfold.solvers._checks import exact_products

    matmul = torch.backends.cuda.matmul
    on_gpu: Any = SimpleNamespace(is_cuda=True)

    def within() -> str:
        with exact_products(on_gpu):
            assert not matmul.allow_tf32  # which raises where the settings contradict each other
            return matmul.fp32_precision

    before = matmul.fp32_precision
    assert within() == before
    try:
        if way == "fp32_precision":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert within() == "ieee"
        assert matmul.fp32_precision == "tf32"
        with pytest.raises(KeyError), exact_products(on_gpu):
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        if way == "fp32_precision":
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision("highest")
            matmul.fp32_precision = before


def test_products_on_a_gpu_have_tf32_for_a_while() -> None:
    """Nobody has it who must not, and the settings are as they were."""
    from types import SimpleNamespace

    from bitfold.solvers._checks import exact_products, tf32_products

    matmul = torch.backends.cuda.matmul
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    before = matmul.fp32_precision
    with tf32_products():
        assert matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
        with tf32_products():  # as another thread would
            assert matmul.allow_tf32
        assert matmul.allow_tf32
    assert (matmul.fp32_precision, torch.get_float32_matmul_precision()) == (before, "highest")
    with exact_products(on_gpu), exact_products(on_gpu), tf32_products():
        assert not matmul.allow_tf32
    with pytest.raises(KeyError), tf32_products():
        raise KeyError
    assert not matmul.allow_tf32
    try:
        matmul.fp32_precision = "tf32"
        with tf32_products():
            assert matmul.fp32_precision == "tf32"
        # The first of two solves to end leaves the other without.
        first, second = exact_products(on_gpu), exact_products(on_gpu)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert matmul.fp32_precision == "ieee"
        second.__exit__(None, None, None)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_a_number_of_16_bits_is_one_of_tf32() -> None:
    """Ten bits below the leading one and eight of exponent: what `tf32_products` relies on."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype).float()
        values = values[values.isfinite() & ((values == 0) | (values.abs() >= 2.0**-126))]
        assert len(values) > 60_000
        assert not (values.view(torch.int32) & 0x1FFF).any()
