"""One layer on the CPU: `ops.linear` per format, dtype and accuracy level, against what else is installed.

Weights are cold: each call takes the next of several copies that together are four times the last-level
cache, as in a model whose layers follow one another. All cases of one M take turns, and with them a loop that
does nothing but read: its speed is the bandwidth that fractions refer to. Every product is compared with
float64 over the weight that its bytes stand for; above the bound of its accuracy level nothing is timed.

    python benchmarks/linear_cpu.py                   # 4096 x 4096, two threads, all M: some minutes
    python benchmarks/linear_cpu.py --formats nf4 --rows 1 4 --levels auto --peers bnb
    python benchmarks/linear_cpu.py --shapes 4096x14336 384x1536 128256x2048 --rows 1 16
    python benchmarks/linear_cpu.py --threads 1 --cpu-time    # for a machine that is busy with other work
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import peers
import torch
from floors import Floors
from goals import linear_goals, overhead_goals, print_goals
from harness import (
    Timing,
    arguments,
    copies_of,
    environment,
    environment_line,
    interleaved,
    weight_of,
    write_json,
    write_picture,
)
from linear_report import draw, print_linear, print_markdown, print_overhead
from peers.base import Peer
from torch import nn

from bitfold import Format, ops
from bitfold.nn import QuantLinear
from bitfold.nn.layout import LAYOUTS, to_panels

FORMATS = ["nf4", "int4-g64", "int4-g128", "int8-row", "int3-g64", "int2-g64"]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 512]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEVELS = {"auto": 0, "fp32": 1, "int8": 2}  # the int argument of the op
KEPT = ("case", "kind", "format", "layout", "activations", "level", "nbytes")  # of a case, in each record
TURN = 0.009  # seconds; short calls are made in a row, see harness.interleaved


def bound(level: str, activations: str) -> float:
    """The documented bound of a level: relative RMS error, that of rounding the output included."""
    if level == "int8":
        return 2.5e-2
    if activations != "fp32":
        return 2e-3
    return {"auto": 2e-4, "fp32": 2e-5}[level]


def compute_rate(rates: dict[str, float], level: str) -> float | None:
    """Multiply-adds per second that the fastest fitting instruction allows; "exact" is a peer's "auto"."""
    kinds = {"fp32": ["fp32"], "int8": ["int8"]}.get(level, ["fp32", "int16", "bf16"])
    return max((rates[kind] for kind in kinds if kind in rates), default=None)


class Oracle:
    """Products in float64 with the weight that some bytes stand for, for some rows of x."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> None:
        """`rows`: the M that will be asked for; x [max(rows), k], weight [n, k]."""
        self.rows = sorted({0, *(m - 1 for m in rows), *range(0, len(x), max(1, len(x) // 8))})
        slabs = (weight[i : i + 4096] for i in range(0, len(weight), 4096))
        chosen = x[self.rows].double()
        self.exact = torch.cat([chosen @ slab.double().T for slab in slabs], 1)

    def error(self, y: torch.Tensor) -> float:
        """Relative RMS error of the first len(y) rows."""
        known = [(i, row) for i, row in enumerate(self.rows) if row < len(y)]
        exact = self.exact[[i for i, _ in known]]
        return ((y[[row for _, row in known]].double() - exact).norm() / exact.norm()).item()


def own_cases(
    weight: torch.Tensor, x: dict[str, torch.Tensor], args: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What `ops.linear` can do here, one case each; and the levels that this build does not have."""
    n, k = weight.shape
    cases, absent = [], {}
    for name in args.formats:
        fmt = Format(name)
        packed = ops.quantize(weight, fmt)
        decoded = ops.dequantize(packed, fmt, (n, k))
        oracles = {a: Oracle(x[a], decoded, args.rows) for a in args.activations}
        layouts = {"rows": packed}
        if fmt.suits_panels((n, k)):
            layouts["panels"] = [to_panels(packed[0], fmt, (n, k)), *packed[1:]]
        copies = {layout: copies_of(layouts[layout]) for layout in args.layouts if layout in layouts}
        common = {
            "kind": "bitfold",
            "format": name,
            "spec": fmt.spec((n, k)),
            "nbytes": sum(t.numel() * t.itemsize for t in packed),
        }
        for layout, activation, level in itertools.product(copies, args.activations, args.levels):
            title = name + (" in panels" if layout == "panels" else "") + f", {activation} x"
            title += "" if level == "auto" else f", level {level}"
            own = {"activations": activation, "level": level, "oracle": oracles[activation]}
            case = {"case": title, "layout": layout, "copies": copies[layout], **common, **own}
            try:
                own_call(case, x[activation][:1])(0)
            except RuntimeError as error:
                if level == "auto":
                    raise
                absent[f"level {level}"] = str(error).splitlines()[0]
            else:
                cases.append(case)
    return cases, absent


