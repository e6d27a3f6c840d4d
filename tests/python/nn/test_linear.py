"""QuantLinear for every format: values, state, casts, compile, export, meta, bad data."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitfold
from bitfold.errors import FormatError, PackedDataError, WeightError
from bitfold.nn import QuantLinear
from products import assert_product

IN, OUT = 101, 37  # primes: ragged rows and a ragged last group


def folded(fmt: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantLinear:
    return QuantLinear.from_float(nn.Linear(IN, OUT, bias=bias, dtype=dtype), fmt)


def packed_bytes(module: nn.Module) -> dict[str, bytes]:
    """The raw bytes of all packed buffers."""
    return {
        name: tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in module.state_dict().items()
        if not tensor.is_floating_point()
    }


def test_forward_is_linear_with_the_dequantized_weight(fmt):
    layer = folded(fmt)
    x = torch.randn(2, 5, IN)
    expected = nn.functional.linear(x, layer.dequantize(), layer.bias)
    packed = [getattr(layer, name) for name in layer.packed_names]
    assert_product(layer(x), x, packed, fmt, layer.bias)
    layer.accuracy = "fp32"
    # both sum IN products in float32; the order differs
    bound = IN * torch.finfo(torch.float32).eps * (x.abs() @ layer.dequantize().abs().T + 1)
    assert ((layer(x) - expected).abs() <= bound).all()
    assert layer.dequantize().shape == (OUT, IN)


def test_state_is_exactly_the_buffers_of_the_format_and_the_bias(fmt):
    layer = folded(fmt)
    table = bitfold.Format(fmt).buffers((OUT, IN))
    state = layer.state_dict()
    assert list(state) == ["bias", *[f"weight{suffix}" for suffix, _, _ in table]]
    for suffix, dtype, shape in table:
        assert state[f"weight{suffix}"].dtype == getattr(torch, dtype)
        assert tuple(state[f"weight{suffix}"].shape) == tuple(shape)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    stored = sum(tensor.numel() * tensor.itemsize for name, tensor in state.items() if name != "bias")
    assert stored == layer.packed_nbytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(fmt, dtype):
    layer = folded(fmt, dtype=dtype)
    x = torch.randn(3, IN, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    computed = torch.float32 if dtype == torch.float64 else dtype
    packed = [getattr(layer, name) for name in layer.packed_names]
    assert_product(y.to(computed), x.to(computed), packed, fmt, layer.bias)


def test_strict_state_dict_round_trip(fmt):
    layer = folded(fmt)
    fresh = QuantLinear(IN, OUT, format=fmt)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert packed_bytes(fresh) == packed_bytes(layer)
    x = torch.randn(2, IN)
    assert torch.equal(fresh(x), layer(x))


def test_a_layer_of_its_own_is_zeros_until_a_state_is_loaded(fmt):
    layer = QuantLinear(IN, OUT, format=fmt)
    assert torch.equal(layer(torch.randn(2, IN)), torch.zeros(2, OUT))
    assert torch.equal(layer.dequantize(), torch.zeros(OUT, IN))


def test_codes_of_another_format_are_refused_though_their_buffers_look_alike(tmp_path):
    nf4, log4 = folded("nf4"), folded("log4")
    before = packed_bytes(nf4)
    file = tmp_path / "state.pt"
    torch.save(nn.Sequential(log4).state_dict(), file)
    for state in (nn.Sequential(log4).state_dict(), torch.load(file)):
        with pytest.raises(RuntimeError, match=r"0\.weight: found format log4, expected nf4; fold"):
            nn.Sequential(nf4).load_state_dict(state)
    assert packed_bytes(nf4) == before
    nf4.load_state_dict(dict(log4.state_dict()))  # plain tensors say nothing of their format


def test_copies(fmt):
    layer = folded(fmt).eval()
    x = torch.randn(2, IN)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(twin(x), layer(x))
        assert twin.format == layer.format
        assert twin.dtype == layer.dtype
        assert twin.weight.data_ptr() != layer.weight.data_ptr()
        assert not twin.training


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float64),
        lambda m: m.float(),
    ],
    ids=["half", "bfloat16", "double", "to-half", "to-device-dtype", "type", "float"],
)
def test_casts_leave_packed_bytes_alone(fmt, cast):
    layer = folded(fmt)
    before = packed_bytes(layer)
    x = torch.randn(2, IN)
    y = layer(x)
    cast(layer)
    assert packed_bytes(layer) == before
    assert layer.bias.dtype == layer.dtype
    z = layer(x.to(layer.dtype))
    assert z.dtype == layer.dtype
    assert torch.allclose(z.float(), y, atol=0.05)


def test_meta(fmt):
    with torch.device("meta"):
        layer = QuantLinear(IN, OUT, format=fmt)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(4, IN, device="meta")).shape == (4, OUT)
    filled = folded(fmt)
    layer.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(2, IN)
    assert torch.equal(layer(x), filled(x))
    emptied = layer.to("meta").to_empty(device="cpu")
    assert emptied.weight.dtype == torch.int8
    assert not emptied.weight.is_meta


def test_compile_fullgraph(fmt):
    layer = folded(fmt)
    x = torch.randn(3, IN)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_compile_all_formats_in_one_graph_with_inductor(every_format):
    model = nn.Sequential(*[QuantLinear.from_float(nn.Linear(33, 33), fmt) for fmt in every_format])
    x = torch.randn(3, 33)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-6)


def test_compiled_gradient():
    layer = folded("nf4")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (layer, compiled):
        x = torch.ones(3, IN, requires_grad=True)
        layer.bias.grad = None
        function(x).square().sum().backward()
        grads.append((x.grad, layer.bias.grad.clone()))
    assert torch.allclose(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1])


@pytest.mark.parametrize("strict", [False, True])
def test_export(fmt, strict):
    layer = folded(fmt)
    x = torch.randn(3, IN)
    program = torch.export.export(layer, (x,), strict=strict)
    assert torch.equal(program.module()(x), layer(x))
    assert {name for name, t in program.state_dict.items() if not t.is_floating_point()} == set(
        layer.packed_names
    )


def test_gradient_reaches_input_and_bias(fmt):
    layer = folded(fmt)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, IN), atol=1e-5)
    assert torch.equal(layer.bias.grad, torch.full((OUT,), 3.0))


def test_forward_computes_with_the_buffers_and_bias_of_the_moment(fmt):
    """Loaders, offloading hooks and wrappers replace tensors in place or in the module's dictionaries."""
    layer, other = folded(fmt), folded(fmt)
    x = torch.randn(2, IN)
    layer(x)
    for name in layer.packed_names:
        layer._buffers[name] = other._buffers[name].clone()
    layer._parameters["bias"] = other.bias
    assert torch.equal(layer(x), other(x))
    layer.load_state_dict(folded(fmt).state_dict(), assign=True)
    assert not torch.equal(layer(x), other(x))
    for name in layer.packed_names:
        layer._buffers[name].copy_(other._buffers[name])
    layer.bias = nn.Parameter(other.bias.detach().clone())
    assert torch.equal(layer(x), other(x))
    layer.to("meta")
    assert layer(x.to("meta")).is_meta
    swapped = torch.func.functional_call(layer, other.state_dict(), (x,))
    assert torch.equal(swapped, other(x))


