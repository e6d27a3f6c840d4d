"""Every kind of format on one Gaussian matrix: bits per weight with all metadata, and the relative error.

python benchmarks/formats_table.py                      # 1024 x 4096
python benchmarks/formats_table.py nf4 int4-g128-dq     # formats of your own choice
"""

from __future__ import annotations

from typing import Any

import torch
from harness import arguments, environment, environment_line, print_table, write_json, write_picture

from bitfold import Format, ops

FORMATS = [
    *("int8-row", "int8-g64"),
    *(
        "nf4",
        "nf4-nodq",
        "fp4",
        "log4",
        "int4-g64",
        "int4-g128",
        "int4-g64-sym",
        "int4-g64-dq",
        "kmeans4-row",
    ),
    *("nf3", "int3-g64", "kmeans3-row"),
    *("nf2", "int2-g64", "int2-row", "kmeans2-row"),
]


def measure(names: list[str], shape: tuple[int, int]) -> list[dict[str, Any]]:
    """One record per format; the bytes are those of the tensors, and must be what the format says."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = []
    for name in names:
        fmt = Format(name)
        packed = ops.quantize(weight, fmt)
        bits = 8 * sum(t.numel() * t.itemsize for t in packed) / weight.numel()
        if bits != fmt.bits_per_weight(shape):
            raise SystemExit(
                f"{name}: {bits} bits per weight are stored, {fmt.bits_per_weight(shape)} promised"
            )
        error = (ops.dequantize(packed, fmt, shape) - weight).norm() / weight.norm()
        rows.append(
            {"format": name, "bits_per_weight": bits, "ratio": 32 / bits, "relative_error": error.item()}
        )
    return rows


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    for i, row in enumerate(rows):
        style = {"color": f"C{i // 2 % 10}", "alpha": 0.8, "label": row["format"]}
        axes.plot(row["bits_per_weight"], row["relative_error"], "os^Dv"[i % 5], **style)
    axes.set(xscale="log", yscale="log", xlabel="bits per weight, all counted", ylabel="relative error")
    axes.set_xticks([2, 3, 4, 5, 6, 8], ["2", "3", "4", "5", "6", "8"])
    axes.minorticks_off()
    axes.set_title("Gaussian weights", loc="left")
    figure.legend(loc="outside right center", frameon=False, fontsize=9)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print, write."""
    parser = arguments("Bits per weight and error of the formats on Gaussian weights.")
    parser.add_argument("formats", nargs="*", default=FORMATS)
    args = parser.parse_args(argv)
    shape = (16, 256) if args.smoke else (1024, 4096)
    rows = measure(args.formats, shape)
    env = environment()
    table = [
        [r["format"], f"{r['bits_per_weight']:.3f}", f"{r['ratio']:.2f}x", f"{r['relative_error']:.4f}"]
        for r in rows
    ]
    print_table(
        f"Gaussian [{shape[0]}, {shape[1]}]", ["", "bits/weight", "fp32 / stored", "relative error"], table
    )
    print(environment_line(env))
    write_json(args.out, "formats_table", {"environment": env, "shape": shape, "rows": rows})
    if not args.no_picture:
        write_picture(args.out, "formats_table", lambda figure: draw(figure, rows), (8, 4.2))
    return rows


if __name__ == "__main__":
    main()
