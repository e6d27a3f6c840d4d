"""What each accuracy level promises."""

from __future__ import annotations

import pytest
import torch
from operands import FLOATS, fails, folded

from bitfold import ops
from products import assert_product, assert_promise
from support import SOME_FORMATS


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_errors_that_the_levels_promise(fmt: str, dtype: torch.dtype) -> None:
    packed, spec, weight = folded((64, 1100), fmt)
    x = torch.randn(8, 1100)
    x[:, 7::131] *= 20  # channels far larger than the rest, as layers make them
    x = x.to(dtype)
    exact = x.double().numpy() @ weight.T
    for accuracy in ops.ACCURACY:
        for rows in (1, 4, 8):  # different walks over the weight
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
