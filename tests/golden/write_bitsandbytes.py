"""Writes bitsandbytes_4bit.npz: what bitsandbytes packs, for tests on machines that do not have it.

Run with bitsandbytes 0.50.2 and torch 2.13.0 on a CPU: python tests/golden/write_bitsandbytes.py
Later versions of bitfold must keep producing these bytes; the file is written once.
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional

ROWS, COLS = 2, 128


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(20240611)
    gaussian = torch.randn(ROWS, COLS, generator=generator) * 0.02
    constant = torch.linspace(-3, 3, ROWS)[:, None].expand(ROWS, COLS)
    return {
        "gaussian": gaussian,
        "float16": gaussian.half().float(),
        "bfloat16": gaussian.bfloat16().float(),
        "outliers": gaussian * (1 + 30 * (torch.rand(ROWS, COLS, generator=generator) > 0.98)),
        "huge": gaussian * 1e38,
        "denormal": gaussian * 1e-39,
        "constant": constant.contiguous(),
        "zeros": torch.zeros(ROWS, COLS),
    }


def main() -> None:
    arrays: dict[str, np.ndarray] = {"versions": np.array([bitsandbytes.__version__, torch.__version__])}
    for name, weight in inputs().items():
        arrays[f"{name}.weight"] = weight.numpy()
        for kind in ("nf4", "fp4"):
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
            arrays[f"{name}.{kind}.absmax"] = state.absmax.numpy()
            if kind == "nf4":
                arrays[f"{name}.nf4.codes"] = codes.numpy().reshape(-1)
            else:
                arrays[f"{name}.fp4.value"] = functional.dequantize_4bit(codes, state).numpy()
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(7))
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    arrays["nested.scales"] = state.absmax.numpy()
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    arrays["nested.codes"] = state.absmax.numpy()
    arrays["nested.absmax"] = state.state2.absmax.numpy()
    arrays["nested.offset"] = state.offset.numpy()
    arrays["nested.map"] = state.state2.code.numpy()
    np.savez_compressed(Path(__file__).with_name("bitsandbytes_4bit.npz"), **arrays)


if __name__ == "__main__":
    main()
