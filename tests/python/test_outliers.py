"""Formats with sparse outliers: which weights are chosen, what they gain, and stored ones that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck

import bitfold
import reference
from bitfold import Format, ops
from bitfold.errors import PackedDataError, WeightError
from bitfold.inspecting import read_manifest
from bitfold.io.shards import Checkpoint
from bitfold.methods import fold_weight
from bitfold.nn import QuantEmbedding, QuantLinear
from bitfold.outliers import choose_outliers, fill_outliers, outlier_problem, set_aside
from bitfold.verifying import Problem, verify_file

raw = torch.ops.bitfold


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Student's t with three degrees of freedom, as float32."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=g)
    chi2 = torch.randn(3, rows, cols, generator=g).square().sum(0)
    return 0.02 * normal / (chi2 / 3).sqrt()


def error(weight: Tensor, fmt: str, method: str | None = None) -> float:
    shape = (weight.shape[0], weight.shape[1])
    off = ops.dequantize(ops.quantize(weight, fmt, method), fmt, shape) - weight
    return float(off.square().mean() / weight.square().mean())


# ---- what they gain ----


@pytest.mark.parametrize(
    ("with_outliers", "dense"),
    # A dense format with no fewer bits, and the factor by which the error must be smaller.
    [
        ("int3-g64-outliers5", "int3-g32"),
        ("int3-g128-outliers5", "int3-g64"),
        ("int4-g128-outliers5", "int4-g64"),
    ],
)
def test_a_heavy_tail_is_better_served_by_outliers_than_by_smaller_groups(
    with_outliers: str, dense: str
) -> None:
    weight = heavy_tailed(512, 1024)
    bits = [Format(f).bits_per_weight((512, 1024)) for f in (with_outliers, dense)]
    assert bits[0] < bits[1] + 0.05
    assert error(weight, with_outliers) < 0.9 * error(weight, dense)


@pytest.mark.parametrize("fmt", ["nf4", "int8-row", "int4-g64", "int3-g64", "int2-g64", "kmeans3-row"])
@pytest.mark.parametrize("method", ["round", "search"])
def test_every_family_gains(fmt: str, method: str) -> None:
    weight = heavy_tailed(64, 512)
    few, many = (error(weight, f"{fmt}-outliers{n}", method) for n in (5, 50))
    assert many < few < error(weight, fmt, method)


def test_methods_fill_such_formats() -> None:
    weight = heavy_tailed(16, 128)
    for method in ("round", "minmax", "search", None):
        folded = fold_weight(weight, Format("int4-g64-outliers"), method)
        packed = getattr(folded, "packed", folded)
        wanted = ops.quantize(weight, "int4-g64-outliers", "round" if method == "minmax" else method)
        assert all(torch.equal(a, b) for a, b in zip(packed, wanted, strict=True))


# ---- step by step ----


@given(
    st.sampled_from(["int4-g16-outliers", "nf4-outliers37", "int8-outliers100", "kmeans2-outliers5"]),
    st.integers(1, 30),
    st.integers(1, 90),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_steps_are_what_quantize_does(fmt: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
    mask = choose_outliers(weight, fmt)
    assert (
        int(mask.sum())
        == Format(fmt).outlier_count((rows, cols))
        == -(-rows * cols * Format(fmt).outliers // 1000)
    )
    rest = set_aside(weight, fmt, mask)
    assert torch.equal(rest[mask == 0], weight.float()[mask == 0])
    assert float(rest.abs().max()) <= float(weight.abs().max())
    packed = fill_outliers(ops.quantize(rest, Format(fmt).dense), fmt, weight, mask)
    for mine, theirs in zip(packed, ops.quantize(weight, fmt), strict=True):
        assert torch.equal(mine, theirs)
    assert outlier_problem("w", named(packed, fmt), Format(fmt), (rows, cols)) is None
    off = ops.dequantize(packed, fmt, (rows, cols)) - weight.float()
    largest = float(reference.sparse(packed, fmt, (rows, cols)).max(initial=1e-6))
    assert float(off[mask == 1].abs().max()) <= 2.0**-10 * max(largest, float(weight.abs().max()))


def test_a_filled_weight_is_filled_anew() -> None:
    fmt, weight = "int4-g64-outliers", heavy_tailed(8, 64)
    packed = ops.quantize(weight, fmt)
    mask = torch.zeros(8, 64, dtype=torch.uint8)
    mask[2, :6] = 1
    again = fill_outliers(packed, fmt, weight, mask)
    assert all(torch.equal(a, b) for a, b in zip(packed[:-4], again[:-4], strict=True))
    assert again[-3].tolist() == [0, 1, 2, 3, 4, 5]
    assert again[-2].tolist() == [0, 0, 0, 6, 6, 6, 6, 6, 6]
    assert torch.allclose(ops.dequantize(again, fmt, (8, 64))[2, :6], weight[2, :6], rtol=1e-3)


def test_importance_is_a_factor_of_the_squared_error() -> None:
    weight, fmt = heavy_tailed(50, 100), "int4-g16-outliers"
    count = Format(fmt).outlier_count((50, 100))
    importance = torch.zeros(100)
    importance[[3, 50]] = 1.0
    columns = choose_outliers(weight, fmt, importance).nonzero()[:, 1]
    assert set(columns.tolist()) == {3, 50}
    importance[50] = 1e-12
    assert choose_outliers(weight, fmt, importance)[:, 3].sum() == 50 == count
    assert torch.equal(choose_outliers(weight, fmt, torch.full((100,), 7.0)), choose_outliers(weight, fmt))


def test_arguments_that_do_not_fit() -> None:
    fmt, weight = "int4-g64-outliers", torch.randn(4, 64)
    mask = choose_outliers(weight, fmt)
    packed = ops.quantize(weight, "int4-g64")
    for words, call in [
        (["int4-g64", "-outliers"], lambda: choose_outliers(weight, "int4-g64")),
        (["importance", "[64]", "[63]"], lambda: choose_outliers(weight, fmt, torch.ones(63))),
        (
            ["importance[2]", "not negative"],
            lambda: choose_outliers(weight, fmt, torch.tensor([1.0, 1, -1] + [1] * 61)),
        ),
        (["importance[0]", "finite"], lambda: choose_outliers(weight, fmt, torch.full((64,), float("inf")))),
        (["mask", "uint8", "[4, 64]"], lambda: set_aside(weight, fmt, mask.bool())),
        (["mask", "[4, 64]", "[4, 63]"], lambda: fill_outliers(packed, fmt, weight, mask[:, 1:])),
        (
            ["must mark 3 of 256", "got 256"],
            lambda: fill_outliers(packed, fmt, weight, torch.ones_like(mask)),
        ),
        (
            ["weight(int4-g64)", "must be"],
            lambda: fill_outliers([packed[0][1:], *packed[1:]], fmt, weight, mask),
        ),
    ]:
        with pytest.raises(RuntimeError) as raised:
            call()
        for word in words:
            assert word in str(raised.value)
    weight[1, 2] = float("nan")
    with pytest.raises(WeightError, match=r"weight\[1, 2\] is NaN"):
        choose_outliers(weight, fmt)
    with pytest.raises(WeightError, match="matrix"):
        choose_outliers(torch.randn(4), fmt)


def test_opcheck() -> None:
    fmt = Format("nf4-outliers")
    weight, spec = torch.randn(70, 5).t(), fmt.spec((5, 70))
    opcheck(raw.choose_outliers.default, (weight, spec, 0, None))
    opcheck(raw.choose_outliers.default, (weight, spec, 1, torch.rand(70)))
    mask = choose_outliers(weight, fmt)
    opcheck(raw.set_aside_outliers.default, (weight, spec, mask))
    dense = ops.quantize(set_aside(weight, fmt, mask), fmt.dense)
    opcheck(raw.fill_outliers.default, (dense, spec, weight, mask))


# ---- layers, files ----


def model_of(fmt: str) -> nn.Module:
    torch.manual_seed(1)
    model = nn.ModuleDict({"embed": nn.Embedding(20, 64), "fc": nn.Linear(64, 30)})
    for module in model.values():
        module.weight.data = heavy_tailed(*module.weight.shape)
    return bitfold.quantize(model, fmt, embeddings=fmt, progress=False)


def forward(model: nn.Module) -> Tensor:
    return model["fc"](model["embed"](torch.arange(20)))


@pytest.mark.parametrize("fmt", ["nf4-outliers50", "int3-g64-outliers"])
def test_a_saved_model_comes_back(fmt: str, tmp_path: Path) -> None:
    model = model_of(fmt)
    assert isinstance(model["fc"], QuantLinear)
    assert isinstance(model["embed"], QuantEmbedding)
    bitfold.save(model, tmp_path / "m.safetensors")
    fresh = nn.ModuleDict({"embed": nn.Embedding(20, 64), "fc": nn.Linear(64, 30)})
    bitfold.load_into(fresh, tmp_path / "m.safetensors")
    assert torch.equal(forward(fresh), forward(model))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())
    stored = sum(t.numel() * t.itemsize for name, t in state.items() if "weight" in name)
    assert stored == model["fc"].packed_nbytes() + model["embed"].packed_nbytes()


def problems_of(file: Path) -> list[Problem]:
    """What verification finds, but for the header, which is large beside so small a model."""
    with Checkpoint(file) as checkpoint:
        found = verify_file(file, checkpoint, read_manifest(file, checkpoint.metadata)).problems
    return [problem for problem in found if problem.name != "whole model"]


def named(packed: list[Tensor], fmt: str | Format, shape: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    return {suffix: t for (suffix, _, _), t in zip(Format(fmt).buffers(shape), packed, strict=True)}


def change(tensor: Tensor, place: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


# Of a matrix [30, 64] with 20 outliers: what is wrong, and words that the refusal must hold.
LIES: list[tuple[str, str, Any, list[str]]] = [
    ("begins late", "_outlier_row", lambda t: change(t, 0, 1), ["from 1 to 20", "from 0 to 20"]),
    ("ends early", "_outlier_row", lambda t: change(t, -1, 19), ["from 0 to 19", "to 20"]),
    ("falls", "_outlier_row", lambda t: change(t, 7, 2**31 - 1), ["row 7 goes from 2147483647"]),
    ("negative", "_outlier_row", lambda t: change(t, 1, -5), ["row 0 goes from 0 to -5"]),
    ("too far right", "_outlier_column", lambda t: change(t, 4, 64), ["64 at 4", "0 to 63"]),
    ("beyond int16", "_outlier_column", lambda t: change(t, 0, -1), ["65535 at 0", "0 to 63"]),
    ("not ascending", "_outlier_column", torch.zeros_like, ["0 after 0", "ascend"]),
]


@pytest.mark.parametrize(("suffix", "lie", "words"), [c[1:] for c in LIES], ids=[c[0] for c in LIES])
def test_row_starts_and_columns_that_lie_are_refused(
    suffix: str, lie: Any, words: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 30))
    bitfold.quantize(model, "int4-g64-outliers", progress=False)
    buffers = model[0]._buffers
    honest = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers[f"weight{suffix}"] = lie(buffers[f"weight{suffix}"])
    file = tmp_path / "lie.safetensors"
    bitfold.save(model, file)
    words = [f"0.weight{suffix}", *words]

    fresh = nn.Sequential(nn.Linear(64, 30))
    with pytest.raises(PackedDataError) as refused:
        bitfold.load_into(fresh, file)
    assert all(word in str(refused.value) for word in words), refused.value
    assert type(fresh[0]) is nn.Linear

    lying = model.state_dict()
    twin = nn.Sequential(QuantLinear(64, 30, format="int4-g64-outliers"))
    twin.load_state_dict(honest)
    with pytest.raises(RuntimeError) as refused:
        twin.load_state_dict(lying)
    assert all(word in str(refused.value) for word in words), refused.value
    assert all(torch.equal(t, honest[name]) for name, t in twin.state_dict().items()), (
        "the module stays whole"
    )

    (problem,) = problems_of(file)
    assert problem.name == words[0]
    assert all(word in str(problem) for word in words)

    model(torch.randn(3, 64))  # wrong numbers, but no crash


def test_verification_passes_what_is_right(tmp_path: Path) -> None:
    bitfold.save(model_of("int4-g64-outliers100"), tmp_path / "m.safetensors")
    assert problems_of(tmp_path / "m.safetensors") == []


def test_wide_columns_are_checked_too() -> None:
    fmt, shape = Format("int2-g64-outliers1"), (2, 66_000)
    packed = ops.quantize(torch.randn(shape), fmt)
    stored = named(packed, fmt, shape)
    assert stored["_outlier_column"].dtype == torch.int32
    assert outlier_problem("w", stored, fmt, shape) is None
    stored["_outlier_column"] = change(stored["_outlier_column"], 3, -1)
    assert "-1 at 3" in str(outlier_problem("w", stored, fmt, shape))
    assert torch.isfinite(ops.dequantize(list(stored.values()), fmt, shape)).all()


def test_a_layer_without_columns_in_its_state_is_told_so() -> None:
    layer = QuantLinear(64, 30, format="int4-g64-outliers")
    state = layer.state_dict()
    del state["weight_outlier_column"]
    with pytest.raises(RuntimeError, match="weight_outlier_column"):
        layer.load_state_dict(state)
