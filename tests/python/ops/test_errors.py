"""Bad arguments: what was found and what was expected."""

from __future__ import annotations

import pytest
import torch
from operands import FLOATS, fails, folded, raw

from bitfold import Format, ops
from bitfold.errors import FormatError, WeightError
from support import SOME_FORMATS


@pytest.mark.parametrize("fmt", SOME_FORMATS)
@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")]
)
def test_non_finite_weights_name_the_place(fmt: str, value: float, word: str) -> None:
    for dtype in FLOATS:
        weight = torch.randn(4, 70).to(dtype)
        weight[2, 69] = value
        fails(["weight[2, 69]", word, "finite"], WeightError, ops.quantize, weight, fmt)


def test_weights_that_cannot_be_folded() -> None:
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64):
        fails(
            ["weight", "float32", str(dtype)], WeightError, ops.quantize, torch.ones(4, 16).to(dtype), "nf4"
        )
    fails(["weight", "2-D", "(16,)"], WeightError, ops.quantize, torch.ones(16), "nf4")
    fails(["weight", "2-D", "(2, 3, 16)"], WeightError, ops.quantize, torch.ones(2, 3, 16), "nf4")
    for shape in [(0, 16), (16, 0), (0, 0)]:
        fails(["weight", "at least one", str(shape)], WeightError, ops.quantize, torch.ones(shape), "nf4")
    fails(["method", "round, search", "'best'"], ValueError, ops.quantize, torch.ones(2, 16), "nf4", "best")
    fails(["'nf9'"], FormatError, ops.quantize, torch.ones(2, 16), "nf9")


def test_packed_buffers_that_do_not_fit() -> None:
    packed, spec, _ = folded((5, 70), "int4-g64")
    x = torch.randn(2, 70)
    cut = [packed[0][:-1], *packed[1:]]
    fails(
        ["linear", "weight(int4-g64)", "int8", "175", "[5, 70]", "[174]"],
        RuntimeError,
        ops.linear,
        x,
        cut,
        spec,
    )
    floats = [packed[0], packed[1].view(torch.float16), *packed[2:]]
    fails(["weight_scale(int4-g64)", "int16", "float16", "[5, 2]"], RuntimeError, ops.linear, x, floats, spec)
    fails(["must hold 4 tensors, got 3"], RuntimeError, ops.linear, x, packed[:3], spec)
    fails(["must hold 4 tensors, got 0"], RuntimeError, raw.linear_nograd, x, [], spec, None, 0)
    strided_codes = [torch.zeros(350, dtype=torch.int8)[::2], *packed[1:]]
    fails(["weight(int4-g64)", "non-contiguous"], RuntimeError, ops.linear, x, strided_codes, spec)
    for call in (
        lambda p: ops.dequantize(p, "int4-g64", (5, 70)),
        lambda p: ops.embedding(torch.tensor([0]), p, spec, torch.float32),
        lambda p: raw.linear_grad_input(torch.randn(2, 5), p, spec),
    ):
        fails(["weight(int4-g64)", "175", "[174]"], RuntimeError, call, cut)
    for other in ("nf4", "int8-row", "kmeans4-row"):
        fails([other], RuntimeError, ops.dequantize, packed, other, (5, 70))
    fails(["weight", "[6, 70]"], RuntimeError, ops.dequantize, packed, "int4-g64", (6, 70))


def test_specs_that_make_no_sense() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    for broken in ([], spec[:-1], [*spec, 0], [99, *spec[1:]], [spec[0], spec[1], 65, *spec[3:]]):
        fails(["spec", "Format.spec"], RuntimeError, raw.dequantize, packed, broken, torch.float32)
    for shape in ([-5, 70], [0, 70], [2**62, 4], [2**31, 2**31]):
        fails(
            ["shape", f"({shape[0]}, {shape[1]})"],
            RuntimeError,
            raw.dequantize,
            packed,
            [*spec[:-2], *shape],
            torch.float32,
        )
    weight = torch.randn(5, 70)
    fails(
        ["weight", "[5, 71]", "[5, 70]"], RuntimeError, raw.quantize, weight, Format("nf4").spec((5, 71)), 0
    )
    fails(["method", "7"], RuntimeError, raw.quantize, weight, spec, 7)


