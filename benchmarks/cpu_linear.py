"""One layer on the CPU: `ops.linear` per format against torch's dense fp32 and bf16; the speed of folding.

Weights are cold: each call takes the next of several copies that together are four times the last-level
cache, as in a model whose layers follow one another. All cases of one M are timed by turns. Each result is
compared with float64 over the dequantized weight before the clock starts.

    python benchmarks/cpu_linear.py                   # 4096 x 4096, two threads
    python benchmarks/cpu_linear.py --formats nf4 --rows 1 --threads 8
    python benchmarks/cpu_linear.py --threads 1 --cpu-time    # for a machine that is busy with other work
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import (
    Timing,
    arguments,
    cold_copies,
    environment,
    environment_line,
    interleaved,
    print_table,
    write_json,
    write_picture,
)
from torch.nn import functional

from bitfold import Format, ops

FORMATS = ["nf4", "nf4-nodq", "int8-row", "int4-g64", "int4-g64-sym", "int3-g64", "int2-g64", "kmeans4-row"]
ROWS = [1, 4, 16, 128, 512]
ERROR_BOUND = 2e-5  # relative, of fp32 accumulation against float64


def weight_of(n: int, k: int) -> torch.Tensor:
    """A weight [n, k] as a trained layer has it: Gaussian, 0.02."""
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02


def copies_of(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Enough copies to be cold at every turn."""
    nbytes = sum(t.numel() * t.itemsize for t in tensors)
    return [[t.clone() for t in tensors] for _ in range(cold_copies(nbytes))]


def check(x: torch.Tensor, packed: list[torch.Tensor], fmt: Format, shape: tuple[int, int]) -> float:
    """Relative error of the product against float64; raises above the bound."""
    exact = x.double() @ ops.dequantize(packed, fmt, shape).double().T
    error = ((ops.linear(x, packed, fmt.spec(shape)) - exact).norm() / exact.norm()).item()
    if error > ERROR_BOUND:
        raise SystemExit(
            f"{fmt}: the product is off by {error:.2e} relative, bound {ERROR_BOUND:.0e}; nothing was timed"
        )
    return error


