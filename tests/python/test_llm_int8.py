"""LLM.int8(): the op against the paper's formula, layers and models that use it, what it gains."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

import bitfold
from bitfold import Format, ops
from bitfold.nn import QuantConv1D, QuantEmbedding, QuantLinear, TiedHead, set_llm_int8
from products import HALF_ULP, relative_error

raw = torch.ops.bitfold
FORMATS = ["int8-row", "int8-row-dq", "int8-tensor"]


def weight_of(fmt: str, out: int, cols: int) -> tuple[list[Tensor], list[int], np.ndarray, np.ndarray]:
    """Packed weight, spec, the int8 matrix and c_w / 127 of each row, in float64."""
    packed = ops.quantize(torch.randn(out, cols, generator=torch.Generator().manual_seed(cols)), fmt)
    integers = packed[0].view(torch.uint8).reshape(out, cols).numpy().astype(np.int64) - 128
    ones = [torch.full_like(packed[0], -127), *packed[1:]]  # code 129: the integer 1
    scale = ops.dequantize(ones, fmt, (out, cols))[:, 0].double().numpy()
    return packed, Format(fmt).spec((out, cols)), integers, scale


def formula(x: Tensor, integers: np.ndarray, scale: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Equation 8 of arXiv 2208.07339; x becomes integers in float32, as anywhere; the rest is exact."""
    x32 = x.float().numpy().reshape(-1, x.shape[-1])
    inside = np.where(columns, np.float32(0), x32)
    largest = np.abs(inside).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(largest > 0, np.rint(inside * (np.float32(127) / largest)), 0)
    exact = q.astype(np.int64) @ integers.T
    rest = exact * (largest.astype(np.float64) / 127) * scale
    return rest + (x32[:, columns].astype(np.float64) @ integers[:, columns].T) * scale


