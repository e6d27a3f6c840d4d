"""What the machine allows at most: read bandwidth and multiply-add rates, measured with compiled loops.

`floors.c` is compiled for this CPU when it is needed. Threads come from Python: ctypes gives up the
interpreter lock. Tile units (AMX) are not counted: where there is one, a product can be faster than these
rates say.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import MiB, Timing

SOURCE = Path(__file__).with_name("floors.c")
KINDS = ("fp32", "int16", "bf16", "int8")  # multiply-adds that a loop is written for
STEPS = 400_000  # of a compute loop: a few milliseconds


def compile_loops() -> ctypes.CDLL | None:
    """The loops of `floors.c`; None where there is no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="bitfold-floors-") as folder:
        library = Path(folder) / "floors.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        if subprocess.run(command, check=False, capture_output=True).returncode != 0:
            return None
        loops = ctypes.CDLL(str(library))
    for read in (loops.read_1, loops.read_4):
        read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        read.restype = ctypes.c_uint64
    return loops


class Floors:
    """Loops that read memory and multiply on `threads` threads.

    Attributes:
        loops: the compiled loops, or None: then memory is read by `torch.sum`, and rates are unknown.
        read_bytes: how many bytes one `read` reads; they take turns within a buffer of twice that.
    """

    def __init__(
        self, threads: int, read_bytes: int = 256 * MiB, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.threads, self.read_bytes, self.clock = threads, read_bytes, clock
        self.loops = compile_loops()
        self.buffer = torch.ones(2 * read_bytes, dtype=torch.int8)
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        self._rates: dict[str, float] = {}

    @property
    def how(self) -> str:
        """What measures the bandwidth."""
        if self.loops is None:
            return "torch.sum (no C compiler)"
        return "the faster of two vector loops, one and four streams a thread"

    def read_cases(self) -> dict[str, Callable[[int], None]]:
        """For `harness.interleaved`: each call reads `read_bytes`, cold."""
        if self.loops is None:
            return {"read, torch.sum": self._sum}
        return {
            "read, 1 stream": lambda turn: self._read(self.loops.read_1, turn),
            "read, 4 streams": lambda turn: self._read(self.loops.read_4, turn),
        }

    def bandwidth(self, timings: Mapping[str, Timing]) -> dict[str, Any]:
        """GB/s by the median and by the best call of the fastest case, and the median of each."""
        cases = {name: timings[name] for name in self.read_cases()}
        return {
            "median": max(self.read_bytes / t.median / 1e9 for t in cases.values()),
            "best": max(self.read_bytes / t.best / 1e9 for t in cases.values()),
            "each": {name: self.read_bytes / t.median / 1e9 for name, t in cases.items()},
        }

    def _sum(self, turn: int) -> None:
        start = (turn % 2) * self.read_bytes
        self.buffer[start : start + self.read_bytes].view(torch.float32).sum()

    def _read(self, read: Any, turn: int) -> None:
        begin = -(-self.buffer.data_ptr() // 64) * 64 + (turn % 2) * self.read_bytes
        lines = self.read_bytes // 64 // self.threads
        self._on_every_thread(lambda i: read(begin + 64 * lines * i, lines - 1))

    def rates(self) -> dict[str, float]:
        """Multiply-adds per second of all threads together, per kind that the CPU has an instruction for.

        The best so far: what else runs for a moment halves them, so they are measured again and again.
        """
        for kind in KINDS:
            step = getattr(self.loops, f"{kind}_steps", None) if self.loops else None
            if step is not None:
                rate = self._rate(step, ctypes.c_float if kind in ("fp32", "bf16") else ctypes.c_int)
                self._rates[kind] = max(rate, self._rates.get(kind, 0.0))
        return dict(self._rates)

    def _rate(self, step: Any, number: type[Any]) -> float:
        """The best of a few runs: nothing but other programs can slow down a loop in registers."""
        step.argtypes = [ctypes.c_size_t, ctypes.POINTER(number), ctypes.POINTER(number)]
        best, products = float("inf"), 0

        def run(_: int) -> None:
            nonlocal products
            products = step(STEPS, ctypes.byref(number(1)), ctypes.byref(number(0)))

        for _ in range(40):
            start = self.clock()
            self._on_every_thread(run)
            best = min(best, self.clock() - start)
        return products * STEPS * self.threads / best

    def _on_every_thread(self, work: Callable[[int], Any]) -> None:
        others = [self._pool.submit(work, i) for i in range(1, self.threads)] if self._pool else []
        work(0)
        for other in others:
            other.result()
