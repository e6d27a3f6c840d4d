"""nf4 and fp4 against bitsandbytes: the package where it is installed, golden files of it everywhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold import Format, ops

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "bitsandbytes_4bit.npz")
GOLDEN_CASES = sorted({name.split(".")[0] for name in GOLDEN.files} - {"versions", "nested"})
ROWS, COLS = 32, 256


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---- golden files ----


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_nf4(case: str) -> None:
    weight = torch.from_numpy(GOLDEN[f"{case}.weight"])
    codes, absmax = ops.quantize(weight, "nf4-nodq")
    assert bytes_of(codes) == GOLDEN[f"{case}.nf4.codes"].tobytes()
    assert bytes_of(absmax) == GOLDEN[f"{case}.nf4.absmax"].tobytes()


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_fp4(case: str) -> None:
    weight = torch.from_numpy(GOLDEN[f"{case}.weight"])
    packed = ops.quantize(weight, "fp4-nodq")
    values = ops.dequantize(packed, "fp4-nodq", tuple(weight.shape)).numpy()
    assert np.allclose(values, GOLDEN[f"{case}.fp4.value"], rtol=1e-6, atol=0)
    assert bytes_of(packed[1]) == GOLDEN[f"{case}.fp4.absmax"].tobytes()


def test_golden_double_quantization() -> None:
    scales = torch.from_numpy(GOLDEN["nested.scales"])
    codes, absmax, offset = ops.double_quantize(scales)
    assert (
        np.abs(offset.view(torch.float32).numpy() - GOLDEN["nested.offset"]) <= 1e-6 * GOLDEN["nested.offset"]
    )
    steps = codes.numpy().view(np.uint8).astype(int) - GOLDEN["nested.codes"].astype(int)
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() <= 0.005, (
        "the two offsets differ in the last bits: at most a few scales fall on the other side"
    )
    assert np.allclose(absmax.view(torch.float32).numpy(), GOLDEN["nested.absmax"], rtol=1e-5)
    every = torch.arange(256).to(torch.uint8).view(torch.int8)
    one = torch.ones(1).view(torch.int32)
    levels = ops.double_dequantize(every, one, torch.zeros(1, dtype=torch.int32))
    assert np.array_equal(levels.numpy(), GOLDEN["nested.map"])


# ---- the package ----


@pytest.fixture(scope="module")
def bnb() -> Any:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    return functional


def on_thresholds(kind: str) -> Tensor:
    """Weights that lie exactly on the boundaries between levels, and one float to either side."""
    levels = sorted(Format(kind).levels)
    pivots = torch.tensor([(a + b) / 2 for a, b in pairwise(levels)])
    pivots = torch.cat(
        [pivots, torch.nextafter(pivots, torch.tensor(9.0)), torch.nextafter(pivots, torch.tensor(-9.0))]
    )
    weight = torch.zeros(ROWS, COLS)
    for group in range(ROWS * COLS // 64):
        block = weight.view(-1)[group * 64 : group * 64 + 64]
        block[: len(pivots)] = pivots
        block[63] = 1.0 if group % 2 else -1.0
        block *= 2.0 ** (group % 40 - 20)
    return weight


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    gaussian = torch.randn(ROWS, COLS, generator=generator)
    spiky = gaussian * (1 + 20 * (torch.rand(ROWS, COLS, generator=generator) > 0.99))
    sparse = gaussian * (torch.rand(ROWS, COLS, generator=generator) > 0.9)
    exponents = torch.randint(-120, 120, (ROWS, COLS // 64), generator=generator).repeat_interleave(64, dim=1)
    return {
        "gaussian": gaussian,
        "weights": gaussian * 0.02,
        "uniform": torch.rand(ROWS, COLS, generator=generator) - 0.5,
        "spiky": spiky,
        "sparse": sparse,
        "every magnitude": gaussian * 2.0**exponents,
        "denormal": gaussian * 1e-39,
        "smallest": torch.full((ROWS, COLS), 1e-45),
        "huge": (gaussian / gaussian.abs().max()) * 3.4e38,
        "constant": torch.linspace(-2, 2, ROWS)[:, None].expand(ROWS, COLS).contiguous(),
        "zeros": torch.zeros(ROWS, COLS),
        "minus zeros": -torch.zeros(ROWS, COLS),
        "one": torch.nn.functional.one_hot(torch.arange(ROWS) * 7, COLS).float(),
        "nf4 thresholds": on_thresholds("nf4"),
        "fp4 thresholds": on_thresholds("fp4"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", inputs())
def test_nf4_has_the_same_bytes(bnb: Any, case: str, dtype: torch.dtype) -> None:
    weight = inputs()[case].to(dtype)
    if not weight.isfinite().all():
        pytest.skip(f"beyond {dtype}")
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = ops.quantize(weight, "nf4-nodq")
    assert bytes_of(absmax) == bytes_of(state.absmax.float())
    assert bytes_of(ours) == bytes_of(codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", inputs())
def test_fp4_has_the_same_values(bnb: Any, case: str, dtype: torch.dtype) -> None:
    weight = inputs()[case].to(dtype)
    if not weight.isfinite().all():
        pytest.skip(f"beyond {dtype}")
    codes, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="fp4")
    theirs = bnb.dequantize_4bit(codes, state)
    ours = ops.dequantize(ops.quantize(weight, "fp4-nodq"), "fp4-nodq", (ROWS, COLS))
    off = (ours - theirs).abs() > 1e-6 * theirs.abs()
    assert not off.any(), (
        f"{int(off.sum())} values differ, first {weight[off][0]}: {ours[off][0]} and {theirs[off][0]}"
    )


def test_nf4_scales_over_a_million_blocks(bnb: Any) -> None:
    """Dequantized absmax of 16 matrices: within 1e-6 relative, but for at most 0.01 % that are one level off.

    bitsandbytes takes the offset from a float32 mean, which changes with its threads. Where a row is so much
    smaller than the rest that level * absmax and the offset nearly cancel, that difference is more than 1e-6
    of what is left; so the rows' spreads here stay within a factor of six. What holds always is that the
    difference is below 1e-6 of the offset.
    """
    blocks = apart = levels_apart = 0
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        spread = torch.rand(1024, 1, generator=generator) + 0.2
        weight = torch.randn(1024, 4096, generator=generator) * spread * 10.0 ** (seed % 5 - 3)
        _, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        packed = ops.quantize(weight, "nf4")
        ours = ops.double_dequantize(*packed[1:]).view(-1)
        off = (ours - theirs).abs()
        steps = packed[1].view(torch.uint8).view(-1).int() - state.absmax.view(-1).int()
        assert steps.abs().max() <= 1
        assert (off[steps == 0] <= 1e-6 * state.offset).all()
        blocks += ours.numel()
        levels_apart += int((steps != 0).sum())
        apart += int((off > 1e-6 * theirs.abs()).sum())
    assert blocks == 2**20
    assert apart <= blocks * 1e-4, f"{apart} of {blocks} scales differ, {levels_apart} by a level"