def time_linear(
    n: int, k: int, formats: list[str], rows: list[int], seconds: float, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """One record per M and case."""
    weight = weight_of(n, k)
    packed = {name: copies_of(ops.quantize(weight, name)) for name in formats}
    spec = {name: Format(name).spec((n, k)) for name in formats}
    dense = {"fp32": copies_of([weight]), "bf16": copies_of([weight.bfloat16()])}
    records = []
    for m in rows:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
        half = x.bfloat16()
        cases = {
            "fp32": lambda i, x=x: functional.linear(x, dense["fp32"][i % len(dense["fp32"])][0]),
            "bf16": lambda i, x=half: functional.linear(x, dense["bf16"][i % len(dense["bf16"])][0]),
        }
        errors = {}
        for name in formats:
            errors[name] = check(x[:16], packed[name][0], Format(name), (n, k))
            cases[name] = lambda i, x=x, c=packed[name], s=spec[name]: ops.linear(x, c[i % len(c)], s)
        timings = interleaved(cases, seconds=seconds, clock=clock)
        for name, timing in timings.items():
            records.append(
                {
                    "m": m,
                    "case": name,
                    "error": errors.get(name),
                    **speeds(timing, timings["fp32"], 2 * m * n * k),
                }
            )
    return records


def speeds(timing: Timing, fp32: Timing, flops: int) -> dict[str, float]:
    return {
        **timing.to_dict(),
        "times_faster_than_fp32": fp32.median / timing.median,
        "gflops": flops / timing.median / 1e9,
    }


def time_folding(
    n: int, k: int, formats: list[str], seconds: float, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """GB/s of fp32 weight: `quantize` reads it, `dequantize` writes it."""
    weights = [w for (w,) in copies_of([weight_of(n, k)])]
    records = []
    for name in formats:
        fmt = Format(name)
        packed = copies_of(ops.quantize(weights[0], fmt))
        methods = (
            sorted({"round", fmt.default_method}) if not name.startswith("kmeans") else [fmt.default_method]
        )
        cases = {
            f"quantize {method}": lambda i, f=fmt, m=method: ops.quantize(weights[i % len(weights)], f, m)
            for method in methods
        }
        cases["dequantize"] = lambda i, f=fmt, c=packed: ops.dequantize(c[i % len(c)], f, (n, k))
        nbytes = n * k * 4
        for case, timing in interleaved(cases, seconds=seconds, least=3, clock=clock).items():
            speed = {"GB_per_s": nbytes / timing.median / 1e9, "GB_per_s_best": nbytes / timing.best / 1e9}
            default = case == f"quantize {fmt.default_method}"
            records.append({"format": name, "case": case, "default": default, **speed, **timing.to_dict()})
    return records


def print_linear(records: list[dict[str, Any]], n: int, k: int) -> None:
    """Two tables: medians with their spread, and the best calls, which a busy machine harms less."""
    rows = sorted({r["m"] for r in records})
    names = list(dict.fromkeys(r["case"] for r in records))
    found = {(r["case"], r["m"]): r for r in records}

    def median(r: dict[str, Any]) -> str:
        spread = 50 * (r["p90_s"] - r["p10_s"]) / r["median_s"]
        return f"{1e3 * r['median_s']:.3f} ±{spread:.0f}%  {r['times_faster_than_fp32']:5.2f}x"

    def best(r: dict[str, Any]) -> str:
        return f"{1e3 * r['best_s']:.3f}  {found['fp32', r['m']]['best_s'] / r['best_s']:5.2f}x"

    title = f"linear [M, {k}] x [{n}, {k}]^T, fp32 in and out, cold, ms and times faster than fp32"
    for what, cell in {"median": median, "best call": best}.items():
        table = [[name, *(cell(found[name, m]) for m in rows)] for name in names]
        print_table(f"{title}: {what}", ["", *(f"M = {m}" for m in rows)], table)


def print_folding(records: list[dict[str, Any]], n: int, k: int) -> None:
    table = [
        [
            f"{r['format']}: {r['case']}{' (default)' if r['default'] else ''}",
            f"{r['GB_per_s']:.2f}",
            f"{r['GB_per_s_best']:.2f}",
        ]
        for r in records
    ]
    print_table(f"folding [{n}, {k}]", ["GB/s of fp32", "median", "best call"], table)


def draw(figure: Any, records: list[dict[str, Any]], title: str) -> None:
    """Times faster than fp32, grouped by M."""
    axes = figure.subplots()
    rows = sorted({r["m"] for r in records})
    names = [n for n in dict.fromkeys(r["case"] for r in records) if n != "fp32"]
    width = 0.85 / len(names)
    colors = [
        "#a0aec0",
        "#1a365d",
        "#2b6cb0",
        "#2f855a",
        "#dd6b20",
        "#f6ad55",
        "#b83280",
        "#6b46c1",
        "#718096",
    ]
    for j, name in enumerate(names):
        values = [next(r for r in records if r["m"] == m and r["case"] == name) for m in rows]
        at = [i + (j - (len(names) - 1) / 2) * width for i in range(len(rows))]
        heights = [v["times_faster_than_fp32"] for v in values]
        axes.bar(at, heights, width, label=name, color=colors[j % len(colors)])
    axes.axhline(1, color="#4a5568", lw=1, ls="--")
    axes.set_xticks(range(len(rows)), [f"M = {m}" for m in rows])
    axes.set_ylabel("times faster than torch fp32")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=9, ncols=2)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = arguments("Packed linear layers and folding speed on the CPU.")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows M of the input")
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="per case and M")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the thread, not of the wall; needs --threads 1"
    )
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread alone, give --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.smoke:
        args.formats, args.rows, args.shape, args.seconds = args.formats[:2], args.rows[:2], [96, 128], 0.02
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        env = environment()
        with torch.inference_mode():
            linear = time_linear(*args.shape, args.formats, args.rows, args.seconds, clock)
            folding = time_folding(*args.shape, args.formats, args.seconds, clock)
    finally:
        torch.set_num_threads(before)
    print(f"times of {'the thread' if args.cpu_time else 'the wall'}")
    print_linear(linear, *args.shape)
    print_folding(folding, *args.shape)
    print(environment_line(env))
    result = {
        "environment": env,
        "cpu_time": args.cpu_time,
        "shape": args.shape,
        "linear": linear,
        "folding": folding,
    }
    write_json(args.out, "cpu_linear", result)
    if not args.no_picture:
        threads = "1 thread, its CPU time" if args.cpu_time else f"{args.threads} threads"
        title = f"{args.shape[0]} x {args.shape[1]}, {threads}, cold weights"
        write_picture(args.out, "cpu_linear", lambda figure: draw(figure, linear, title), (10, 4.5))
    return result


if __name__ == "__main__":
    main()
