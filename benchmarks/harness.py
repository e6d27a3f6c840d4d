"""What the benchmarks share: the machine's line, interleaved timing, cold caches, tables, JSON, pictures."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CACHE_FACTOR = 4  # rotating copies hold this many times the last-level cache: what was read last time is gone
MiB = 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, the 10th and 90th percentile as its spread, and the best.

    On a busy machine the best of many short calls is nearer to what an idle one would show than the median.
    """

    median: float
    low: float
    high: float
    best: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return cls(statistics.median(ordered), low, high, ordered[0], len(ordered))

    def to_dict(self) -> dict[str, float]:
        spread = {"p10_s": self.low, "p90_s": self.high}
        return {"median_s": self.median, **spread, "best_s": self.best, "calls": self.calls}


def interleaved(
    cases: Mapping[str, Callable[[int], Any]],
    *,
    seconds: float = 2.0,
    least: int = 5,
    most: int = 2000,
    turn: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `cases` by turns, so that a busy moment of the machine falls on all of them alike.

    Each case is called with a counter of its own that never repeats, by which it picks its next cold copy.
    The first round is warm-up and not counted; rounds go on for `seconds` per case on average, and until
    every case was called `least` times, but no longer than until each was called `most` times.

    A turn is one call, or as many as `turn` seconds hold. Threads of the library that had the turn before
    still spin for a while, and those of this one are still asleep: so calls that begin in the first third of
    a longer turn are not counted. With one thread, `clock=time.thread_time` leaves out the time that other
    programs had the CPU.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    counters = {name: itertools.count() for name in cases}
    for name, call in cases.items():
        call(next(counters[name]))
    end = time.perf_counter() + seconds * len(cases)

    def goes_on() -> bool:
        fewest = min(map(len, taken.values()))
        return fewest < least or (fewest < most and time.perf_counter() < end)

    while goes_on():
        for name, call in cases.items():
            begin = time.perf_counter()
            since = 0.0
            while True:
                start = clock()
                call(next(counters[name]))
                spent = clock() - start
                settled = since >= turn / 3
                since = time.perf_counter() - begin
                if settled or since >= turn:  # a call as long as the turn counts, it being the only one
                    taken[name].append(spent)
                if since >= turn:
                    break
    return {name: Timing.of(times) for name, times in taken.items()}


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first CPU sees; 32 MiB where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=32 * MiB)


def cold_copies(nbytes: int) -> int:
    """How many copies of `nbytes` to rotate through so that none is in any cache when its turn comes."""
    return max(2, -(-CACHE_FACTOR * last_level_cache_bytes() // nbytes))


def copies_of(tensors: Sequence[Any]) -> list[list[Any]]:
    """Enough copies of `tensors` to be cold at every turn."""
    nbytes = sum(t.numel() * t.itemsize for t in tensors)
    return [[t.clone() for t in tensors] for _ in range(cold_copies(nbytes))]


def weight_of(n: int, k: int) -> Any:
    """A weight [n, k] as a trained layer has it: Gaussian, 0.02."""
    import torch

    return torch.randn(n, k, generator=torch.Generator().manual_seed(1)) * 0.02


def environment() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    import torch

    import bitfold
    from bitfold import ops

    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "last_level_cache_MiB": round(last_level_cache_bytes() / MiB, 2),
        "bitfold_instruction_set": ops.instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "bitfold": bitfold.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def environment_line(env: Mapping[str, Any]) -> str:
    """`environment()` on one line, to print under a table."""
    kernels = f"kernels {env['bitfold_instruction_set']} (torch: {env['torch_instruction_set']})"
    return (
        f"{env['cpu']}, {env['threads']} threads of {env['cpus']} CPUs, {kernels}, load "
        f"{env['load_average_1min']}, bitfold {env['bitfold']}, torch {env['torch']}, Python {env['python']}"
    )


def _cpu_model() -> str:
    """Model name, and family and model number, since virtual machines shorten the name."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name", platform.processor() or platform.machine())
    return (
        f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name
    )


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """A table with the first column left-aligned; plain text, so that it can be pasted anywhere."""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def text(line: Sequence[str]) -> str:
        cells = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    print(f"\n{title}\n{text(head)}\n{'-' * (sum(widths) + 2 * (len(widths) - 1))}")
    print("\n".join(text(row) for row in rows))
    if note:
        print(note)


class Smoke(argparse.Action):
    """`--smoke`: a flag; what comes out is no result, and lands in a temporary folder without `--out`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, _parser: Any, namespace: argparse.Namespace, *_rest: Any) -> None:
        namespace.smoke = True
        if namespace.out == RESULTS:
            namespace.out = Path(tempfile.mkdtemp(prefix="bitfold-smoke-"))


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that every script here has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for JSON and PNG (default: %(default)s)"
    )
    parser.add_argument("--smoke", action=Smoke, help="tiny shapes, seconds: does it run at all?")
    parser.add_argument("--no-picture", action="store_true", help="no PNG (it needs matplotlib)")
    return parser


def write_json(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """`<folder>/<name>.json`, indented, to be read by people too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(_indented(_rounded(result), "") + "\n", encoding="utf-8")
    print(f"wrote {path}")


def _rounded(value: Any) -> Any:
    """Measured numbers to five digits: more are noise, and hide what changed."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def _indented(value: Any, indent: str, width: int = 110) -> str:
    """JSON with everything on one line that fits there, and records always."""
    line = json.dumps(value, ensure_ascii=False)
    is_record = indent and "{" not in line[1:]
    if is_record or len(indent) + len(line) <= width:
        return line
    inner = indent + " "
    if isinstance(value, Mapping):
        parts = [f"{json.dumps(str(name))}: {_indented(part, inner)}" for name, part in value.items()]
        opened, closed = "{}"
    else:
        parts = [_indented(part, inner) for part in value]
        opened, closed = "[]"
    return opened + "".join(f"\n{inner}{part}," for part in parts)[:-1] + f"\n{indent}{closed}"


def write_picture(folder: Path, name: str, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """`<folder>/<name>.png`: `draw` gets a matplotlib figure of `size` inches."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        draw(figure)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
    print(f"wrote {path}")
