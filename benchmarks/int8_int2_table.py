"""Seven `Linear(1.5 d, d)` with bias in fp16, folded to 8 and to 2 bits: size, ratio, cosine of the weights.

The field's table, for d = 32, 128, 512 (10,976 / 172,928 / 2,756,096 parameters, Gaussian weights):
int8 1.41/1.90/1.98x at cosine 1.0000, 2-bit 2.39/5.75/8.12x at 0.9142/0.8713/0.8357. Here both sides are
safetensors files of the same model, header and metadata included: the fp16 state dict, and what
`bitfold.save` writes. The last ratio has both sides as `torch.save` writes them. Two-bit codes and fp16
biases alone take 1/7.93 of the large fp16 model, so a ratio above 8 needs another way of counting.

    python benchmarks/int8_int2_table.py
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import arguments, environment, environment_line, print_table, write_json, write_picture
from safetensors.torch import save_file
from torch import nn

import bitfold

SIZES = {"small": 32, "medium": 128, "large": 512}
LAYERS = 7
REFERENCE = {  # size -> (ratio, cosine)
    "int8": {"small": (1.41, 1.0000), "medium": (1.90, 1.0000), "large": (1.98, 1.0000)},
    "2-bit": {"small": (2.39, 0.9142), "medium": (5.75, 0.8713), "large": (8.12, 0.8357)},
}
FORMATS = {
    "int8": ["int8-g64", "int8-row", "int8-tensor"],
    "2-bit": ["int2-g64", "int2-row", "kmeans2-row", "kmeans2-tensor", "int2-tensor"],
}


def build(d: int) -> nn.ModuleList:
    """Seven layers in fp16, weights and biases from N(0, 1), the same at every call."""
    generator = torch.Generator().manual_seed(d)
    layers = nn.ModuleList(nn.Linear(3 * d // 2, d, dtype=torch.float16) for _ in range(LAYERS))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two matrices as vectors, in float64."""
    return nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


def measure_one(size: str, fmt: str, folder: Path) -> dict[str, Any]:
    """One row: sizes of the files in bytes, mean cosine over the seven weights."""
    model = build(SIZES[size])
    folded = bitfold.quantize(copy.deepcopy(model), fmt, progress=False)
    cosines = [cosine(a.weight, b.dequantize()) for a, b in zip(model, folded, strict=True)]
    save_file(model.state_dict(), folder / "a.safetensors")
    bitfold.save(folded, folder / "b.safetensors")
    torch.save(model.state_dict(), folder / "a.pt")
    torch.save(folded.state_dict(), folder / "b.pt")
    tensors = sum(t.numel() * t.itemsize for t in folded.state_dict().values())
    row: dict[str, Any] = {
        "size": size,
        "format": fmt,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bits_per_weight": folded[0].format.bits_per_weight(folded[0].shape),
        "cosine": statistics.mean(cosines),
        "tensor_bytes": tensors,
    }
    for name, suffix in {"safetensors": "safetensors", "torch_save": "pt"}.items():
        before, after = (folder / f"{side}.{suffix}" for side in "ab")
        sizes = before.stat().st_size, after.stat().st_size
        row[name] = {"before": sizes[0], "after": sizes[1], "ratio": sizes[0] / sizes[1]}
    row["header_bytes"] = row["safetensors"]["after"] - tensors
    return row


def print_rows(rows: list[dict[str, Any]]) -> None:
    head = [
        "",
        "parameters",
        "bits/weight",
        "fp16 bytes",
        "bytes",
        "of it header",
        "ratio",
        "cosine",
        "beats",
        "torch.save",
    ]
    for family, formats in FORMATS.items():
        lines = []
        for size in SIZES:
            ratio, cos = REFERENCE[family][size]
            lines.append([f"{size}: the field's", "", "", "", "", "", f"{ratio:.2f}x", f"{cos:.4f}", "", ""])
            for row in rows:
                if row["size"] == size and row["format"] in formats:
                    file = row["safetensors"]
                    better = [
                        name
                        for name, won in (
                            ("ratio", file["ratio"] > ratio),
                            ("cosine", round(row["cosine"], 4) > cos),
                        )
                        if won
                    ]
                    sizes = [f"{file['before']:,}", f"{file['after']:,}", f"{row['header_bytes']:,}"]
                    lines.append(
                        [
                            f"{size}: {row['format']}",
                            f"{row['parameters']:,}",
                            f"{row['bits_per_weight']:.3f}",
                            *sizes,
                            f"{file['ratio']:.2f}x",
                            f"{row['cosine']:.5f}",
                            " ".join(better),
                            f"{row['torch_save']['ratio']:.2f}x",
                        ]
                    )
        print_table(f"Seven Linear(1.5 d, d), {family}, safetensors against safetensors", head, lines)


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Left: ratio of the files; right: cosine of the 2-bit weights. Grey is the field's table."""
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    found = {(row["size"], row["format"]): row for row in rows}
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    bars: list[tuple[str, str, list[float]]] = []
    for family, fmt, grey, color in [
        ("int8", "int8-row", "#cbd5e0", "#2b6cb0"),
        ("2-bit", "int2-row", "#a0aec0", "#dd6b20"),
    ]:
        bars.append((f"the field's {family}", grey, [REFERENCE[family][size][0] for size in sizes]))
        bars.append((fmt, color, [found[size, fmt]["safetensors"]["ratio"] for size in sizes]))
    for j, (label, color, values) in enumerate(bars):
        drawn = left.bar(
            [i + (j - 1.5) * 0.21 for i in range(len(sizes))], values, 0.2, label=label, color=color
        )
        left.bar_label(drawn, fmt="%.2f", fontsize=8)
    left.set_ylabel("fp16 file / folded file")
    left.legend(frameon=False, fontsize=9)
    at = range(len(sizes))
    right.plot(
        at, [REFERENCE["2-bit"][size][1] for size in sizes], "o-", color="#a0aec0", label="the field's 2-bit"
    )
    for fmt, color in {"int2-row": "#dd6b20", "int2-g64": "#f6ad55", "kmeans2-row": "#b83280"}.items():
        right.plot(at, [found[size, fmt]["cosine"] for size in sizes], "o-", color=color, label=fmt)
    right.set_ylabel("cosine of the weights")
    right.set_ylim(0.8, 1)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xticks(range(len(sizes)), [f"{size}, d = {SIZES[size]}" for size in sizes])
    left.set_title("Seven Linear(1.5 d, d) with bias: size", loc="left")
    right.set_title("2 bits: fidelity", loc="left")


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write."""
    args = arguments("Seven Linear(1.5 d, d): 8 and 2 bits against fp16.").parse_args(argv)
    sizes = ["small"] if args.smoke else list(SIZES)
    with tempfile.TemporaryDirectory(prefix="bitfold-table-") as folder:
        rows = [
            measure_one(size, fmt, Path(folder))
            for size in sizes
            for formats in FORMATS.values()
            for fmt in formats
        ]
    env = environment()
    print_rows(rows)
    print(environment_line(env))
    write_json(args.out, "int8_int2_table", {"environment": env, "reference": REFERENCE, "rows": rows})
    if not args.no_picture:
        write_picture(args.out, "int8_int2_table", lambda figure: draw(figure, rows), (10, 4.5))
    return rows


if __name__ == "__main__":
    main()
