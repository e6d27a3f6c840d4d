"""Speed on a GPU: products, folding, unfolding, GPTQ, Hessians, beside other libraries, floors and goals.

    python benchmarks/gpu.py [--smoke] [--minutes 6]

All but solvers is timed inside CUDA graphs, weights cold (rotating copies hold three times the L2 cache), as
the median of replays. Floors come from a copy and a bf16 product of the same run. What cannot be done here
is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_peers import PEERS
from harness import RESULTS, Smoke

from bitfold import Format, ops

SHAPES = [(4096, 4096), (8192, 8192), (28672, 8192), (14336, 4096), (4096, 14336)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
LINEAR_FORMATS = ["nf4", "int4-g64", "int4-g128", "int8-row", "int3-g64", "int2-g64"]
FOLDS = [
    ("nf4-nodq", torch.bfloat16, "round"),
    ("nf4", torch.bfloat16, "round"),
    ("nf4-nodq", torch.float32, "round"),
    ("int8-row", torch.bfloat16, "round"),
    ("int4-g64", torch.bfloat16, "round"),
    ("int4-g64", torch.bfloat16, "search"),
]
UNFOLDS = ["nf4", "nf4-nodq", "int4-g64", "int8-row", "int3-g64", "int2-g64"]
# Microseconds on an H200 that were set as goals: (job, format, shape, m or None) -> at most.
GOALS = {
    **{("linear", f, (8192, 8192), 1): 13.0 for f in ("nf4", "int4-g64", "int4-g128")},
    **{("linear", f, (8192, 8192), 16): 14.5 for f in ("nf4", "int4-g64", "int4-g128")},
    **{("linear", f, (28672, 8192), 1): 34.0 for f in ("nf4", "int4-g64", "int4-g128")},
    **{("linear", f, (4096, 4096), 1): 5.0 for f in ("nf4", "int4-g64", "int4-g128")},
    ("unfold", "nf4", (8192, 8192), None): 46.0,
    ("fold", "nf4-nodq bfloat16 round", (4096, 4096), None): 12.5,
    ("gptq", "int4-g128", (4096, 4096), None): 10_000.0,
    # Five eighths of the product of 16384 tokens by 4096, at 52 TFLOP/s; TF32: the 22 ms of 262144 tokens.
    ("hessian", "fp32", (16384, 4096), None): 6_600.0,
    ("hessian", "tf32", (16384, 4096), None): 1_400.0,
}


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copies_of(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    nbytes = sum(t.numel() * t.itemsize for t in tensors)
    return [[t.clone() for t in tensors] for _ in range(max(2, -(-3 * l2_bytes() // nbytes)))]


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> dict[str, float]:
    """Of one call: all of them stand one after the other in a graph, which is replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
        calls[-1]()
    torch.cuda.synchronize()
    times = max(1, 16 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    taken = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(1000.0 * start.elapsed_time(end) / (times * len(calls)))
    taken.sort()
    return {"us": statistics.median(taken), "best_us": taken[0], "p90_us": taken[int(0.9 * (len(taken) - 1))]}


def floors(smoke: bool) -> dict[str, float]:
    """What this GPU moves and multiplies."""
    n = 2**24 if smoke else 2**30
    a, b = torch.empty(n, dtype=torch.int8, device="cuda"), torch.empty(n, dtype=torch.int8, device="cuda")
    copied = microseconds([lambda: b.copy_(a)])["us"]
    size = 1024 if smoke else 8192
    x, w = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    product = microseconds([lambda: torch.mm(x, w)])["us"]
    return {"copy_tb_s": 2 * n / copied / 1e6, "bf16_tflop_s": 2 * size**3 / product / 1e6}


class Run:
    """Records, and how long there is to make them."""

    def __init__(self, machine: dict[str, float], minutes: float) -> None:
        self.machine = machine
        self.end = time.monotonic() + 60.0 * minutes
        self.records: list[dict[str, Any]] = []

    def measure(
        self,
        job: str,
        case: str,
        shape: tuple[int, int],
        m: int | None,
        nbytes: int,
        make: Callable[[], Sequence[Callable[[], Any]]],
    ) -> None:
        """One row; `make` prepares the calls. nbytes: what must be read and written at least."""
        record = {"job": job, "case": case, "shape": list(shape), "m": m, "bytes": nbytes}
        if time.monotonic() > self.end:
            record["left_out"] = "no time left"
        else:
            try:
                record |= microseconds(make())
            except (RuntimeError, NotImplementedError, ImportError, AttributeError, ValueError) as error:
                record["left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]
        if "us" in record:
            floor = nbytes / self.machine["copy_tb_s"] / 1e6
            if job == "linear" and m is not None:
                floor = max(floor, 2 * m * shape[0] * shape[1] / self.machine["bf16_tflop_s"] / 1e6)
            record |= {"floor_us": floor, "of_floor": floor / record["us"]}
            goal = GOALS.get((job, case, shape, m))
            if goal is not None:
                record |= {"goal_us": goal, "met": record["us"] <= goal}
        self.records.append(record)


def nbytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def linear(run: Run, shapes: Sequence[tuple[int, int]], batches: Sequence[int]) -> None:
    for n, k in shapes:
        weight = 0.02 * torch.randn(n, k, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        folded = {}
        for name in LINEAR_FORMATS:
            packed = ops.quantize(weight, name, "round")
            folded[name] = (copies_of(packed), list(Format(name).spec((n, k))), nbytes_of(*packed))
        peers = {name: make(weight) for name, make in PEERS.items()}
        for m in batches:
            x = torch.randn(m, k, device="cuda").bfloat16()
            moved = 2 * m * (n + k)
            for name, (copies, spec, nbytes) in folded.items():
                run.measure(
                    "linear",
                    name,
                    (n, k),
                    m,
                    nbytes + moved,
                    lambda c=copies, s=spec, x=x: [
                        lambda p=p: torch.ops.bitfold.linear_nograd(x, p, s, None, 0) for p in c
                    ],
                )
            for name, peer in peers.items():
                run.measure(
                    "linear", name, (n, k), m, peer.nbytes + moved, lambda p=peer, x=x: p.calls(x, copies_of)
                )
        del folded, peers


def unfold(run: Run, shapes: Sequence[tuple[int, int]]) -> None:
    for shape in shapes:
        weight = torch.randn(shape, device="cuda")
        for name in UNFOLDS:
            packed = ops.quantize(weight, name, "round")
            spec = list(Format(name).spec(shape))
            moved = nbytes_of(*packed) + 2 * weight.numel()
            run.measure(
                "unfold",
                name,
                shape,
                None,
                moved,
                lambda p=packed, s=spec: [
                    lambda q=q: torch.ops.bitfold.dequantize(q, s, torch.bfloat16) for q in copies_of(p)
                ],
            )
        for name, make in PEERS.items():
            peer = make(weight)
            if peer.unfold is not None:
                moved = peer.nbytes + 2 * weight.numel()
                run.measure("unfold", name, shape, None, moved, lambda p=peer: p.unfold(copies_of))


def fold(run: Run, shapes: Sequence[tuple[int, int]]) -> None:
    for shape in shapes:
        for name, dtype, method in FOLDS:
            weight = torch.randn(shape, device="cuda").to(dtype)
            spec = list(Format(name).spec(shape))
            moved = nbytes_of(weight) + Format(name).nbytes(shape)
            case = f"{name} {str(dtype).removeprefix('torch.')} {method}"
            # The bare op: the wrapper also looks for NaN and waits for the answer.
            run.measure(
                "fold",
                case,
                shape,
                None,
                moved,
                lambda w=weight, s=spec, m=method: [
                    lambda v=v: torch.ops.bitfold.quantize(v[0], s, ops.METHODS[m]) for v in copies_of([w])
                ],
            )
        weight = torch.randn(shape, device="cuda").bfloat16()
        for name, make in PEERS.items():
            peer = make(weight)
            if peer.fold is not None:
                moved = nbytes_of(weight) + peer.nbytes
                run.measure("fold", name, shape, None, moved, lambda p=peer, w=weight: p.fold(copies_of([w])))


def by_clock(run: Run, job: str, case: str, shape: tuple[int, int], call: Callable[[], Any]) -> None:
    """One row of what cannot be had in a graph: it waits for the GPU on its way."""
    record: dict[str, Any] = {"job": job, "case": case, "shape": list(shape), "m": None}
    if time.monotonic() > run.end:
        record["left_out"] = "no time left"
    else:
        try:
            taken = []
            for _ in range(5):
                torch.cuda.synchronize()
                start = time.perf_counter()
                call()
                torch.cuda.synchronize()
                taken.append(1e6 * (time.perf_counter() - start))
            record |= {"us": statistics.median(taken[1:]), "best_us": min(taken)}
            goal = GOALS.get((job, case, shape, None))
            if goal is not None:
                record |= {"goal_us": goal, "met": record["us"] <= goal}
        except Exception as error:  # whatever it is, the other rows count
            record["left_out"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:160]
    run.records.append(record)


def gptq(run: Run, shapes: Sequence[tuple[int, int]]) -> None:
    """Whole solves with the Hessian given, and where their time goes."""
    from bitfold import solvers

    for shape in shapes:
        weight = torch.randn(shape, device="cuda")
        x = torch.randn(2 * shape[1], shape[1], device="cuda")
        hessian = x.t() @ x / len(x)
        by_clock(
            run,
            "gptq",
            "int4-g128",
            shape,
            lambda w=weight, h=hessian: solvers.gptq_quantize(w, "int4-g128", h),
        )
        if "us" in run.records[-1]:
            _, report = solvers.gptq_quantize(weight, "int4-g128", hessian, timed=True)
            run.records[-1]["parts_us"] = {
                name.removeprefix("seconds_"): 1e6 * seconds
                for name, seconds in report.items()
                if name.startswith("seconds_")
            }
        by_clock(
            run,
            "gptq",
            "int4-g128 swept, refitted",
            shape,
            lambda w=weight, h=hessian: solvers.gptq_quantize(w, "int4-g128", h, sweeps=1, refit=1),
        )


def hessians(run: Run, tokens: int, sizes: Sequence[int]) -> None:
    from bitfold import solvers

    for n in sizes:
        x, mean = torch.randn(tokens, n, device="cuda"), torch.zeros(n, n, device="cuda")

        def with_tf32(x: torch.Tensor = x, mean: torch.Tensor = mean) -> None:
            torch.set_float32_matmul_precision("high")
            try:
                solvers.hessian_update(mean, x, tokens=1)
            finally:
                torch.set_float32_matmul_precision("highest")

        for case, rows in (("fp32", x), ("bf16 x, fp32", x.bfloat16())):
            by_clock(
                run,
                "hessian",
                case,
                (tokens, n),
                lambda x=rows, mean=mean: solvers.hessian_update(mean, x, tokens=1),
            )
        by_clock(run, "hessian", "tf32", (tokens, n), with_tf32)


def print_records(records: Sequence[dict[str, Any]]) -> None:
    print(f"{'job':8}{'case':28}{'shape':>14}{'M':>6}{'us':>11}{'floor':>9}{'of floor':>9}{'goal':>9}")
    for r in records:
        head = f"{r['job']:8}{r['case']:28}{r['shape'][0]:>7}x{r['shape'][1]:<6}{r['m'] or '':>6}"
        if "left_out" in r:
            print(f"{head}   {r['left_out']}")
            continue
        goal = f"{r['goal_us']:>9.1f} {'met' if r['met'] else 'MISSED'}" if "goal_us" in r else ""
        floor = f"{r['floor_us']:>9.2f}{r['of_floor']:>9.2f}" if "floor_us" in r else " " * 18
        print(f"{head}{r['us']:>11.2f}{floor}{goal}")
        if "parts_us" in r:
            print("        of which " + ", ".join(f"{k} {v:.0f}" for k, v in r["parts_us"].items()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action=Smoke, help="tiny shapes, seconds")
    parser.add_argument("--minutes", type=float, default=6.0, help="rows that begin later are left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bitfold: torch sees no GPU; nothing is measured")
        return
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    machine = floors(options.smoke)
    run = Run(machine, options.minutes)
    small = [(256, 512)]
    # What is quick and what has goals comes first: a clock may run out.
    unfold(run, small if options.smoke else [(4096, 4096), (8192, 8192)])
    fold(run, small if options.smoke else [(4096, 4096), (8192, 8192)])
    gptq(run, small if options.smoke else [(4096, 4096), (14336, 4096), (4096, 14336)])
    hessians(run, 512 if options.smoke else 16384, [256] if options.smoke else [4096])
    linear(run, small if options.smoke else SHAPES, [1, 16] if options.smoke else BATCHES)
    environment = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **machine,
    }
    print_records(run.records)
    print(
        f"bitfold on {properties.name}: copies {machine['copy_tb_s']:.2f} TB/s (read and written), "
        f"bf16 products {machine['bf16_tflop_s']:.0f} TFLOP/s; torch {torch.__version__}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "records": run.records}
    (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
