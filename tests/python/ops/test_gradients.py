"""Gradients of products, eager, traced, under checkpointing and on fake tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from operands import FLOATS, folded, raw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bitfold import ops
from products import HALF_ULP
from support import SOME_FORMATS


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
