"""Folding on the CPU: `quantize`, `dequantize` and `embedding` per format, against what else is installed.

The matrix is cold, as in `linear_cpu.py`, and all cases take turns. Two copies stand beside them: `copy_`
into memory that is there already, and `clone`, which like `quantize` and `dequantize` allocates its result.
Where the C library allows, memory once freed stays with the process: else the system would clear the pages of
every result of 64 MiB anew, which takes five times as long as a copy and is none of these functions' doing
(`--fresh-memory` shows it).

    python benchmarks/quantize_cpu.py                        # 4096 x 4096, two threads
    python benchmarks/quantize_cpu.py --formats nf4 --threads 1 --cpu-time
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import peers
import torch
from floors import Floors
from goals import folding_goals, print_goals
from harness import (
    arguments,
    copies_of,
    environment,
    environment_line,
    interleaved,
    print_table,
    weight_of,
    write_json,
    write_picture,
)
from torch.nn import functional

from bitfold import Format, ops

FORMATS = ["nf4", "nf4-nodq", "int8-row", "int4-g64", "int4-g64-sym", "int3-g64", "int2-g64", "kmeans4-row"]
TABLE_FORMATS = ["int8-g64", "nf4", "int4-g64"]  # of an embedding
LOOKUPS = 512
TURN = 0.009
Case = dict[str, Any]


def keep_freed_memory() -> bool:
    """Make glibc's malloc give nothing back to the system; False where it is another C library."""
    no_mmap, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(no_mmap, 0) and mallopt(trim_threshold, 2**31 - 1))


def case(kind: str, name: str, nbytes: dict[str, int], call: Callable[[int], Any]) -> Case:
    """`nbytes`: what a call reads and writes at least."""
    return {"kind": kind, "case": name, **nbytes, "call": call}


def folding_cases(n: int, k: int, formats: list[str], with_peers: bool) -> list[Case]:
    """quantize and dequantize of a weight [n, k], and copies of it."""
    weights = [w for (w,) in copies_of([weight_of(n, k)])]
    dense, to = weights[0].numel() * 4, torch.empty_like(weights[0])
    moved = {"read": dense, "written": dense}
    cases = [
        case("copy", "copy_ into place", moved, lambda i: to.copy_(weights[i % len(weights)])),
        case("copy", "clone", moved, lambda i: weights[i % len(weights)].clone()),
    ]
    for name in formats:
        fmt = Format(name)
        packed = copies_of(ops.quantize(weights[0], fmt))
        nbytes = sum(t.numel() * t.itemsize for t in packed[0])
        learned = name.startswith("kmeans")
        for method in [fmt.default_method] if learned else sorted({"round", fmt.default_method}):
            title = f"quantize {name}" + ("" if method == fmt.default_method else f", method {method}")
            call = lambda i, f=fmt, m=method: ops.quantize(weights[i % len(weights)], f, m)  # noqa: E731
            cases.append(case("quantize", title, {"read": dense, "written": nbytes}, call))
        for dtype in (torch.float32, torch.bfloat16):
            title = f"dequantize {name}" + ("" if dtype is torch.float32 else " to bf16")
            call = lambda i, f=fmt, c=packed, d=dtype: ops.dequantize(c[i % len(c)], f, (n, k), d)  # noqa: E731
            cases.append(case("dequantize", title, {"read": nbytes, "written": n * k * dtype.itemsize}, call))
    return cases + (bitsandbytes_cases(weights) if with_peers else [])


def bitsandbytes_cases(weights: list[torch.Tensor]) -> list[Case]:
    """Its nf4 with double quantization, out and back."""
    import peers.bnb  # noqa: F401  (sets what must be set before the import below)
    from bitsandbytes import functional as bnb

    dense = weights[0].numel() * 4
    options = {"quant_type": "nf4", "blocksize": 64}
    packed, state = bnb.quantize_4bit(weights[0], compress_statistics=True, **options)
    copies = [packed for (packed,) in copies_of([packed])]
    nbytes = packed.numel() + dense // 4 // 64

    def quantize(i: int) -> Any:
        return bnb.quantize_4bit(weights[i % len(weights)], compress_statistics=True, **options)

    def dequantize(i: int) -> Any:
        return bnb.dequantize_4bit(copies[i % len(copies)], state)

    return [
        case("quantize", "bitsandbytes quantize nf4", {"read": dense, "written": nbytes}, quantize),
        case("dequantize", "bitsandbytes dequantize nf4", {"read": nbytes, "written": dense}, dequantize),
    ]