def own_call(case: dict[str, Any], x: torch.Tensor) -> Callable[[int], torch.Tensor]:
    copies, spec, level = case["copies"], case["spec"], LEVELS[case["level"]]
    return lambda i: ops.linear(x, copies[i % len(copies)], spec, None, level)


def peer_case(peer: Peer, x: dict[str, torch.Tensor], rows: list[int]) -> dict[str, Any]:
    activations = "bf16" if peer.dtype is torch.bfloat16 else "fp32"
    return {
        "case": peer.name,
        "kind": "dense" if peer.dense else "peer",
        "format": None,
        "layout": None,
        "activations": activations,
        "level": "int8" if peer.int8 else "exact",
        "nbytes": peer.nbytes,
        "oracle": Oracle(x[activations], peer.weight, rows),
        "bind": peer.bind,
    }


def time_shape(n: int, k: int, args: Any, floors: Floors, clock: Callable[[], float]) -> dict[str, Any]:
    """All cases of a weight [n, k], one record per M and case."""
    weight = weight_of(n, k)
    everything = torch.randn(max(args.rows), k, generator=torch.Generator().manual_seed(2))
    x = {name: everything.to(dtype) for name, dtype in DTYPES.items()}
    cases, missing = own_cases(weight, x, args)
    cases += [peer_case(p, x, args.rows) for p in peers.build(weight, args.threads, args.peers, missing)]
    records, reads = [], {}
    for m in args.rows:
        calls: dict[str, Callable[[int], Any]] = {**floors.read_cases()}
        errors = {}
        for case in cases:
            given = x[case["activations"]][:m].contiguous()
            call = case["bind"](given) if "bind" in case else own_call(case, given)
            errors[case["case"]] = error = case["oracle"].error(call(0))
            limit = bound(case["level"], case["activations"]) if case["kind"] == "bitfold" else math.inf
            if not error <= limit:  # or NaN
                title = f"{case['case']}, M = {m}"
                raise SystemExit(f"{title}: off by {error:.2e}, bound {limit:.0e}; nothing was timed")
            calls[case["case"]] = call
        timings = interleaved(calls, seconds=args.seconds, least=3, turn=TURN, clock=clock)
        reads[m] = floors.bandwidth(timings)
        floors.rates()
        for case in cases:
            record = {key: case[key] for key in KEPT}
            record |= {"shape": [n, k], "m": m, "error": errors[case["case"]]}
            record |= timings[case["case"]].to_dict()
            record["seconds"] = record[f"{args.stat}_s"]
            record["memory_floor_s"] = case["nbytes"] / reads[m][args.stat] / 1e9
            records.append(record)
        print(f"{n} x {k}, M = {m}: {len(cases)} cases, read {reads[m]['median']:.1f} GB/s", flush=True)
    rates = floors.rates()
    for record in records:
        rate = compute_rate(rates, record["level"])
        record["compute_floor_s"] = record["m"] * n * k / rate if rate else None
    return {
        "shape": [n, k],
        "read_GB_per_s": reads,
        "records": [compared(record, records) for record in records],
        "not_measured": missing,
    }