def test_a_bias_that_is_no_plain_parameter_any_more():
    layer = folded("nf4")
    x = torch.randn(2, IN)
    expected = layer(x) + layer.bias

    class Twice(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    nn.utils.parametrize.register_parametrization(layer, "bias", Twice())
    assert torch.allclose(layer(x), expected, atol=1e-5)
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    value = layer._parameters.pop("bias")  # what wrappers that flatten parameters do
    layer.bias = value.detach()
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_repr_shows_format_shape_bytes_and_ratio(fmt):
    layer = folded(fmt, bias=False)
    text = repr(layer)
    nbytes = bitfold.Format(fmt).nbytes((OUT, IN))
    for part in (fmt, f"in_features={IN}", f"out_features={OUT}", "bias=False", f"{nbytes:,} bytes"):
        assert part in text
    assert f"{4 * IN * OUT / nbytes:.2f}x" in text


def test_takes_over_bias_training_flag_and_hooks():
    layer = nn.Linear(8, 4).eval()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    new = QuantLinear.from_float(layer, "int8-row")
    assert new.bias is layer.bias
    assert not new.training
    new(torch.randn(1, 8))
    assert calls == ["before", "after"]


def test_is_a_linear_without_a_float_weight():
    layer = folded("nf4")
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.int8  # what T5 looks at
    assert layer._is_hf_initialized
    layer.reset_parameters()


@pytest.mark.parametrize(("out", "inp"), [(1, 1), (1, 64), (2, 63), (7, 65), (3, 197)])
def test_odd_shapes(fmt, out, inp):
    layer = QuantLinear.from_float(nn.Linear(inp, out), fmt)
    assert layer(torch.randn(0, inp)).shape == (0, out)
    assert layer(torch.randn(inp)).shape == (out,)
    assert layer.dequantize().shape == (out, inp)
    assert layer.dequantize(torch.float64).dtype == torch.float64


def test_transposed_weight_needs_no_copy():
    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(torch.randn(64, 32).t())
    assert not layer.weight.is_contiguous()
    contiguous = nn.Linear(64, 32, bias=False)
    contiguous.weight = nn.Parameter(layer.weight.detach().contiguous())
    assert packed_bytes(QuantLinear.from_float(layer, "nf4")) == packed_bytes(
        QuantLinear.from_float(contiguous, "nf4")
    )


# Bad data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weight(value):
    layer = nn.Linear(8, 4)
    layer.weight.data[2, 3] = value
    with pytest.raises(WeightError, match=r"Linear\.weight: 1 of 32 values are NaN or Inf"):
        QuantLinear.from_float(layer, "nf4")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64, torch.bool])
