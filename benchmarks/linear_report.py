"""Tables and the picture of linear_cpu.py."""

from __future__ import annotations

from typing import Any

from harness import print_table

COLORS = ["#2b6cb0", "#2f855a", "#dd6b20", "#b83280", "#6b46c1", "#975a16", "#285e61", "#9b2c2c"]
HEAD = [
    "",
    "ms",
    "best",
    "GB/s",
    "of read",
    "x floor",
    "vs exact",
    "vs any",
    "vs dense",
    "error",
]
LEGEND = """\
ms: median; best: the best call; GB/s: of the weight's own bytes; of read: fraction of the read bandwidth
above; x floor: time over the larger of (bytes / bandwidth, multiply-adds / their rate in registers); vs:
times faster than the fastest peer that takes activations as they are, than any peer, than dense torch with
the same activations; error: relative RMS against float64 over the weight that the bytes stand for"""


def print_linear(found: dict[str, Any]) -> None:
    """One table per M."""
    n, k = found["shape"]
    rows = list(dict.fromkeys(r["m"] for r in found["records"]))
    for m in rows:
        read = found["read_GB_per_s"][m]
        speed = f"read {read['median']:.1f} GB/s (best {read['best']:.1f})"
        title = f"linear [{m}, {k}] x [{n}, {k}]^T, cold; {speed}"
        table = [_cells(r) for r in found["records"] if r["m"] == m]
        print_table(title, HEAD, table, LEGEND if m == rows[-1] else "")
    for name, reason in found["not_measured"].items():
        print(f"not measured: {name}: {reason}")


def _cells(r: dict[str, Any]) -> list[str]:
    def times(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f}"

    own = r["kind"] == "bitfold"
    return [
        r["case"],
        f"{1e3 * r['median_s']:.3f}",
        f"{1e3 * r['best_s']:.3f}",
        f"{r['GB_per_s']:.1f}",
        f"{r['of_bandwidth']:.2f}",
        f"{r['times_floor']:.2f}",
        times(r["faster_than_exact_peer"]) if own else "",
        times(r["faster_than_any_peer"]) if own else "",
        times(r["faster_than_dense"]),
        f"{r['error']:.1e}",
    ]


def print_overhead(overhead: dict[str, dict[str, float]]) -> None:
    rows = [
        [mode, f"{1e6 * t['nn.Linear']:.1f}", f"{1e6 * t['nf4']:.1f}", f"{t['nf4'] / t['nn.Linear']:.2f}"]
        for mode, t in overhead.items()
    ]
    print_table(
        "one call of a 64 x 64 layer at batch 1, microseconds", ["", "nn.Linear", "nf4", "ratio"], rows
    )


def draw(figure: Any, found: dict[str, Any], threads: str) -> None:
    """Time against M, log-log, one half per dtype of x; grey: what the first format cannot reach."""
    records = found["records"]
    panels = [
        a for a in ("fp32", "bf16") if any(r["activations"] == a for r in records if r["kind"] == "bitfold")
    ]
    n, k = found["shape"]
    for axes, activations in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        own = [r for r in records if r["kind"] == "bitfold" and r["activations"] == activations]
        others = [r for r in records if r["kind"] != "bitfold" and r["activations"] == activations]
        _lines(axes, [r for r in own if r["level"] == "auto"], "-", 2.0)
        _lines(axes, [r for r in own if r["level"] == "int8" and r["format"] == "nf4"], "-.", 2.0)
        _lines(axes, others, "--", 1.2)
        _floors(axes, own)
        axes.set(xscale="log", yscale="log", xlabel="M, rows of x")
        rows = sorted({r["m"] for r in records})
        axes.set_xticks(rows, [str(m) for m in rows])
        axes.minorticks_off()
        axes.set_title(f"{n} x {k}, {activations} x, {threads}, cold weights", loc="left")
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylabel("milliseconds")


def _lines(axes: Any, records: list[dict[str, Any]], style: str, width: float) -> None:
    for i, case in enumerate(dict.fromkeys(r["case"] for r in records)):
        points = sorted((r["m"], 1e3 * r["seconds"]) for r in records if r["case"] == case)
        color = COLORS[i % len(COLORS)]
        axes.plot(*zip(*points, strict=True), style, marker=".", lw=width, color=color, label=case)


def _floors(axes: Any, own: list[dict[str, Any]]) -> None:
    """The larger of memory and compute floor of the first format, filled below."""
    first = sorted((r for r in own if r["case"] == own[0]["case"]), key=lambda r: r["m"])
    rows = [r["m"] for r in first]
    floor = [1e3 * max(r["memory_floor_s"], r["compute_floor_s"] or 0) for r in first]
    axes.fill_between(rows, floor, min(floor) / 2, color="#a0aec0", alpha=0.35, lw=0)
    axes.text(
        rows[0], 0.8 * floor[0], f"floors of {first[0]['format']}", fontsize=8, color="#4a5568", va="top"
    )