def test_activations_that_do_not_fit() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    fails(
        ["x", "[..., 70]", "in_features", "[2, 71]"],
        RuntimeError,
        ops.linear,
        torch.randn(2, 71),
        packed,
        spec,
    )
    fails(["x", "[..., 70]"], RuntimeError, ops.linear, torch.tensor(1.0), packed, spec)
    for dtype in (torch.float64, torch.int64, torch.complex64):
        fails(["x must be float32"], RuntimeError, ops.linear, torch.ones(2, 70).to(dtype), packed, spec)
    fails(["float64"], RuntimeError, ops.linear, torch.ones(2, 70, dtype=torch.float64), packed, spec)
    x = torch.randn(2, 70)
    fails(["bias", "[5]", "[4]"], RuntimeError, ops.linear, x, packed, spec, torch.randn(4))
    fails(["bias", "[1, 5]"], RuntimeError, ops.linear, x, packed, spec, torch.randn(1, 5))
    fails(["bias", "float64"], RuntimeError, ops.linear, x, packed, spec, torch.randn(5).double())
    fails(["grad", "[..., 5]"], RuntimeError, raw.linear_grad_input, torch.randn(2, 6), packed, spec)
    fails(["dtype", "float32", "int64"], RuntimeError, ops.dequantize, packed, "nf4", (5, 70), torch.int64)


@pytest.mark.parametrize("index", [-1, 5, 2**40, -(2**40)])
def test_indices_out_of_range(index: int) -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    indices = torch.tensor([[0, 4], [index, 1]])
    fails([f"index {index}", "5 rows"], RuntimeError, ops.embedding, indices, packed, spec, torch.float32)


def test_indices_of_another_dtype() -> None:
    packed, spec, _ = folded((5, 70), "nf4")
    fails(
        ["indices", "int64", "float32"],
        RuntimeError,
        ops.embedding,
        torch.tensor([1.0]),
        packed,
        spec,
        torch.float32,
    )


def test_packing_errors() -> None:
    codes = torch.tensor([[1, 2, 16]], dtype=torch.uint8)
    fails(["codes[0, 2]", "16", "4 bits"], RuntimeError, ops.pack_bits, codes, 4)
    fails(["bits", "2, 3, 4 or 8", "5"], RuntimeError, ops.pack_bits, codes, 5)
    fails(["codes", "uint8", "int32"], RuntimeError, ops.pack_bits, codes.int(), 4)
    fails(["codes", "[3]"], RuntimeError, ops.pack_bits, codes[0], 4)
    fails(["packed", "[2]", "[3]"], RuntimeError, ops.unpack_bits, torch.zeros(3, dtype=torch.int8), 4, 1, 4)
    fails(["rows and cols"], RuntimeError, ops.unpack_bits, torch.zeros(0, dtype=torch.int8), 4, -1, 4)
    fails(["scales", "float32", "float64"], RuntimeError, ops.double_quantize, torch.ones(3).double())
    fails(["scales[1]", "finite"], RuntimeError, ops.double_quantize, torch.tensor([1.0, float("nan")]))
    good = ops.double_quantize(torch.rand(300))
    for at in range(3):
        broken = list(good)
        broken[at] = broken[at][:-1]
        if at == 0:
            broken[at] = torch.zeros(600, dtype=torch.int8)
        fails(["double_dequantize"], RuntimeError, ops.double_dequantize, *broken)


def test_want_of_memory_names_the_op() -> None:
    """And says so in the words that `accelerate.find_executable_batch_size` looks for."""
    shape = (1, 2**20)
    packed = ops.quantize(torch.ones(shape), "int8-row")
    indices = torch.zeros(2**22, dtype=torch.int64)  # 16 TiB of rows
    with pytest.raises(
        RuntimeError, match=r"^bitfold::embedding: .*DefaultCPUAllocator: can't allocate memory"
    ):
        ops.embedding(indices, packed, Format("int8-row").spec(shape), torch.float32)