def test_non_float_weight(dtype):
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.ones(4, 8).to(dtype), requires_grad=False)
    with pytest.raises(WeightError, match=r"dtype is .*, expected one of float32"):
        QuantLinear.from_float(layer, "nf4")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weight():
    with pytest.raises(WeightError, match="no elements"):
        QuantLinear.from_float(nn.Linear(0, 4), "nf4")
    with pytest.raises(WeightError, match="no elements"):
        QuantLinear(0, 4, format="nf4")


def test_unknown_format_and_method():
    with pytest.raises(FormatError):
        QuantLinear(8, 4, format="nf5")
    with pytest.raises(ValueError, match=r"method must be one of .*round.*search.*got 'best'"):
        QuantLinear.from_float(nn.Linear(8, 4), "nf4", method="best")


def test_wrong_shape_and_dtype_are_named_and_nothing_is_copied(fmt):
    layer = folded(fmt)
    before = packed_bytes(layer)
    good = folded(fmt).state_dict()
    suffix, dtype, shape = bitfold.Format(fmt).buffers((OUT, IN))[-1]
    key = f"weight{suffix}"
    bad = dict(good)
    bad[key] = torch.cat([good[key].reshape(-1)] * 2)
    with pytest.raises(RuntimeError, match=rf"{key}: found {dtype} .*, expected {dtype} \[{shape[0]}"):
        layer.load_state_dict(bad)
    bad = dict(good)
    bad[key] = good[key].float()
    with pytest.raises(RuntimeError, match=rf"{key}: found float32 .*, expected {dtype}"):
        layer.load_state_dict(bad, strict=False)
    assert packed_bytes(layer) == before


def test_missing_and_unexpected_buffers_are_named(fmt):
    layer = folded(fmt)
    for suffix, _, _ in bitfold.Format(fmt).buffers((OUT, IN)):
        state = layer.state_dict()
        del state[f"weight{suffix}"]
        with pytest.raises(RuntimeError, match=rf'Missing key.*"weight{suffix}"'):
            layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_other"'):
        layer.load_state_dict(layer.state_dict() | {"weight_other": torch.zeros(1)})


def test_float_weight_of_the_same_shape_is_explained():
    layer = folded("nf4")
    with pytest.raises(RuntimeError, match=r"weight: found float32 \[37, 101\], .*this is a float weight"):
        layer.load_state_dict(nn.Linear(IN, OUT).state_dict(), strict=False)


def test_packed_tensors_that_do_not_fit_are_refused():
    from bitfold.nn._base import check_packed

    layer = folded("nf4")
    with pytest.raises(PackedDataError, match="expected 4 packed tensors, got 1"):
        check_packed(layer, layer.packed()[:1])
    with pytest.raises(PackedDataError, match="weight: found int8"):
        check_packed(layer, [layer.weight[:-1], *layer.packed()[1:]])


def test_autocast_decides_the_dtype_as_for_a_float_layer():
    layer = folded("nf4")
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
    assert y.dtype == compiled.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    expected = nn.functional.linear(x.detach(), layer.dequantize(), layer.bias)
    assert torch.allclose(y.float(), expected, atol=0.05, rtol=0.02)  # bfloat16 in and out


def test_another_kind_of_module_is_refused():
    with pytest.raises(TypeError, match="QuantLinear cannot take the place of a Embedding"):
        QuantLinear.from_float(nn.Embedding(4, 16), "nf4")
    with pytest.raises(TypeError, match="QuantEmbedding cannot take the place of a Linear"):
        bitfold.nn.QuantEmbedding.from_float(nn.Linear(16, 4), "nf4")