def embedding_cases(rows: int, dim: int, lookups: int) -> list[Case]:
    """Lookups of random rows of a table [rows, dim]; bytes are those of the rows asked for."""
    table = weight_of(rows, dim)
    generator = torch.Generator().manual_seed(3)
    indices = [torch.randint(rows, (lookups,), generator=generator) for _ in range(64)]
    written = lookups * dim * 4

    def dense(i: int) -> torch.Tensor:
        return functional.embedding(indices[i % 64], table)

    cases = [case("embedding", "torch embedding fp32", {"read": written, "written": written}, dense)]
    for name in TABLE_FORMATS:
        fmt = Format(name)
        packed = ops.quantize(table, fmt, "round")
        stored = sum(t.numel() * t.itemsize for t in packed)
        spec = fmt.spec((rows, dim))

        def look_up(i: int, packed: Any = packed, spec: Any = spec) -> torch.Tensor:
            return ops.embedding(indices[i % 64], packed, spec, torch.float32)

        touched = {"read": stored * lookups // rows, "written": written}
        cases.append(case("embedding", f"embedding {name}", touched, look_up))
    return cases


def measure(cases: list[Case], floors: Floors, args: Any, clock: Callable[[], float]) -> list[Case]:
    """One record per case, and the read loops first."""
    nbytes = {"read": floors.read_bytes, "written": 0}
    everything = [case("read", name, nbytes, call) for name, call in floors.read_cases().items()] + cases
    timings = interleaved(
        {c["case"]: c["call"] for c in everything}, seconds=args.seconds, least=3, turn=TURN, clock=clock
    )
    records = []
    for c in everything:
        timing = timings[c["case"]].to_dict()
        seconds = timing[f"{args.stat}_s"]
        # Of the dense side, as everybody counts it; and of all bytes that must be moved.
        dense = c["written"] if c["kind"] == "dequantize" else c["read"]
        speeds = {
            "GB_per_s": dense / seconds / 1e9,
            "GB_per_s_moved": (c["read"] + c["written"]) / seconds / 1e9,
        }
        records.append({k: v for k, v in c.items() if k != "call"} | timing | speeds)
    return records


def goals_of(records: list[Case]) -> list[dict[str, Any]]:
    """`quantize` in GB/s of fp32; `dequantize` by all bytes moved against those of a clone."""
    by_name = {r["case"]: r for r in records}
    speeds = {
        r["case"]: r["GB_per_s" if r["kind"] == "quantize" else "GB_per_s_moved"]
        for r in records
        if r["kind"] in ("quantize", "dequantize")
        and "," not in r["case"]
        and "bitsandbytes" not in r["case"]
    }
    return folding_goals(speeds, by_name["copy_ into place"]["GB_per_s"], by_name["clone"]["GB_per_s_moved"])


def print_records(title: str, records: list[Case]) -> None:
    head = ["", "ms", "best", "GB/s of dense", "GB/s moved"]
    rows = [
        [
            r["case"],
            f"{1e3 * r['median_s']:.3f}",
            f"{1e3 * r['best_s']:.3f}",
            f"{r['GB_per_s']:.2f}",
            f"{r['GB_per_s_moved']:.2f}",
        ]
        for r in records
    ]
    print_table(title, head, rows)


def draw(figure: Any, records: list[Case], title: str) -> None:
    """Bars of GB/s moved, one panel per kind, the copies dashed."""
    copies = {r["case"]: r["GB_per_s_moved"] for r in records if r["kind"] == "copy"}
    kinds = ["quantize", "dequantize"]
    for axes, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        shown = [r for r in records if r["kind"] == kind]
        colors = ["#dd6b20" if "bitsandbytes" in r["case"] else "#2b6cb0" for r in shown]
        axes.barh(
            [r["case"].replace(f"{kind} ", "") for r in shown],
            [r["GB_per_s_moved"] for r in shown],
            color=colors,
        )
        for (name, speed), style in zip(copies.items(), ["-", "--"], strict=True):
            axes.axvline(speed, color="#4a5568", lw=1, ls=style, label=f"torch {name}")
        axes.invert_yaxis()
        axes.set_xlabel("GB/s read and written")
        axes.set_title(f"{kind}, {title}", loc="left", fontsize=9)
        axes.legend(frameon=False, fontsize=8)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = arguments("Speed of folding on the CPU.")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--table", nargs=2, type=int, default=[128256, 2048], metavar=("ROWS", "DIM"))
    parser.add_argument("--no-peers", action="store_true", help="bitfold and torch alone")
    parser.add_argument(
        "--fresh-memory", action="store_true", help="let the system clear the pages of every result"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the thread, not of the wall; needs --threads 1"
    )
    parser.add_argument(
        "--stat", choices=["median", "best"], default="median", help="what speeds are made of"
    )
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread alone, give --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.smoke:
        args.formats, args.shape, args.table, args.seconds = args.formats[:2], [96, 128], [100, 64], 0.02
    kept = not args.fresh_memory and keep_freed_memory()
    with_peers = not (args.no_peers or args.smoke) and find_spec("bitsandbytes") is not None
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        env = environment() | {"peers": peers.versions()}
        floors = Floors(args.threads, 2**20 if args.smoke else 2**28, clock)
        with torch.inference_mode():
            folding = measure(folding_cases(*args.shape, args.formats, with_peers), floors, args, clock)
            lookups = 8 if args.smoke else LOOKUPS
            embedding = measure(embedding_cases(*args.table, lookups), floors, args, clock)
    finally:
        torch.set_num_threads(before)
    memory = "kept" if kept else "fresh"
    print(f"times of {'the thread' if args.cpu_time else 'the wall'}; {args.stat} calls; memory {memory}")
    print_records(f"folding [{args.shape[0]}, {args.shape[1]}]", folding)
    print_records(f"{lookups} random rows of a table [{args.table[0]}, {args.table[1]}]", embedding)
    if not with_peers:
        print("not measured: bitsandbytes: not installed or not asked for")
    goals = goals_of(folding)
    print_goals(goals)
    print(environment_line(env))
    result = {
        "environment": env,
        "cpu_time": args.cpu_time,
        "memory": memory,
        "shape": args.shape,
        "table": args.table,
        "folding": folding,
        "embedding": embedding,
        "goals": goals,
    }
    write_json(args.out, "quantize_cpu", result)
    if not args.no_picture:
        threads = "1 thread, its CPU time" if args.cpu_time else f"{args.threads} threads"
        title = f"{args.shape[0]} x {args.shape[1]}, {threads}"
        write_picture(args.out, "quantize_cpu", lambda figure: draw(figure, folding, title), (12, 5))
    return result


if __name__ == "__main__":
    main()