def with_outliers(m: int, cols: int, share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(m, cols).clamp(-4, 4)
    return torch.where(torch.rand(m, cols) < share, 20 * x.sign() + x, x).to(dtype)


def assert_formula(y: Tensor, x: Tensor, weight: Any, columns: np.ndarray) -> None:
    _, _, integers, scale = weight
    expected = formula(x, integers, scale, columns)
    size = np.abs(expected) + np.abs(x.double().numpy().reshape(expected.shape[0], -1)[:, columns]) @ (
        np.abs(integers[:, columns].T) * scale
    )
    lost = (columns.sum() + 10) * 2.0**-24 * size
    bound = lost + 1.01 * HALF_ULP[y.dtype] * (np.abs(expected) + lost) + 1e-7 * (y.dtype == torch.float16)
    assert (np.abs(y.double().numpy().reshape(expected.shape) - expected) <= bound).all()


# ---- the op ----


@given(
    st.sampled_from(FORMATS),
    st.integers(1, 40),
    st.sampled_from([1, 5, 63, 64, 65, 130, 300]),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.003, 0.5]),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_is_the_papers_formula(
    fmt: str, out: int, cols: int, m: int, share: float, dtype: torch.dtype
) -> None:
    weight = weight_of(fmt, out, cols)
    x = with_outliers(m, cols, share, dtype)
    y = ops.linear_mixed(x, weight[0], weight[1])
    assert y.shape == (m, out)
    assert y.dtype == dtype
    dynamic = (x.abs() > 6.0).any(dim=0).numpy()
    if m:
        assert_formula(y, x, weight, dynamic)
    known = np.zeros(cols, dtype=bool)
    known[[0, cols // 2, cols - 1]] = True
    y = ops.linear_mixed(x, weight[0], weight[1], columns=np.flatnonzero(known).tolist())
    if m:
        assert_formula(y, x, weight, known)


def test_static_columns_that_are_the_dynamic_ones_change_nothing() -> None:
    packed, spec, _, _ = weight_of("int8-row", 20, 200)
    x, bias = with_outliers(7, 200, 0.01), torch.randn(20)
    columns = (x.abs() > 6.0).any(dim=0).nonzero().flatten().tolist()
    assert columns
    assert torch.equal(
        ops.linear_mixed(x, packed, spec, bias), ops.linear_mixed(x, packed, spec, bias, columns=columns)
    )
    none = ops.linear_mixed(x, packed, spec, bias, threshold=100.0)
    assert torch.equal(none, ops.linear_mixed(x, packed, spec, bias, columns=[]))
    assert torch.equal(
        ops.linear_mixed(x.view(7, 1, 200), packed, spec, bias).view(7, 20),
        ops.linear_mixed(x, packed, spec, bias),
    )


def test_more_rows_than_are_taken_at_a_time() -> None:
    """Columns are chosen by all rows, each of which is then what it would be alone."""
    packed, spec, _, _ = weight_of("int8-row", 20, 200)
    x, bias = torch.randn(1100, 200).clamp(-5, 5), torch.randn(20)
    x[1099, 7], x[2, 150] = 50.0, 7.0
    y = ops.linear_mixed(x, packed, spec, bias)
    for rows in (1, 37, 512, 600):
        parts = [ops.linear_mixed(part, packed, spec, bias, columns=[7, 150]) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), y)


def test_outlier_channels_no_longer_cost_the_others_their_digits() -> None:
    """A few channels sixty times the others, as in models from 6.7 billion parameters on."""
    weight = torch.randn(256, 512)
    packed, spec = ops.quantize(weight, "int8-row"), Format("int8-row").spec((256, 512))
    x = torch.randn(64, 512)
    x[:, [7, 100, 333]] *= 60
    exact = x.double().numpy() @ ops.dequantize(packed, "int8-row", (256, 512)).double().numpy().T
    others = x.clone()
    others[:, [7, 100, 333]] = 0  # what is lost is small beside outliers, and large beside all else
    rest = others.double().numpy() @ ops.dequantize(packed, "int8-row", (256, 512)).double().numpy().T
    lost = {
        name: float(np.sqrt(((y.double().numpy() - exact) ** 2).mean() / (rest**2).mean()))
        for name, y in {
            "mixed": ops.linear_mixed(x, packed, spec),
            "vectorwise": ops.linear_mixed(x, packed, spec, columns=[]),
            "int8": ops.linear(x, packed, spec, accuracy="int8"),
        }.items()
    }
    assert lost["mixed"] < 0.012
    assert lost["mixed"] < 0.1 * lost["vectorwise"]
    assert lost["mixed"] < 0.5 * lost["int8"]


def test_strides_bias_types_and_autocast() -> None:
    packed, spec, _, _ = weight_of("int8-row", 9, 70)
    x = with_outliers(4, 70, 0.02)
    y = ops.linear_mixed(x, packed, spec)
    assert torch.equal(ops.linear_mixed(x.t().contiguous().t(), packed, spec), y)
    bias = torch.randn(9)
    assert torch.allclose(
        ops.linear_mixed(x, packed, spec, bias.double().half()) - bias.half().float(), y, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_mixed(x, packed, spec).dtype == torch.bfloat16


def test_gradients_are_those_of_the_dequantized_weight() -> None:
    packed, spec, _, _ = weight_of("int8-row", 9, 70)
    x, bias = with_outliers(4, 70, 0.02).requires_grad_(), torch.randn(9, requires_grad=True)
    grad = torch.randn(4, 9)
    ops.linear_mixed(x, packed, spec, bias).backward(grad)
    assert torch.allclose(x.grad, grad @ ops.dequantize(packed, "int8-row", (9, 70)), rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [None, [], [3, 69]])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(columns: list[int] | None, needs_grad: bool) -> None:
    packed, spec, _, _ = weight_of("int8-row", 5, 70)
    x = with_outliers(3, 70, 0.05).requires_grad_(needs_grad)
    bias = torch.randn(5, requires_grad=needs_grad)
    opcheck(raw.linear_mixed.default, (x, packed, spec, bias, 6.0, columns))
    opcheck(raw.linear_mixed.default, (x.detach().bfloat16(), packed, spec, None, 0.0, columns))


def test_what_it_refuses() -> None:
    packed, spec, _, _ = weight_of("int8-row", 5, 70)
    x = torch.randn(2, 70)
    for fmt in ("int8-g64", "int8-row-zp", "int4-row", "nf4", "int8-row-outliers"):
        with pytest.raises(RuntimeError, match="int8-row") as error:
            ops.linear_mixed(x, ops.quantize(torch.randn(5, 70), fmt), Format(fmt).spec((5, 70)))
        assert str(Format(fmt)) in str(error.value)
    for columns, words in [
        ([70], "got 70"),
        ([-1], "got -1"),
        ([3, 3], "got 3 after 3"),
        ([5, 2], "got 2 after 5"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            ops.linear_mixed(x, packed, spec, columns=columns)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(RuntimeError, match="threshold must not be negative"):
            ops.linear_mixed(x, packed, spec, threshold=threshold)
    with pytest.raises(RuntimeError, match="in_features"):
        ops.linear_mixed(x[:, 1:], packed, spec)


# ---- layers ----


def layers() -> list[nn.Module]:
    conv = QuantConv1D(70, 9, format="int8-row", bias=False)
    conv._fill(torch.randn(9, 70), None)
    return [
        QuantLinear.from_float(nn.Linear(70, 9), "int8-row"),
        conv,
        TiedHead(QuantEmbedding.from_float(nn.Embedding(9, 70), "int8-row")),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layers(layer: nn.Module, dtype: torch.dtype) -> None:
    layer = copy.deepcopy(layer)
    source = getattr(layer, "source", layer)
    x = with_outliers(4, 70, 0.02, dtype)
    plain = layer(x)
    assert layer.llm_int8_threshold is None
    layer.set_llm_int8()
    assert (layer.llm_int8_threshold, layer.llm_int8_columns) == (6.0, None)
    narrow = x.float() if dtype == torch.float64 else x
    bias = None if layer.bias is None else layer.bias.detach()
    expected = ops.linear_mixed(narrow, source.packed(), source._spec, bias)
    assert torch.equal(layer(x), expected.to(dtype))
    assert "llm_int8_threshold=6" in repr(layer)
    layer.set_llm_int8(4.0, columns=[5, 1, 5])
    assert (layer.llm_int8_threshold, layer.llm_int8_columns) == (4.0, (1, 5))
    fixed = ops.linear_mixed(narrow, source.packed(), source._spec, bias, columns=[1, 5])
    assert torch.equal(layer(x), fixed.to(dtype))
    assert "2 fixed columns" in repr(layer)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
    assert not any("int8" in name for name in layer.state_dict())
    layer.set_llm_int8(None)
    assert torch.equal(layer(x), plain)
    assert "llm_int8" not in repr(layer)


def test_layers_that_do_not_suit_or_columns_that_are_none() -> None:
    with pytest.raises(ValueError, match="int4-g64"):
        QuantLinear(64, 8, format="int4-g64").set_llm_int8()
    layer = QuantLinear(64, 8, format="int8-row")
    for arguments, words in [((-1.0,), "negative"), ((6.0, [64]), "got 64"), ((6.0, [-2, 3]), "got -2")]:
        with pytest.raises(ValueError, match=words):
            layer.set_llm_int8(*arguments)
    assert layer.llm_int8_threshold is None


# ---- models ----


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 96), nn.Linear(96, 32), nn.Linear(32, 7)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))) * scale)


