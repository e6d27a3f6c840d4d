"""Speed on a GPU: products, folding, unfolding, GPTQ, Hessians, beside other libraries, floors and goals.

    python benchmarks/gpu.py [--smoke] [--minutes 6]

All but solvers and other libraries' folding is timed inside CUDA graphs, weights cold (rotating copies hold
three times the L2 cache), as the median of replays. Floors come from a copy and a bf16 product of the same
run. What cannot be done here is a row that says why. What has goals is measured first; the JSON is written
after each job.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_peers
import torch
from goals import Goal, goal, print_goals
from gpu_peers import PEERS, random
from harness import RESULTS, Smoke

from bitfold import Format, ops

Shape = tuple[int, int]
Job = Callable[[], None]
SHAPES = [(4096, 4096), (8192, 8192), (28672, 8192), (14336, 4096), (4096, 14336)]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
FOUR_BITS = ["nf4", "int4-g64", "int4-g128"]
LINEAR_FORMATS = [*FOUR_BITS, "int8-row", "int3-g64", "int2-g64"]
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
GOALS: dict[tuple[str, str, Shape, int | None], float] = {
    **{("linear", f, (8192, 8192), 1): 13.0 for f in FOUR_BITS},
    **{("linear", f, (8192, 8192), 16): 14.5 for f in FOUR_BITS},
    **{("linear", f, (28672, 8192), 1): 34.0 for f in FOUR_BITS},
    **{("linear", f, (4096, 4096), 1): 5.0 for f in FOUR_BITS},
    ("unfold", "nf4", (8192, 8192), None): 46.0,
    ("fold", "nf4-nodq bfloat16 round", (4096, 4096), None): 12.5,
    ("gptq", "int4-g128", (4096, 4096), None): 10_000.0,
    # Five eighths of the product of 16384 tokens by 4096, at 52 TFLOP/s; TF32: the 22 ms of 262144 tokens.
    ("hessian", "fp32", (16384, 4096), None): 6_600.0,
    ("hessian", "tf32", (16384, 4096), None): 1_400.0,
}
# How many times as fast as torch's bf16 product of the same run each of FOUR_BITS is: (shape, m) -> at least.
RATIOS: dict[tuple[Shape, int], float] = {
    ((8192, 8192), 1): 2.4,
    ((8192, 8192), 16): 2.4,
    ((28672, 8192), 1): 3.2,
    ((4096, 4096), 1): 2.0,
    **{(shape, 1024): 0.85 for shape in SHAPES[:3]},
    **{(shape, 4096): 0.95 for shape in SHAPES[:3]},
}
NO_TIME = "no time left"


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def copies_of(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    copies = max(2, -(-3 * l2_bytes() // nbytes_of(*tensors)))
    return [[t.clone() for t in tensors] for _ in range(copies)]


def nbytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def reason_of(error: BaseException) -> str:
    """What went wrong first: a graph that cannot be ended says less than what kept it from going on."""
    while error.__context__ is not None and error.__cause__ is None:
        error = error.__context__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]


def recorded(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """All calls, one after the other, in a graph."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
    finally:
        torch.cuda.set_stream(stream)  # where a capture fails, torch leaves its own behind
    if any("empty" in str(warning.message) for warning in said):
        msg = "nothing was recorded: it runs on a stream of its own"
        raise RuntimeError(msg)
    return graph


def spread(taken: Sequence[float]) -> dict[str, float]:
    ordered = sorted(taken)
    p90 = ordered[int(0.9 * (len(ordered) - 1))]
    return {"us": statistics.median(ordered), "best_us": ordered[0], "p90_us": p90}