def compared(record: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Speed, and how many times faster than the others of the same M."""
    same = [r for r in records if r["m"] == record["m"]]
    packed = [r for r in same if r["kind"] != "bitfold"]
    exact = [r for r in packed if r["level"] == "exact"]
    dense = [r for r in same if r["kind"] == "dense" and r["activations"] == record["activations"]]

    def times_faster(than: list[dict[str, Any]]) -> float | None:
        return min(r["seconds"] for r in than) / record["seconds"] if than else None

    floor = max(record["memory_floor_s"], record["compute_floor_s"] or 0)
    return record | {
        "GB_per_s": record["nbytes"] / record["seconds"] / 1e9,
        "of_bandwidth": record["memory_floor_s"] / record["seconds"],
        "times_floor": record["seconds"] / floor,
        "faster_than_exact_peer": times_faster(exact),
        "faster_than_any_peer": times_faster(packed),
        "faster_than_dense": times_faster(dense),
    }


def time_overhead(seconds: float, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Seconds of one call of a 64 x 64 layer with bias, `nn.Linear` and folded, per gradient mode."""
    layers = {"nn.Linear": nn.Linear(64, 64)}
    layers["nf4"] = QuantLinear.from_float(layers["nn.Linear"], "nf4")
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "gradients": torch.enable_grad}
    calls = 50
    found: dict[str, dict[str, float]] = {}

    def run(layer: nn.Module, mode: Any, x: torch.Tensor) -> None:
        with mode():
            for _ in range(calls):
                layer(x)

    for mode, context in modes.items():
        x = torch.randn(1, 64, requires_grad=mode == "gradients")
        cases = {
            name: lambda _, layer=layer, c=context, x=x: run(layer, c, x) for name, layer in layers.items()
        }
        timings: dict[str, Timing] = interleaved(cases, seconds=seconds, clock=clock)
        found[mode] = {name: timing.median / calls for name, timing in timings.items()}
    return found


def shape_of(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = arguments("Packed linear layers on the CPU against peers.")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--activations", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="of codes in memory"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows M of the input")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=[(4096, 4096)],
        metavar="OUTxIN",
        help="such as 4096x14336",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(peers.LIBRARIES),
        choices=peers.LIBRARIES,
        help="none: bitfold alone",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.35, help="per case and M")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time of the thread, not of the wall; needs --threads 1"
    )
    parser.add_argument(
        "--stat",
        choices=["median", "best"],
        default="median",
        help="what ratios are made of: best calls tell more on a busy machine (default: %(default)s)",
    )
    parser.add_argument("--markdown", action="store_true", help="print the README's table too")
    parser.add_argument("--name", default="linear_cpu", help="of the files written (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread alone, give --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.smoke:
        args.formats, args.rows, args.shapes = args.formats[:2], args.rows[:3], [(96, 128)]
        args.seconds, args.peers = 0.02, ["torch_dense"]
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        env = environment() | {"peers": peers.versions()}
        floors = Floors(args.threads, 2**20 if args.smoke else 2**28, clock)
        with torch.inference_mode():
            shapes = []
            for shape in args.shapes:
                shapes.append(time_shape(*shape, args, floors, clock))
                gc.collect()
        rates = floors.rates()
        overhead = time_overhead(args.seconds, clock)
    finally:
        torch.set_num_threads(before)
    print(f"\ntimes of {'the thread' if args.cpu_time else 'the wall'}; ratios of {args.stat} calls")
    print(f"bandwidth: {floors.how}")
    print(
        "multiply-adds in registers: " + ", ".join(f"{k} {2 * v / 1e9:.0f} GFLOP/s" for k, v in rates.items())
    )
    for found in shapes:
        print_linear(found)
        if args.markdown:
            print_markdown(found)
    print_overhead(overhead)
    goals = [goal for found in shapes for goal in linear_goals(found["records"])] + overhead_goals(overhead)
    print_goals(goals)
    print(environment_line(env))
    result = {
        "environment": env,
        "cpu_time": args.cpu_time,
        "ratios_of": args.stat,
        "bandwidth_by": floors.how,
        "multiply_adds_per_s": rates,
        "shapes": shapes,
        "overhead_s": overhead,
        "goals": goals,
    }
    write_json(args.out, args.name, result)
    if not args.no_picture:
        threads = "1 thread, its CPU time" if args.cpu_time else f"{args.threads} threads"
        write_picture(args.out, args.name, lambda figure: draw(figure, shapes[0], threads), (13, 6))
    return result


if __name__ == "__main__":
    main()