def folded() -> Model:
    torch.manual_seed(3)
    model = Model()
    model.up.weight.data[40] *= 60  # an outlier channel of the input of `down`
    return bitfold.quantize(model, "int8-row", rules={"head": "int4-g16"}, progress=False)


def test_a_model_searches_or_is_calibrated() -> None:
    model, x = folded(), torch.randn(20, 32)
    assert set_llm_int8(model) == {"up": None, "down": None}
    dynamic = model(x)
    assert model.head.__class__ is QuantLinear
    assert set_llm_int8(model, calibration=[x, (x[:3], 1.0), {"x": x, "scale": 2.0}]) == {"up": 0, "down": 1}
    assert model.down.llm_int8_columns == (40,)
    assert torch.allclose(model(x), dynamic, atol=1e-5)
    assert not model.down._forward_pre_hooks
    set_llm_int8(model, None)
    assert model.down.llm_int8_threshold is None
    assert not torch.equal(model(x), dynamic)


def test_models_that_do_not_suit() -> None:
    with pytest.raises(ValueError, match="no packed layer of format int8-row"):
        set_llm_int8(bitfold.quantize(nn.Sequential(nn.Linear(64, 8)), "nf4", progress=False))
    model = folded()
    model.forward = model.up.__call__
    with pytest.warns(UserWarning, match="never reached down"):
        found = set_llm_int8(model, calibration=[torch.zeros(3, model.up.in_features)])
    assert found == {"up": 0, "down": None}
    with pytest.raises(ValueError, match="there are no batches"):
        set_llm_int8(model, calibration=[])
    for wrong in (["some text"], [[1, 2, 3]]):
        with pytest.raises(TypeError, match=r"calibration: batch 1 is a .*tokenizer"):
            set_llm_int8(model, calibration=wrong)


def test_running_properties_are_not_saved(tmp_path: Any) -> None:
    model, plain = folded(), folded()
    set_llm_int8(model)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    safe_open = pytest.importorskip("safetensors").safe_open
    bitfold.save(model, tmp_path / "a")
    bitfold.save(plain, tmp_path / "b")
    with safe_open(tmp_path / "a", "pt") as a, safe_open(tmp_path / "b", "pt") as b:
        assert a.metadata() == b.metadata()
        assert a.keys() == b.keys()
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in b.keys())  # noqa: SIM118


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("calibrated", [False, True])
def test_compiled_whole(calibrated: bool) -> None:
    torch._dynamo.reset()
    model, x = folded(), torch.randn(6, 32)
    set_llm_int8(model, calibration=[x] if calibrated else None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).square().sum().backward()
    model(b).square().sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert relative_error(compiled(x[:2]).detach(), model(x[:2]).detach().double().numpy()) < 1e-5
