"""Ops under torch.compile(fullgraph=True), torch.export, fake tensors and the meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bitfold import Format, ops
from support import SOME_FORMATS

OUT, IN = 9, 70
SPEC_OF = {fmt: Format(fmt).spec((OUT, IN)) for fmt in SOME_FORMATS}
pytestmark = pytest.mark.filterwarnings("ignore")


def packed_of(fmt: str) -> list[Tensor]:
    return ops.quantize(torch.randn(OUT, IN), fmt)


class Tiny(nn.Module):
    """Look-up, product and decoding on one packed matrix, its buffers registered like those of a layer."""

    def __init__(self, fmt: str) -> None:
        super().__init__()
        self.spec = SPEC_OF[fmt]
        self.names = []
        for (suffix, _, _), tensor in zip(Format(fmt).buffers((OUT, IN)), packed_of(fmt), strict=True):
            self.names.append(f"weight{suffix}")
            self.register_buffer(self.names[-1], tensor)
        self.bias = nn.Parameter(torch.randn(OUT))

    def forward(self, indices: Tensor) -> Tensor:
        packed = [getattr(self, name) for name in self.names]
        x = ops.embedding(indices, packed, self.spec, torch.float32)
        y = ops.linear(x * 2, packed, self.spec, self.bias)
        # ops.dequantize builds a Format, which is not for tracing: a layer holds the ints instead.
        return y @ torch.ops.bitfold.dequantize(packed, self.spec, torch.float32)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_compiled_whole(fmt: str) -> None:
    model = Tiny(fmt)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices = torch.tensor([[0, 8, 3], [1, 1, 5]])
    assert torch.allclose(compiled(indices), model(indices), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(compiled(indices), model(indices), rtol=1e-5, atol=1e-5)


def test_inductor_compiles_it() -> None:
    model = Tiny("nf4")
    compiled = torch.compile(model, fullgraph=True)
    indices = torch.tensor([4, 2])
    assert torch.allclose(compiled(indices), model(indices), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fmt", ["nf4", "int4-g64", "kmeans3-tensor"])
def test_compiled_gradients(fmt: str) -> None:
    packed, spec = packed_of(fmt), SPEC_OF[fmt]

    def loss(x: Tensor, bias: Tensor) -> Tensor:
        return (ops.linear(x, packed, spec, bias) ** 2).sum()

    grads = []
    x, bias = torch.randn(4, IN), torch.randn(OUT)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        a, b = x.clone().requires_grad_(), bias.clone().requires_grad_()
        function(a, b).backward()
        grads.append((a.grad, b.grad))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5)


def test_a_dynamic_batch_compiles_once() -> None:
    packed, spec = packed_of("nf4"), SPEC_OF["nf4"]
    graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: ops.linear(x, packed, spec), fullgraph=True, dynamic=True, backend=counting
    )
    for rows in (4, 3, 17, 64):  # 2 would be taken for the number of groups
        x = torch.randn(rows, 5, IN)
        assert torch.equal(compiled(x), ops.linear(x, packed, spec))
    assert len(graphs) == 1


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_exported_with_a_dynamic_batch(fmt: str) -> None:
    model = Tiny(fmt).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model, (torch.tensor([1, 2, 3]),), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("bitfold.linear" in name for name in names)
    assert any("bitfold.embedding" in name for name in names)
    for indices in (torch.tensor([8]), torch.arange(9), torch.randint(0, 9, (100,))):
        assert torch.allclose(program.module()(indices), model(indices), rtol=1e-5, atol=1e-5)
    buffers = dict(program.named_buffers())
    assert set(buffers) == set(model.names)
    assert all(not tensor.is_floating_point() for tensor in buffers.values())


def test_export_and_save(tmp_path) -> None:
    model = Tiny("int4-g64").eval()
    torch.export.save(torch.export.export(model, (torch.tensor([1, 2]),)), tmp_path / "tiny.pt2")
    loaded = torch.export.load(tmp_path / "tiny.pt2").module()
    assert torch.allclose(loaded(torch.tensor([7, 0])), model(torch.tensor([7, 0])), rtol=1e-5, atol=1e-5)


def outputs(fmt: str, weight: Tensor, x: Tensor, indices: Tensor) -> list[Tensor]:
    """Everything that the ops return, from the inputs' kind of tensor."""
    spec = Format(fmt).spec((OUT, IN))
    packed = ops.quantize(weight, fmt)
    codes = torch.zeros((5, 13), dtype=torch.uint8, device=x.device)
    bits = Format(fmt).bits
    flat = ops.pack_bits(codes, bits)
    nested = ops.double_quantize(x.float())
    return [
        *packed,
        ops.dequantize(packed, fmt, (OUT, IN), torch.float16),
        ops.linear(x, packed, spec),
        ops.linear(x.requires_grad_(), packed, spec),
        torch.ops.bitfold.linear_grad_input(x[..., :OUT], packed, spec),
        ops.embedding(indices, packed, spec, torch.bfloat16),
        flat,
        ops.unpack_bits(flat, bits, 5, 13),
        *nested,
        ops.double_dequantize(*nested),
    ]


def described(tensors: list[Tensor]) -> list[tuple]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("fmt", SOME_FORMATS)
def test_meta_and_fake_tensors_have_the_real_shapes(fmt: str) -> None:
    def inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.ones(OUT, IN, device=device),
            torch.ones(2, 4, IN, dtype=torch.bfloat16, device=device),
            torch.zeros(3, 1, dtype=torch.int64, device=device),
        )

    real = described(outputs(fmt, *inputs("cpu")))
    on_meta = outputs(fmt, *inputs("meta"))
    assert all(t.is_meta for t in on_meta)
    assert described(on_meta) == real
    with FakeTensorMode():
        assert described(outputs(fmt, *inputs("cpu"))) == real


def test_fake_linear_of_the_wrong_width_fails_like_the_real_one() -> None:
    packed = [t.to("meta") for t in packed_of("nf4")]
    with pytest.raises(RuntimeError, match=r"x must be \[\.\.\., 70\] \(in_features\)"):
        ops.linear(torch.empty(2, 71, device="meta"), packed, SPEC_OF["nf4"])
