"""BertForSequenceClassification in bert-base-chinese's shape: bytes before and after, metadata counted.

The table that the field prints: 390.16 MiB in fp32; the Linear part goes from 326.25 to 40.78 MiB (8.00x),
the whole model to 104.69 MiB (-73.17 %). It counts 4 bits per weight and no scales. Here the same rows stand
twice, codes alone and everything that is stored; then a model whose embeddings are folded too. Every "file"
is written and measured. The weights are random: bytes depend on the shape alone, nothing is downloaded.

    python benchmarks/bert_table.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import MiB, arguments, environment, environment_line, print_table, write_json, write_picture
from torch import nn

import bitfold
from bitfold.nn import PackedModule

REFERENCE = {"fp32_MiB": 390.16, "linear_fp32_MiB": 326.25, "linear_MiB": 40.78, "whole_MiB": 104.69}
COUNTED = {"codes": "codes only", "stored": "all stored"}
BOUND_MiB = 60  # for the file of a model whose embeddings are folded too
VARIANTS = {  # title -> arguments of bitfold.quantize
    "linears nf4-nodq, embeddings float": {"fmt": "nf4-nodq", "embeddings": None},
    "linears nf4, embeddings float": {"fmt": "nf4", "embeddings": None},
    "linears nf4, embeddings int8-g64": {"fmt": "nf4", "embeddings": "int8-g64"},
    "linears nf4, embeddings nf4": {"fmt": "nf4", "embeddings": "nf4"},
}


def build(smoke: bool) -> nn.Module:
    """The model, random weights; `smoke` makes it small."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(vocab_size=500 if smoke else 21128, num_labels=2, **(small if smoke else {}))
    return BertForSequenceClassification(config).eval()


def file_bytes(model: Any, folder: Path) -> int:
    """Bytes of the weights file that `save_pretrained` writes, header included."""
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that are saved, each once."""
    stored = {t.data_ptr(): t.numel() * t.itemsize for t in model.state_dict().values() if t.numel()}
    return sum(stored.values())


def measure(smoke: bool) -> dict[str, Any]:
    """All rows; sizes in bytes."""
    with tempfile.TemporaryDirectory(prefix="bitfold-bert-") as folder:
        model = build(smoke)
        linear = sum(m.weight.numel() * 4 for m in model.modules() if isinstance(m, nn.Linear))
        before = {
            "tensors": tensor_bytes(model),
            "linear": linear,
            "file": file_bytes(model, Path(folder) / "fp32"),
        }
        rows = []
        for i, (title, options) in enumerate(VARIANTS.items()):
            folded = build(smoke)
            bitfold.quantize(folded, options["fmt"], embeddings=options["embeddings"], progress=False)
            packed = [m for m in folded.modules() if isinstance(m, PackedModule)]
            linears = [m for m in packed if m.kind == "linear"]
            codes = sum(m.weight.numel() for m in packed)
            stored = sum(m.packed_nbytes() for m in packed)
            rows.append(
                {
                    "title": title,
                    **options,
                    "linear_codes": sum(m.weight.numel() for m in linears),
                    "linear_stored": sum(m.packed_nbytes() for m in linears),
                    "whole_codes": tensor_bytes(folded) - stored + codes,
                    "whole_stored": tensor_bytes(folded),
                    "file": file_bytes(folded, Path(folder) / str(i)),
                }
            )
    return {"before": before, "rows": rows}


def print_rows(result: dict[str, Any]) -> None:
    before = result["before"]
    whole = before["tensors"]

    def cells(row: dict[str, Any], counted: str) -> list[str]:
        linear, total = row[f"linear_{counted}"], row[f"whole_{counted}"]
        return [
            f"{row['fmt']:8}  {row['embeddings'] or 'float':8}  {COUNTED[counted]}",
            f"{linear / MiB:.2f}",
            f"{before['linear'] / linear:.2f}x",
            f"{total / MiB:.2f}",
            f"{100 * (total / whole - 1):+.2f} %",
            f"{row['file'] / MiB:.2f}" if counted == "stored" else "",
        ]

    plain = [f"{before['linear'] / MiB:.2f}", "", f"{whole / MiB:.2f}", "", f"{before['file'] / MiB:.2f}"]
    rows = [
        ["the field's, fp32", "326.25", "", "390.16", "", ""],
        ["the field's, 4 bits, codes only", "40.78", "8.00x", "104.69", "-73.17 %", ""],
        ["fp32 here (linear: classifier too)", *plain],
    ]
    rows += [cells(row, counted) for row in result["rows"] for counted in ("codes", "stored")]
    head = ["linears   embeddings counted", "linear MiB", "ratio", "tensors MiB", "change", "file MiB"]
    print_table("BertForSequenceClassification, bert-base-chinese's shape", head, rows)


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Stacked bars: linear part, its metadata, everything else."""
    before = result["before"]
    axes = figure.subplots()
    names = ["fp32", *(row["title"].replace(", ", "\n") for row in result["rows"])]
    codes = [before["linear"], *(row["linear_codes"] for row in result["rows"])]
    scales = [0, *(row["linear_stored"] - row["linear_codes"] for row in result["rows"])]
    rest = [
        before["tensors"] - before["linear"],
        *(r["whole_stored"] - r["linear_stored"] for r in result["rows"]),
    ]
    parts = {"linear weights": codes, "their scales": scales, "embeddings and the rest": rest}
    colors = ["#2b6cb0", "#dd6b20", "#a0aec0"]
    bottom = [0.0] * len(names)
    for (label, values), color in zip(parts.items(), colors, strict=True):
        sizes = [value / MiB for value in values]
        axes.barh(names, sizes, left=bottom, label=label, color=color)
        bottom = [b + s for b, s in zip(bottom, sizes, strict=True)]
    for i, total in enumerate(bottom):
        axes.text(total + 4, i, f"{total:.1f} MiB", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, bottom[0] * 1.14)
    axes.set_xlabel("MiB of tensors, scales included")
    axes.set_title("BertForSequenceClassification, bert-base-chinese's shape", loc="left")
    axes.legend(frameon=False, loc="lower right")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    args = arguments("Bytes of BertForSequenceClassification in bert-base-chinese's shape.").parse_args(argv)
    result = measure(args.smoke)
    env = environment()
    print_rows(result)
    file = next(row["file"] for row in result["rows"] if row["embeddings"] == "int8-g64")
    if not args.smoke:
        verdict = "kept" if file <= BOUND_MiB * MiB else "EXCEEDED"
        print(f"file with folded embeddings: {file / MiB:.2f} MiB, bound {BOUND_MiB} MiB: {verdict}")
    print(environment_line(env))
    write_json(args.out, "bert_table", {"environment": env, "reference": REFERENCE, **result})
    if not args.no_picture:
        write_picture(args.out, "bert_table", lambda figure: draw(figure, result), (9, 4))
    return result


if __name__ == "__main__":
    main()
