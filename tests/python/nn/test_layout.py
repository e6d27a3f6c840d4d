"""Panels: codes in another order in memory, and rows wherever else anybody looks."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import bitfold
from bitfold import Format
from bitfold.errors import PackedDataError
from bitfold.nn import QuantConv1D, QuantEmbedding, QuantLinear, TiedEmbedding, TiedHead
from bitfold.nn.layout import to_panels, to_rows
from products import assert_promise

FORMATS = [
    "nf4",
    "nf3",
    "nf2",
    "int8-row",
    "int4-g64",
    "int3-g64",
    "int2-g64",
    "kmeans4-tensor",
    "nf4-outliers",
]


@pytest.fixture(params=FORMATS)
def fmt(request):
    return request.param


def layer_of(fmt: str, out: int = 48, cols: int = 192) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_float(nn.Linear(cols, out), fmt)


def in_panels(fmt: str, **shape: int) -> tuple[QuantLinear, QuantLinear]:
    """The same layer twice: in rows and in panels."""
    rows = layer_of(fmt, **shape)
    panels = copy.deepcopy(rows)
    panels.layout = "panels"
    assert (rows.layout, panels.layout) == ("rows", "panels")
    return rows, panels


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """The same tensors in rows; neither is changed."""
    a_state, b_state = copy.deepcopy(a).state_dict(), copy.deepcopy(b).state_dict()
    assert a_state.keys() == b_state.keys()
    for name in a_state:
        assert a_state[name].dtype == b_state[name].dtype
        assert torch.equal(a_state[name], b_state[name]), name


def test_where_each_byte_goes():
    # 32 rows of 64 codes of 4 bits: 8 words a row. Byte b of word w of row r is told by its value.
    rows = torch.arange(32 * 32).view(32, 8, 4)
    panels = to_panels((rows % 128).to(torch.int8).flatten(), Format("nf4"), (32, 64))
    assert (panels.dtype, tuple(panels.shape)) == (torch.int8, (2, 8, 64))
    for row, word, byte in [(0, 0, 0), (3, 5, 2), (15, 7, 3), (16, 0, 1), (31, 6, 0)]:
        assert panels[row // 16, word, 4 * (row % 16) + byte] == rows[row, word, byte] % 128


def test_there_and_back(fmt):
    codes = torch.randint(-128, 128, (layer_of(fmt).weight.numel(),), dtype=torch.int8)
    odd = torch.cat([codes.new_zeros(1), codes])[1:]  # as in a mapped file, at an odd address
    assert odd.data_ptr() % 4
    panels = to_panels(odd, Format(fmt), (48, 192))
    assert panels.nbytes == codes.nbytes
    assert torch.equal(to_rows(panels, Format(fmt), (48, 192)), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("accuracy", ["auto", "fp32", "int8"])
def test_products_keep_their_promise(fmt, dtype, accuracy):
    rows, panels = in_panels(fmt)
    rows.accuracy = panels.accuracy = accuracy
    for m in (1, 2, 5, 17, 70):
        x = torch.randn(m, 192, dtype=dtype)
        exact = x.double() @ rows.dequantize().double().T + rows.bias.double()
        with torch.no_grad():
            assert_promise(panels(x), exact.numpy(), accuracy)


def test_gradients_are_those_of_rows(fmt):
    gradients = []
    for layer in in_panels(fmt):
        x = torch.randn(7, 192, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_every_reader_gets_rows(fmt):
    rows, panels = in_panels(fmt)
    assert_same_state(rows, panels)
    assert torch.equal(panels.dequantize(), rows.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(panels.packed(), rows.packed(), strict=True))
    assert "layout=panels" in repr(panels)
    assert "layout" not in repr(rows)


def test_the_buffer_cannot_be_taken_for_rows():
    rows, panels = in_panels("nf4")
    assert (panels.weight.dtype, panels.weight.device) == (rows.weight.dtype, rows.weight.device)
    assert panels.weight.shape == (3, 24, 64)
    with pytest.raises(RuntimeError, match=r"found int8 \[3, 24, 64\], expected int8 \[4608\]"):
        rows.load_state_dict(dict(panels.named_parameters()) | dict(panels.named_buffers()))
    with pytest.raises(RuntimeError, match="size of tensor"):
        rows.weight.copy_(panels.weight)


def test_no_bytes_twice():
    rows, panels = in_panels("nf4")
    assert sum(buffer.nbytes for buffer in panels.buffers()) == rows.packed_nbytes()
    assert str(bitfold.summary(nn.Sequential(panels))) == str(bitfold.summary(nn.Sequential(rows)))
    assert panels.layout == "panels"


def test_there_and_back_again():
    rows, panels = in_panels("int3-g64")
    panels.layout = "panels"  # again: nothing happens
    panels.layout = "rows"
    assert_same_state(rows, panels)
    x = torch.randn(3, 192)
    assert torch.equal(panels(x), rows(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_lie_the_same_way_and_stand_alone(copied):
    rows, panels = in_panels("nf4")
    twin = copied(panels)
    assert twin.layout == "panels"
    twin.layout = "rows"
    assert panels.layout == "panels"
    assert_same_state(rows, twin)


def test_torch_save_of_the_whole_module():
    rows, panels = in_panels("nf4")
    file = io.BytesIO()
    torch.save(panels, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.layout == "panels"
    assert_same_state(rows, loaded)


def test_a_state_dict_is_the_module_in_rows():
    rows, panels = in_panels("nf4")
    other = QuantLinear.from_float(nn.Linear(192, 48), "nf4")
    state = panels.state_dict()
    assert panels.layout == "rows"
    assert_same_state(rows, panels)
    for name, tensor in other.state_dict().items():  # as torch.distributed.checkpoint loads
        state[name].copy_(tensor)
    assert_same_state(other, panels)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_brings_rows(assign):
    _, panels = in_panels("nf4")
    other = QuantLinear.from_float(nn.Linear(192, 48), "nf4")
    panels.load_state_dict(other.state_dict(), assign=assign)
    assert panels.layout == "rows"
    assert_same_state(other, panels)


def test_loading_something_else_leaves_codes_alone():
    rows, panels = in_panels("nf4")
    before = panels.weight
    panels.load_state_dict({"bias": rows.bias.detach() + 1}, strict=False)
    assert panels.weight is before
    assert torch.equal(panels.bias, rows.bias + 1)


def test_a_load_that_fails_leaves_everything():
    rows, panels = in_panels("nf4")
    with pytest.raises(RuntimeError, match="found format int4-g64"):
        panels.load_state_dict(layer_of("int4-g64").state_dict())
    assert panels.layout == "panels"
    assert_same_state(rows, panels)


def test_casts_keep_panels():
    rows, panels = in_panels("nf4")
    for module in (rows, panels):
        module.half().cpu().to("cpu", torch.bfloat16).share_memory()
    assert panels.layout == "panels"
    assert (panels.dtype, panels.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert panels.weight.is_shared()
    assert_same_state(rows, panels)


def test_leaving_the_cpu_brings_rows():
    _, panels = in_panels("nf4")
    panels.to("meta")
    assert panels.layout == "rows"
    assert panels.weight.shape == (4608,)
    with pytest.raises(ValueError, match="panels are for the CPU, the module is on meta"):
        panels.layout = "panels"


def test_panels_that_came_to_another_device_are_read_as_rows():
    _, panels = in_panels("nf4")
    file = io.BytesIO()
    torch.save(panels, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False, map_location="meta")
    assert loaded.operands()[0].shape == (4608,)
    with pytest.raises(RuntimeError, match="linear: all tensors must be on one device, got cpu, meta"):
        loaded(torch.randn(2, 192))


def test_bad_input():
    layer = layer_of("nf4", out=40)
    with pytest.raises(ValueError, match=r"multiple of 16, in of 64 .* got nf4 \[40, 192\]"):
        layer.layout = "panels"
    with pytest.raises(ValueError, match="layout must be one of 'rows', 'panels', got 'tiles'"):
        layer.layout = "tiles"
    with pytest.raises(ValueError, match="layout must be one of"):
        bitfold.set_layout(layer, "tiles")
    with pytest.raises(ValueError, match=r"got kmeans4-row \[48, 192\]"):
        layer_of("kmeans4-row").layout = "panels"


def test_ops_tell_panels_by_their_shape():
    rows, panels = in_panels("nf4")
    spec = Format("nf4").spec((48, 192))
    codes, *rest = panels.operands()
    x = torch.randn(5, 192)
    y = bitfold.ops.linear(x, [codes, *rest], spec)
    assert torch.equal(y, bitfold.ops.linear(x, rows.packed(), spec))
    with pytest.raises(RuntimeError, match=r"weight\(nf4\) must be a contiguous int8 CPU tensor"):
        bitfold.ops.linear(x, [codes[:2], *rest], spec)
    with pytest.raises(RuntimeError, match=r"weight\(nf4\) must be a contiguous int8 CPU tensor"):
        bitfold.ops.linear(x, [codes.transpose(0, 1), *rest], spec)


def test_ops_that_read_rows_refuse_panels():
    _, panels = in_panels("int4-g64")
    with pytest.raises(RuntimeError, match=r"weight must lie in rows here, got panels \[3, 24, 64\]"):
        bitfold.solvers.refit_scales(panels.operands(), "int4-g64", torch.randn(48, 192), torch.eye(192))
    _, panels = in_panels("int8-row")
    with pytest.raises(RuntimeError, match="weight must lie in rows here, got panels"):
        bitfold.ops.linear_mixed(torch.randn(2, 192), panels.operands(), Format("int8-row").spec((48, 192)))


def test_llm_int8_takes_rows():
    rows, panels = in_panels("int8-row")
    panels.set_llm_int8(6.0)
    assert panels.layout == "rows"
    assert bitfold.set_layout(panels, "panels") == 0
    with pytest.raises(ValueError, match=r"LLM.int8\(\) reads rows; set_llm_int8\(None\) switches it off"):
        panels.layout = "panels"
    assert torch.equal(panels.weight, rows.weight)
    head = TiedHead(QuantEmbedding.from_float(nn.Embedding(64, 128), "int8-row"))
    head.set_llm_int8(6.0)
    x = torch.randn(2, 128)
    expected = head(x)
    head.layout = "panels"
    assert torch.equal(head(x), expected)


def test_a_whole_model():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": QuantEmbedding.from_float(nn.Embedding(64, 128), "nf4"),
            "conv": QuantConv1D(64, 128, format="int4-g64"),
            "narrow": QuantLinear.from_float(nn.Linear(48, 16), "nf4"),
            "alone": QuantEmbedding.from_float(nn.Embedding(32, 64), "nf4"),
        }
    )
    model["head"] = TiedHead(model["embed"])
    model["shared"] = TiedEmbedding(model["embed"])
    before = copy.deepcopy(model)
    assert bitfold.set_layout(model, "panels") == 2
    layouts = {name: model[name].layout for name in ("embed", "conv", "narrow", "alone")}
    assert layouts == {"embed": "panels", "conv": "panels", "narrow": "rows", "alone": "rows"}
    assert_same_state(before, model)
    indices = torch.tensor([[0, 63, 17]])
    for name in ("embed", "shared"):
        assert torch.equal(model[name](indices), before[name](indices))
    x = torch.randn(9, 128)
    assert torch.equal(model["head"](x), before["head"](x))  # of nine rows both are panels on the way
    model["head"].weight = model["embed"].weight  # as transformers' tie_weights does
    assert torch.equal(model["head"].weight, before["head"].weight)
    with pytest.raises(PackedDataError, match="shares the packed matrix"):
        model["head"].weight = before["head"].weight
    assert model["head"].layout == "panels"
    assert "layout=panels" in repr(model["head"])
    for changed in (before, model):
        changed.half()
    assert model["shared"].dtype == torch.float16
    model["alone"].layout = "panels"
    assert bitfold.set_layout(model, "rows") == 4
    assert {module.layout for module in model.values()} == {"rows"}
    assert_same_state(before, model)


def test_saving_and_loading_a_model(tmp_path):
    model = folded()
    bitfold.save(model, tmp_path / "rows.safetensors")
    bitfold.set_layout(model, "panels")
    bitfold.save(model, tmp_path / "panels.safetensors")
    assert (tmp_path / "rows.safetensors").read_bytes() == (tmp_path / "panels.safetensors").read_bytes()
    fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    bitfold.load_into(fresh, tmp_path / "panels.safetensors")
    assert_same_state(model, fresh)


def test_compile():
    rows, panels = in_panels("nf4")
    x = torch.randn(4, 192)
    with torch.no_grad():
        compiled = torch.compile(panels, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), panels(x))
        panels.layout = "rows"
        assert torch.equal(compiled(x), rows(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    _, panels = in_panels("nf4")
    x = torch.randn(4, 192)
    program = torch.export.export(panels, (x,), strict=strict).module()
    assert torch.equal(program(x), panels(x))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):  # rows, for a program in panels
        program.load_state_dict(copy.deepcopy(panels).state_dict())


def test_functional_call():
    rows, panels = in_panels("nf4")
    other = QuantLinear.from_float(nn.Linear(192, 48), "nf4")
    x = torch.randn(5, 192)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(panels, other.state_dict(), (x,)), other(x))
        expected = other(x)
        other.layout = "panels"
        tensors = dict(other.named_parameters()) | dict(other.named_buffers())
        for module in (rows, panels):
            assert torch.equal(torch.func.functional_call(module, tensors, (x,)), expected)
    assert (rows.layout, panels.layout) == ("rows", "panels")
    assert_same_state(rows, panels)


def test_shallow_copies_share_everything():
    rows, panels = in_panels("nf4")
    twin = copy.copy(panels)
    twin.layout = "rows"
    assert panels.layout == "rows"
    assert_same_state(rows, panels)


def test_a_bias_on_meta_is_refused():
    rows, _ = in_panels("nf4")
    rows.bias = nn.Parameter(rows.bias.detach().to("meta"), requires_grad=False)
    with pytest.raises(RuntimeError, match="linear: all tensors must be on one device, got cpu, meta"):
        rows(torch.randn(2, 192))


def test_threads_that_ask_for_a_state_dict_get_the_same():
    def ask(layer, found):
        found.append(layer.state_dict()["weight"])

    for _ in range(20):
        _, panels = in_panels("nf4")
        found: list[torch.Tensor] = []
        threads = [threading.Thread(target=ask, args=(panels, found)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {tensor.data_ptr() for tensor in found} == {panels.weight.data_ptr()}


def test_a_hook_that_offloads_one_layer_goes_on_after_a_state_dict():
    hooks = pytest.importorskip("accelerate.hooks")
    rows, panels = in_panels("nf4")
    x = torch.randn(5, 192)
    with torch.no_grad():
        hook = hooks.AlignDevicesHook(execution_device="cpu", offload=True, offload_buffers=True)
        hooks.add_hook_to_module(panels, hook)
        panels.state_dict()
        assert torch.equal(panels(x), rows(x))


def test_threads_may_go_on_while_a_module_is_cast():
    rows, panels = in_panels("nf4")
    x, errors, done = torch.randn(5, 192), [], threading.Event()
    expected = rows(x)

    def call():
        try:
            while not done.is_set():
                assert torch.equal(panels(x), expected)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        panels.to("cpu")
        panels.layout = "rows" if panels.layout == "panels" else "panels"
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []


def folded() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    return bitfold.quantize(model, "nf4", progress=False)


def test_compare_and_quantize_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False)).eval()
    before = copy.deepcopy(model)
    bitfold.quantize(model, "nf4", skip=["2"], progress=False)
    assert bitfold.set_layout(model, "panels") == 1
    batches = [torch.randn(400, 64) for _ in range(4)]
    again = copy.deepcopy(model)
    bitfold.set_layout(again, "rows")
    for one in (model, again):
        bitfold.quantize(one, "nf4", calibration=batches, progress=False)
    assert torch.equal(model[0].packed()[0], again[0].packed()[0])
    bitfold.set_layout(model, "panels")
    in_rows, in_panels = (bitfold.compare(before, one, batches) for one in (again, model))
    assert [layer.name for layer in in_panels.layers] == ["0", "2"]
    assert in_panels.final.relative_mse == pytest.approx(in_rows.final.relative_mse, rel=1e-3)
    assert in_rows.final.relative_mse > 0
    assert model[0].layout == "panels"


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("buffers", [False, True])
def test_offloading(offload, buffers, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, x = folded(), torch.randn(5, 64)
    with torch.no_grad():
        expected, state = model(x), {name: t.clone() for name, t in model.state_dict().items()}
        bitfold.set_layout(model, "panels")
        if offload == "cpu_offload":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
        else:
            accelerate.disk_offload(
                model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=buffers
            )
        assert torch.equal(model(x), expected)
        assert model[0].weight.is_meta == buffers  # nothing is kept beside what is offloaded
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(model(x), expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