def between_events(run: Callable[[], Any], calls: int) -> float:
    """Microseconds that the GPU takes for each of the calls that `run` makes."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000.0 * start.elapsed_time(end) / calls


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> dict[str, float]:
    """Of one call: all of them stand one after the other in a graph, which is replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
        calls[-1]()
    torch.cuda.synchronize()
    several = [call for _ in range(max(1, 16 // len(calls))) for call in calls]
    graph = recorded(several)
    graph.replay()
    return spread([between_events(graph.replay, len(several)) for _ in range(replays)])


def queued_microseconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> dict[str, float]:
    """Of one call that no graph records, since it goes to the default stream whatever the current one is.

    All are queued there behind a kernel that does nothing for milliseconds: the GPU never waits for the next.
    """
    several = [call for _ in range(max(1, 16 // len(calls))) for call in calls]

    def all_of_them() -> None:
        for call in several:
            call()

    all_of_them()
    taken = []
    for _ in range(replays):
        torch.cuda.synchronize()
        torch.cuda._sleep(8_000_000)  # cycles
        taken.append(between_events(all_of_them, len(several)))
    return spread(taken)


def clock_microseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Of what waits for the GPU on its way, so that it cannot be had in a graph."""
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - start))
    return {"us": statistics.median(taken[1:]), "best_us": min(taken)}


def floors(smoke: bool) -> dict[str, float]:
    """What this GPU moves and multiplies."""
    n = 2**24 if smoke else 2**30
    a, b = (torch.zeros(n, dtype=torch.int8, device=gpu_peers.DEVICE) for _ in range(2))
    copied = microseconds([lambda: b.copy_(a)])["us"]
    size = 1024 if smoke else 8192
    x, w = (random(size, size, seed=seed).bfloat16() for seed in range(2))
    product = microseconds([lambda: torch.mm(x, w)])["us"]
    return {"copy_tb_s": 2 * n / copied / 1e6, "bf16_tflop_s": 2 * size**3 / product / 1e6}


class Run:
    """Records, and how long there is to make them."""

    def __init__(self, machine: dict[str, float], minutes: float) -> None:
        self.machine = machine
        self.end = time.monotonic() + 60.0 * minutes
        self.records: list[dict[str, Any]] = []

    def has(self, job: str, case: str, shape: Shape, m: int | None) -> bool:
        key = job, case, list(shape), m
        return any((r["job"], r["case"], r["shape"], r["m"]) == key for r in self.records)

    def add(
        self, job: str, case: str, shape: Shape, m: int | None, measure: Callable[[], dict[str, float]]
    ) -> dict[str, Any]:
        """One row, or why it is none."""
        record: dict[str, Any] = {"job": job, "case": case, "shape": list(shape), "m": m}
        self.records.append(record)
        if time.monotonic() > self.end:
            record["left_out"] = NO_TIME
            return record
        try:
            record |= measure()
        except Exception as error:  # whatever it is, the other rows count
            record["left_out"] = reason_of(error)
            return record
        most = GOALS.get((job, case, shape, m))
        if most is not None:
            record |= {"goal_us": most, "met": record["us"] <= most}
        return record

    def measure(
        self,
        job: str,
        case: str,
        shape: Shape,
        m: int | None,
        nbytes: int,
        make: Callable[[], Sequence[Callable[[], Any]]],
        *,
        in_graph: bool = True,
    ) -> None:
        """One row; `make` prepares the calls. nbytes: what must be read and written at least."""
        take = microseconds if in_graph else queued_microseconds
        record = self.add(job, case, shape, m, lambda: take(make()))
        record["bytes"] = nbytes
        if "us" in record:
            floor = nbytes / self.machine["copy_tb_s"] / 1e6
            if job == "linear" and m is not None:
                floor = max(floor, 2 * m * shape[0] * shape[1] / self.machine["bf16_tflop_s"] / 1e6)
            record |= {"floor_us": floor, "of_floor": floor / record["us"]}

    def do(self, jobs: Sequence[tuple[str, Job]], save: Callable[[], None]) -> None:
        """Job after job; one that fails is a row, and the others are done."""
        for name, job in jobs:
            try:
                job()
            except Exception as error:
                left = {"job": name, "case": "all that was left", "shape": [0, 0], "m": None}
                self.records.append({**left, "left_out": reason_of(error)})
            save()


def linear(run: Run, shapes: Sequence[Shape], batches: Sequence[int], formats: Sequence[str]) -> None:
    """Rows that there are already are passed over."""
    for n, k in shapes:
        weight = 0.02 * random(n, k, seed=1)

        @functools.cache
        def folded(name: str, weight: torch.Tensor = weight) -> list[list[torch.Tensor]]:
            return copies_of(ops.quantize(weight, name, "round"))

        def own(x: torch.Tensor, name: str, shape: Shape = (n, k), folded: Any = folded) -> Any:
            spec = list(Format(name).spec(shape))
            linear_op = torch.ops.bitfold.linear_nograd
            return [lambda p=p: linear_op(x, p, spec, None, 0) for p in folded(name)]

        peers = {name: make(weight) for name, make in PEERS.items()}
        for m in batches:
            x = random(m, k).bfloat16()
            moved = 2 * m * (n + k)
            for name in formats:
                if not run.has("linear", name, (n, k), m):
                    nbytes = Format(name).nbytes((n, k)) + moved
                    run.measure("linear", name, (n, k), m, nbytes, functools.partial(own, x, name))
            for name, peer in peers.items():
                if not run.has("linear", name, (n, k), m):
                    calls = functools.partial(peer.calls, x, copies_of)
                    run.measure("linear", name, (n, k), m, peer.nbytes + moved, calls)
        folded.cache_clear()


def unfold(run: Run, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        weight = random(*shape)

        def own(name: str, weight: torch.Tensor = weight) -> Any:
            spec = list(Format(name).spec(tuple(weight.shape)))
            copies = copies_of(ops.quantize(weight, name, "round"))
            return [lambda p=p: torch.ops.bitfold.dequantize(p, spec, torch.bfloat16) for p in copies]

        for name in UNFOLDS:
            moved = Format(name).nbytes(shape) + 2 * weight.numel()
            run.measure("unfold", name, shape, None, moved, functools.partial(own, name))
        for name, make in PEERS.items():
            peer = make(weight)
            if peer.unfold is not None:
                calls = functools.partial(peer.unfold, copies_of)
                run.measure("unfold", name, shape, None, peer.nbytes + 2 * weight.numel(), calls)


def fold(run: Run, shapes: Sequence[Shape]) -> None:
    for shape in shapes:
        for name, dtype, method in FOLDS:
            weight = random(*shape).to(dtype)

            # The bare op: the wrapper also looks for NaN and waits for the answer.
            def own(name: str = name, method: str = method, weight: torch.Tensor = weight) -> Any:
                spec, number = list(Format(name).spec(tuple(weight.shape))), ops.METHODS[method]
                return [
                    lambda w=w: torch.ops.bitfold.quantize(w[0], spec, number) for w in copies_of([weight])
                ]

            moved = nbytes_of(weight) + Format(name).nbytes(shape)
            case = f"{name} {str(dtype).removeprefix('torch.')} {method}"
            run.measure("fold", case, shape, None, moved, own)
        weight = random(*shape).bfloat16()
        for name, make in PEERS.items():
            peer = make(weight)
            if peer.fold is not None:
                moved = nbytes_of(weight) + peer.nbytes
                theirs = lambda p=peer, w=weight: p.fold(copies_of([w]))  # noqa: E731
                run.measure("fold", name, shape, None, moved, theirs, in_graph=False)


def gptq(run: Run, shapes: Sequence[Shape]) -> None:
    """Whole solves with the Hessian given, and where their time goes."""
    from bitfold import solvers

    for shape in shapes:
        weight = random(*shape)
        x = random(2 * shape[1], shape[1], seed=1)
        hessian = x.t() @ x / len(x)
        solve = functools.partial(solvers.gptq_quantize, weight, "int4-g128", hessian)
        record = run.add("gptq", "int4-g128", shape, None, lambda s=solve: clock_microseconds(s))
        if "us" in record:
            record["parts_us"] = {
                name.removeprefix("seconds_"): 1e6 * seconds
                for name, seconds in solve(timed=True)[1].items()
                if name.startswith("seconds_")
            }
        swept = functools.partial(solve, sweeps=1, refit=1)
        run.add("gptq", "int4-g128 swept, refitted", shape, None, lambda s=swept: clock_microseconds(s))


def hessians(run: Run, tokens: int, sizes: Sequence[int]) -> None:
    from bitfold import solvers

    for n in sizes:
        x, mean = random(tokens, n), torch.zeros(n, n, device=gpu_peers.DEVICE)

        def update(rows: torch.Tensor, mean: torch.Tensor = mean, precision: str = "highest") -> None:
            torch.set_float32_matmul_precision(precision)
            try:
                solvers.hessian_update(mean, rows, tokens=1)
            finally:
                torch.set_float32_matmul_precision("highest")

        for case, call in (
            ("fp32", functools.partial(update, x)),
            ("bf16 x", functools.partial(update, x.bfloat16())),
            ("tf32", functools.partial(update, x, precision="high")),
        ):
            run.add("hessian", case, (tokens, n), None, lambda c=call: clock_microseconds(c))


def goals_of(records: Sequence[dict[str, Any]]) -> list[Goal]:
    """Every goal there is, measured or not."""
    taken = {(r["job"], r["case"], tuple(r["shape"]), r["m"]): r["us"] for r in records if "us" in r}

    def place(shape: Shape, m: int | None) -> str:
        return f"{shape[0]} x {shape[1]}" + (f", M={m}" if m else "")

    found = [
        {"shape": place(shape, m), **goal(f"{job}, microseconds", case, most, taken.get(key), most=True)}
        for key, most in GOALS.items()
        for job, case, shape, m in [key]
    ]
    for (shape, m), need in RATIOS.items():
        dense = taken.get(("linear", "torch bf16", shape, m))
        for case in FOUR_BITS:
            own = taken.get(("linear", case, shape, m))
            ratio = None if own is None or dense is None else dense / own
            found.append(
                {"shape": place(shape, m), **goal("linear, times as fast as bf16", case, need, ratio)}
            )
    return found


def print_records(records: Sequence[dict[str, Any]]) -> None:
    print(f"{'job':8}{'case':28}{'shape':>14}{'M':>6}{'us':>11}{'floor':>9}{'of floor':>9}{'goal':>9}")
    for r in records:
        head = f"{r['job']:8}{r['case']:28}{r['shape'][0]:>7}x{r['shape'][1]:<6}{r['m'] or '':>6}"
        if "left_out" in r:
            print(f"{head}   {r['left_out']}")
            continue
        reached = f"{r['goal_us']:>9.1f} {'met' if r['met'] else 'MISSED'}" if "goal_us" in r else ""
        floor = f"{r['floor_us']:>9.2f}{r['of_floor']:>9.2f}" if "floor_us" in r else " " * 18
        print(f"{head}{r['us']:>11.2f}{floor}{reached}")
        if "parts_us" in r:
            print("        of which " + ", ".join(f"{k} {v:.0f}" for k, v in r["parts_us"].items()))


def write(out: Path, environment: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """All at once: whoever is stopped leaves what the job before has written."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment, "records": records, "goals": goals_of(records)}
    unfinished = out / "gpu.json.new"
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(out / "gpu.json")


def jobs_of(run: Run, smoke: bool) -> list[tuple[str, Job]]:
    """What has goals comes first, and what is quick: a clock may run out."""
    if smoke:
        small = [(256, 512)]
        return [
            ("unfold", lambda: unfold(run, small)),
            ("fold", lambda: fold(run, small)),
            ("gptq", lambda: gptq(run, small)),
            ("hessian", lambda: hessians(run, 512, [256])),
            ("linear", lambda: linear(run, small, [1, 16], LINEAR_FORMATS)),
        ]
    return [
        ("unfold", lambda: unfold(run, [(8192, 8192)])),
        ("fold", lambda: fold(run, [(4096, 4096)])),
        ("gptq", lambda: gptq(run, [(4096, 4096)])),
        ("hessian", lambda: hessians(run, 16384, [4096])),
        *(
            ("linear", functools.partial(linear, run, [shape], batches, FOUR_BITS))
            for shape, batches in (
                ((8192, 8192), [1, 16]),
                ((28672, 8192), [1]),
                ((4096, 4096), [1]),
                ((8192, 8192), [1024, 4096]),
                ((28672, 8192), [1024, 4096]),
                ((4096, 4096), [1024, 4096]),
            )
        ),
        ("unfold", lambda: unfold(run, [(4096, 4096)])),
        ("fold", lambda: fold(run, [(8192, 8192)])),
        ("gptq", lambda: gptq(run, [(14336, 4096), (4096, 14336)])),
        *(("linear", functools.partial(linear, run, [s], BATCHES, LINEAR_FORMATS)) for s in SHAPES),
    ]


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the tables are printed
    properties = torch.cuda.get_device_properties(0)
    machine = floors(options.smoke)
    environment = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": l2_bytes(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **machine,
    }
    measure(Run(machine, options.minutes), environment, options.out, options.smoke)


def measure(run: Run, environment: dict[str, Any], out: Path, smoke: bool) -> None:
    """All jobs; what was measured is printed and written however they end."""
    try:
        run.do(jobs_of(run, smoke), lambda: write(out, environment, run.records))
    finally:
        print_records(run.records)
        print(
            f"bitfold on {environment['gpu']}: copies {environment['copy_tb_s']:.2f} TB/s, read and written, "
            f"bf16 products {environment['bf16_tflop_s']:.0f} TFLOP/s; torch {environment['torch']}"
        )
        write(out, environment, run.records)
        if not smoke:
            print_goals(goals_of(run.records), "not measured")
    failed = [r for r in run.records if r["case"] not in PEERS and r.get("left_out", NO_TIME) != NO_TIME]
    if failed:
        sys.exit(f"bitfold: {len(failed)} rows of bitfold's own failed; the first: {failed[0]['left_out']}")


if __name__ == "__main__":
    main()
