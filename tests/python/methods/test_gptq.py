"""gptq: lower output errors than methods without data, biases that take the mean error, few tokens, drift."""

from __future__ import annotations

import pytest
import torch

from bitfold import Format, methods, ops
from bitfold.methods import Statistics

FORMATS = [
    "nf4",
    "int2-g64",
    "int3-g64-dq",
    "int4-g64-fz",
    "int8-row",
    "kmeans4-row",
    "kmeans2-row",
    "int3-g64-outliers",
    "nf4-outliers",
]


def inputs(tokens=1200, n=192, shift=0.5, seed=1):
    """Correlated inputs of very different sizes, off zero."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + 0.3 * torch.randn(n, n, generator=draw)
    size = torch.exp(0.7 * torch.randn(n, generator=draw))
    return (torch.randn(tokens, n, generator=draw) @ mix + shift * torch.randn(n, generator=draw)) * size


def statistics(x, x_float=None, bias=False):
    found = Statistics(x.T @ x / len(x), len(x), x.mean(0), x.abs().mean(0), bias=bias)
    if x_float is not None:
        found.cross, found.mean_float = (x_float - x).T @ x / len(x), x_float.mean(0)
    return found


def weights(rows=48, n=192, seed=2):
    return 0.05 * torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))


def fold(weight, fmt, found, **options):
    return methods.fold_weight(weight, Format(fmt), "gptq", found, **options)


def outputs(solution, weight, fmt, x):
    y = x @ ops.dequantize(solution.packed, fmt, tuple(weight.shape)).T
    return y if solution.bias_shift is None else y + solution.bias_shift


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_never_worse_than_search_on_what_it_was_calibrated_on(fmt, bias):
    weight, x = weights(), inputs()
    solution = fold(weight, fmt, statistics(x, bias=bias))
    expected = x @ weight.T
    ours = (outputs(solution, weight, fmt, x) - expected).square().mean()
    plain = methods.fold_weight(weight, Format(fmt), "search")
    theirs = outputs(plain, weight, fmt, x) - expected
    if bias:
        theirs = theirs - theirs.mean(0)  # search could shift its bias as well
    assert ours <= theirs.square().mean()
    assert [tuple(t.shape) for t in solution.packed] == [s for _, _, s in Format(fmt).buffers((48, 192))]


@pytest.mark.parametrize("fmt", ["int2-g64", "nf4", "int3-g64-outliers"])
def test_the_bias_takes_the_mean_error(fmt):
    weight, x = weights(), inputs()
    solution = fold(weight, fmt, statistics(x, bias=True))
    error = outputs(solution, weight, fmt, x) - x @ weight.T
    assert error.mean(0).abs().max() < 1e-4 * error.abs().mean()
    assert fold(weight, fmt, statistics(x)).bias_shift is None


def test_codes_are_chosen_for_deviations_from_the_mean():
    weight, x, fmt = weights(), inputs(shift=6.0), "int2-g64"
    expected = x @ weight.T
    shifted = outputs(fold(weight, fmt, statistics(x, bias=True)), weight, fmt, x) - expected
    around_zero = outputs(fold(weight, fmt, statistics(x)), weight, fmt, x) - expected
    # Even with the same shift of the bias, codes chosen around zero lose more.
    assert shifted.square().mean() < (around_zero - around_zero.mean(0)).square().mean()


def test_few_tokens_raise_the_damping():
    weight = weights()
    found = [
        fold(weight, "int3-g64", statistics(inputs(tokens))).report["damping"] for tokens in (96, 6000, 60000)
    ]
    assert found == pytest.approx([0.3, 2 * 192 / 6000, 0.01], rel=1e-5)
    given = fold(weight, "int3-g64", statistics(inputs(96)), damping=0.05)
    assert given.report["damping"] == pytest.approx(0.05)


@pytest.mark.parametrize("fmt", ["int3-g64", "int3-g64-outliers", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_what_earlier_layers_did_to_the_input_is_made_good(fmt, bias):
    weight, x_float = weights(), inputs(tokens=4000)
    x = x_float + 0.2 * x_float @ torch.randn(192, 192) / 192**0.5 + 0.1
    expected = x_float @ weight.T

    def error(found, **options):
        solution = fold(weight, fmt, found, **options)
        return (outputs(solution, weight, fmt, x) - expected).square().mean()

    without = error(statistics(x, bias=bias))
    crossed = statistics(x, x_float, bias=bias)
    assert error(crossed) < 0.7 * without
    assert error(crossed, alpha=0.5) < without
    if not bias:
        assert error(crossed, alpha=0.0) == pytest.approx(float(without), rel=1e-3)


def test_with_a_bias_and_drift_the_mean_output_is_that_of_the_float_model():
    weight, x_float = weights(), inputs(tokens=4000)
    x = x_float * 1.1 + 0.3
    solution = fold(weight, "int3-g64", statistics(x, x_float, bias=True))
    error = outputs(solution, weight, "int3-g64", x) - x_float @ weight.T
    assert error.mean(0).abs().max() < 1e-3 * error.abs().mean()


def test_outliers_are_as_many_as_the_format_says_and_pay_off():
    torch.manual_seed(3)
    weight = 0.05 * torch.distributions.StudentT(2.5).sample((48, 192))
    x, fmt = inputs(), Format("int3-g64-outliers")
    found = statistics(x)
    solution = fold(weight, fmt, found)
    stored = {suffix: t for (suffix, _, _), t in zip(fmt.buffers((48, 192)), solution.packed, strict=True)}
    count = fmt.outlier_count((48, 192))
    assert solution.report["outliers"] == count == int(stored["_outlier_row"][-1])
    expected = x @ weight.T
    with_them = (outputs(solution, weight, fmt, x) - expected).square().mean()
    dense = fold(weight, "int3-g64", found)
    assert with_them < 0.8 * (outputs(dense, weight, "int3-g64", x) - expected).square().mean()


def test_outliers_of_a_hessian_that_cannot_be_factored_are_chosen_by_its_diagonal_and_said_so():
    weight, fmt, found = weights(), Format("int3-g64-outliers"), statistics(inputs())
    found.hessian = found.hessian - 3 * torch.diag(found.hessian.diagonal())  # indefinite
    solution = fold(weight, fmt, found)
    assert "diagonal" in solution.report["outliers_by"]
    assert solution.report["fallback"]
    assert torch.isfinite(ops.dequantize(solution.packed, fmt, (48, 192))).all()


def test_dead_inputs_take_no_outliers():
    weight, x, fmt = weights(), inputs(), Format("int3-g64-outliers")
    weight[:, 5] = 3.0  # large, but what it meets is always zero
    x[:, 5] = 0
    solution = fold(weight, fmt, statistics(x))
    stored = {suffix: t for (suffix, _, _), t in zip(fmt.buffers((48, 192)), solution.packed, strict=True)}
    assert 5 not in stored["_outlier_column"].tolist()


def test_alpha_without_cross_statistics_is_refused():
    with pytest.raises(ValueError, match=r"alpha=0\.5.*float_stream"):
        fold(weights(), "int4-g64", statistics(inputs()), alpha=0.5)


@pytest.mark.parametrize("order", ["none", "descending", "groups"])
def test_orders(order):
    weight, found = weights(), statistics(inputs())
    report = fold(weight, "int4-g64", found, order=order).report
    assert report["loss_damped"] < report["plain_damped"]
    assert not report["fallback"]


def test_dead_inputs_and_one_token_fold():
    weight, x = weights(), inputs()
    x[:, 5] = 0
    for fmt in ("int3-g64", "int3-g64-outliers"):
        for bias in (False, True):
            assert fold(weight, fmt, statistics(x, bias=bias)).report["dead"] == 1
            one = fold(weight, fmt, statistics(x[:1], bias=bias))
            assert torch.isfinite(ops.dequantize(one.packed, fmt, (48, 192))).all()


def test_options_that_do_not_exist_are_named():
    weight, found = weights(), statistics(inputs())
    with pytest.raises(TypeError, match="dampening"):
        fold(weight, "int4-g64", found, dampening=0.1)
    with pytest.raises(ValueError, match=r"order must be one of .*descending.*groups.*'random'"):
        fold(weight, "int4-g64", found, order="random")
    with pytest.raises(RuntimeError, match="order must be none or groups"):
        fold(weight, "int4-g64", found, order="descending", dynamic=True)
