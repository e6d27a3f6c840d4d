"""Streams, graphs, devices, and input that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitfold import Format, ops
from bitfold import cuda as cuda_library
from bitfold.errors import WeightError

FMT, SHAPE = Format("nf4"), (64, 256)


def packed_on(device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [t.to(device) for t in ops.quantize(torch.randn(SHAPE, generator=generator), FMT)]


def unfold(packed: list[Tensor]) -> Tensor:
    return ops.dequantize(packed, FMT, SHAPE, torch.bfloat16)


def test_the_library_is_loaded() -> None:
    assert cuda_library.loaded()
    assert cuda_library.problem() is None


def test_runs_on_the_current_stream() -> None:
    weight = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # what comes later on this stream sees it, on another it does not
        weight.mul_(2.0)
        packed = ops._ops.quantize(weight, FMT.spec((2048, 2048)), 0)
        found = ops.dequantize(packed, FMT, (2048, 2048))
    side.synchronize()
    expected = ops.quantize(weight.cpu(), FMT, "round")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(packed, expected, strict=True))
    assert torch.equal(found.cpu(), ops.dequantize(expected, FMT, (2048, 2048)))


@pytest.mark.parametrize("fmt", ["nf4", "nf4-nodq", "int4-g64", "int4-g64-dq", "int8-row", "int4-g64-fz"])
def test_fold_and_unfold_in_a_graph(fmt: str) -> None:
    weight = torch.randn(SHAPE, device="cuda")
    index = torch.tensor([3, 1], device="cuda")
    spec = Format(fmt).spec(SHAPE)

    def work() -> tuple[list[Tensor], Tensor, Tensor]:
        packed = ops.quantize(weight, fmt)
        return packed, ops.dequantize(packed, fmt, SHAPE), ops.embedding(index, packed, spec, torch.float16)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed, unfolded, rows = work()
    for seed in (1, 2):
        torch.manual_seed(seed)
        weight.copy_(torch.randn(SHAPE))
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.quantize(weight.cpu(), fmt)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(packed, expected, strict=True))
        assert torch.equal(unfolded.cpu(), ops.dequantize(expected, fmt, SHAPE))
        assert torch.equal(rows.cpu(), ops.embedding(index.cpu(), expected, spec, torch.float16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device_than_the_current_one() -> None:
    expected = unfold(packed_on("cpu"))
    with torch.cuda.device(0):
        found = unfold(packed_on("cuda:1"))
        assert torch.cuda.current_device() == 0
    assert found.device == torch.device("cuda:1")
    assert torch.equal(found.cpu(), expected)
    mixed = [*packed_on("cuda:1")[:1], *packed_on("cuda:0")[1:]]
    with pytest.raises(RuntimeError, match=r"cuda:1 tensor .* on cuda:0"):
        unfold(mixed)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: [p[0].cpu(), *p[1:]], r"weight\(nf4\) must be .* int8 cuda:0 tensor .* on the CPU"),
        (lambda p: [p[0], p[1].cpu(), *p[2:]], r"weight_scale\(nf4\) must be .* cuda:0 tensor .* on the CPU"),
        (lambda p: [p[0].view(torch.uint8), *p[1:]], "got uint8"),
        (lambda p: [p[0][:-1], *p[1:]], r"of 8192 elements .* got int8 \[8191\]"),
        (lambda p: [torch.stack((p[0], p[0]), 1)[:, 0], *p[1:]], "got non-contiguous"),
        (lambda p: p[:-1], "must hold 4 tensors, got 3"),
    ],
)
def test_packed_tensors_that_do_not_fit(spoil: Callable[[list[Tensor]], list[Tensor]], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        unfold(spoil(packed_on("cuda")))


def test_other_bad_arguments() -> None:
    packed, spec = packed_on("cuda"), FMT.spec(SHAPE)
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16, got float64"):
        ops.dequantize(packed, FMT, SHAPE, torch.float64)
    with pytest.raises(RuntimeError, match=r"indices must be on the same device .* \(cuda:0\), got the CPU"):
        ops.embedding(torch.tensor([0]), packed, spec, torch.float32)
    with pytest.raises(RuntimeError, match="indices must be int64 or int32, got float32"):
        ops.embedding(torch.zeros(1, device="cuda"), packed, spec, torch.float32)
    with pytest.raises(RuntimeError, match=r"codes\[1, 2\] is 9, too large for 3 bits"):
        ops.pack_bits(torch.tensor([[0, 1, 2], [3, 4, 9]], dtype=torch.uint8, device="cuda"), 3)
    with pytest.raises(RuntimeError, match=r"scales\[2\] \(flat\) is not finite"):
        ops.double_quantize(torch.tensor([1.0, 2.0, float("nan")], device="cuda"))


def test_shapes_over_the_limit() -> None:
    spec, said = list(FMT.spec(SHAPE)), []
    spec[-2] = 2**62
    for device in ("cpu", "cuda"):
        for call in (
            lambda d=device: ops._ops.quantize(torch.zeros(SHAPE, device=d), spec, 0),
            lambda d=device: ops._ops.dequantize(packed_on(d), spec, torch.float32),
            lambda d=device: ops._ops.linear(torch.zeros(1, 256, device=d), packed_on(d), spec, None, 0),
        ):
            with pytest.raises(
                RuntimeError, match=r"^bitfold::\w+: .* 2\^48, got .*4611686018427387904"
            ) as info:
                call()
            said.append(str(info.value).splitlines()[0])
    assert said[:3] == said[3:]


def test_want_of_memory_names_the_op() -> None:
    shape = (1, 2**20)
    packed = [t.cuda() for t in ops.quantize(torch.ones(shape), "int8-row")]
    indices = torch.zeros(2**22, dtype=torch.int64, device="cuda")  # 16 TiB of rows
    with pytest.raises(RuntimeError, match=r"^bitfold::embedding: CUDA out of memory\."):
        ops.embedding(indices, packed, Format("int8-row").spec(shape), torch.float32)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
@pytest.mark.parametrize("fmt", ["nf4", "nf4-nodq", "int4-g64", "int8-row", "kmeans4-row"])
def test_weights_that_are_not_finite(fmt: str, value: float, name: str) -> None:
    weight = torch.randn(SHAPE, device="cuda")
    weight[5, 130] = value
    with pytest.raises(WeightError, match=rf"weight\[5, 130\] is {name}; every weight must be finite"):
        ops.quantize(weight, fmt)


@pytest.mark.parametrize("fmt", ["nf4-nodq", "int4-g64", "int8-row"])
def test_a_group_that_is_not_finite_decodes_to_nan(fmt: str) -> None:
    """The bare op can neither raise nor wait."""
    weight = torch.randn(SHAPE, device="cuda")
    weight[5, 130] = float("inf")
    for method in (0, 1):
        packed = ops._ops.quantize(weight, Format(fmt).spec(SHAPE), method)
        found = ops.dequantize(packed, fmt, SHAPE)
        assert found[5, 130].isnan()
        assert not found[4].isnan().any()


def test_an_index_out_of_range_fails_an_assertion() -> None:
    code = (
        "import torch\nfrom bitfold import Format, ops\nf = Format('nf4')\n"
        "p = [t.cuda() for t in ops.quantize(torch.randn(4, 64), f)]\n"
        "ops.embedding(torch.tensor([1, 4], device='cuda'), p, f.spec((4, 64)), torch.float32)\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "bitfold::embedding: index out of range" in done.stdout + done.stderr


def test_opcheck() -> None:
    packed, spec = packed_on("cuda"), list(FMT.spec(SHAPE))
    utils = ("test_schema", "test_faketensor")
    ns = torch.ops.bitfold
    torch.library.opcheck(ns.dequantize.default, (packed, spec, torch.float16), test_utils=utils)
    index = torch.tensor([1, 2], device="cuda")
    torch.library.opcheck(ns.embedding.default, (index, packed, spec, torch.float16), test_utils=utils)
    torch.library.opcheck(ns.quantize.default, (torch.randn(SHAPE, device="cuda"), spec, 0), test_utils=utils)
