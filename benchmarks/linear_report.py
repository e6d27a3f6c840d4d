"""Tables and the picture of linear_cpu.py."""

from __future__ import annotations

from typing import Any

from harness import print_table

OWN = ["#1a365d", "#2b6cb0", "#3182ce", "#2f855a", "#319795", "#63b3ed", "#68d391"]
PANELS = ["#e53e3e"]
OTHERS = ["#a0aec0", "#dd6b20", "#b83280", "#975a16", "#4a5568", "#6b46c1", "#d69e2e"]
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


def print_markdown(found: dict[str, Any], rows: tuple[int, ...] = (1, 4, 16, 128, 512)) -> None:
    """The table of the README: milliseconds, one line per case; levels other than the default named."""
    known = {(r["case"], r["m"]): r for r in found["records"]}
    rows = tuple(m for m in rows if any(at == m for _, at in known))
    print("\n| ms | " + " | ".join(f"M = {m}" for m in rows) + " | own error |")
    print("|---" * (len(rows) + 2) + "|")
    for case in dict.fromkeys(name for name, _ in known):
        times = " | ".join(f"{1e3 * known[case, m]['seconds']:.3g}" for m in rows)
        worst = max(known[case, m]["error"] for m in rows)
        print(f"| {case} | {times} | {worst:.1e} |")


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
    own = [r for r in records if r["kind"] == "bitfold"]
    panels = [a for a in ("fp32", "bf16") if any(r["activations"] == a for r in own)]
    halves = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = sorted({r["m"] for r in records})
    for axes, activations in zip(halves, panels, strict=True):
        mine = [r for r in own if r["activations"] == activations]
        others = [r for r in records if r["kind"] != "bitfold" and r["activations"] == activations]
        rows_auto = [r for r in mine if r["layout"] == "rows" and r["level"] == "auto"]
        _lines(axes, rows_auto, OWN, ls="-", lw=2.2)
        nf4 = [r for r in mine if r["format"] == "nf4"]
        _lines(
            axes, [r for r in nf4 if (r["layout"], r["level"]) == ("panels", "auto")], PANELS, ls="-", lw=2.2
        )
        _lines(axes, [r for r in nf4 if (r["layout"], r["level"]) == ("rows", "int8")], OWN, ls="-.", lw=2.2)
        _lines(axes, others, OTHERS, ls="--", lw=1.1)
        _floors(axes, mine)
        axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="milliseconds")
        axes.set_xticks(rows, [str(m) for m in rows])
        axes.minorticks_off()
        n, k = found["shape"]
        axes.set_title(f"{n} x {k}, {activations} x, {threads}, cold weights", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)


def _lines(axes: Any, records: list[dict[str, Any]], colors: list[str], **style: Any) -> None:
    for i, case in enumerate(dict.fromkeys(r["case"] for r in records)):
        points = sorted((r["m"], 1e3 * r["seconds"]) for r in records if r["case"] == case)
        color = colors[i % len(colors)]
        axes.plot(*zip(*points, strict=True), marker=".", color=color, label=case, **style)


def _floors(axes: Any, own: list[dict[str, Any]]) -> None:
    """Memory and compute floor of the first format, filled below the larger."""
    first = sorted((r for r in own if r["case"] == own[0]["case"]), key=lambda r: r["m"])
    rows = [r["m"] for r in first]
    memory = [1e3 * r["memory_floor_s"] for r in first]
    compute = [1e3 * (r["compute_floor_s"] or 0) for r in first]
    larger = [max(pair) for pair in zip(memory, compute, strict=True)]
    axes.fill_between(rows, larger, min(larger) / 3, color="#a0aec0", alpha=0.35, lw=0)
    grey = {"color": "#4a5568", "fontsize": 8}
    axes.text(rows[0], 0.9 * larger[0], f"{first[0]['format']}: memory", va="top", **grey)
    if compute[-1] > memory[-1]:
        axes.text(rows[-1], 0.6 * larger[-1], "multiply-adds ", ha="right", va="top", **grey)
