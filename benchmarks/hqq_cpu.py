"""Half-quadratic quantization: seconds and errors beside the published loop in torch and the package `hqq`.

    python benchmarks/hqq_cpu.py [--size 4096] [--format int4-g64-fz] [--threads 2]

The package is used where it is installed (`pip install hqq`); it stores scales in full precision here.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from harness import arguments, environment, environment_line, write_json
from torch import Tensor

from bitfold import Format, ops, solvers


def published(weight: Tensor, fmt: Format) -> Tensor:
    """The published loop in float32 torch, min-max scales; returns the decoded weights."""
    assert fmt.group_size is not None
    w, top = weight.reshape(-1, fmt.group_size), 2**fmt.bits - 1
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    step = (high - low) / top
    zero, beta, least = -low / step, 10.0, float("inf")
    for _ in range(20):
        codes = (w / step + zero).round_().clamp_(0, top)
        residual = w - (codes - zero) * step
        size = residual.abs()
        error = residual.sign() * (size - size**-0.3 / beta).clamp_min_(0)
        zero = (codes - (w - error) / step).mean(1, keepdim=True)
        beta *= 1.01
        mean = float(size.mean())
        if mean >= least:
            break
        least = mean
    codes = (w / step + zero).round_().clamp_(0, top)
    return ((codes - zero) * step).reshape(weight.shape)


def package(weight: Tensor, fmt: Format) -> Tensor:
    """The public package, as its own defaults have it on a CPU."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight,
        nbits=fmt.bits,
        group_size=fmt.group_size,
        axis=1,
        optimize=True,
        round_zero=False,
        device="cpu",
        compute_dtype=torch.float32,
    )
    return Quantizer.dequantize(packed, meta)


def ours(weight: Tensor, fmt: Format) -> Tensor:
    """`hqq_solve`, decoded."""
    return ops.dequantize(solvers.hqq_solve(weight, fmt), fmt, (weight.shape[0], weight.shape[1]))


def timed(call: Callable[[], object], times: int) -> float:
    """Seconds of the best of several calls after one that is not counted."""
    call()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def main(argv: list[str] | None = None) -> None:
    parser = arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--format", type=Format, default=Format("int4-g64-fz"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    options.size = 128 if options.smoke else options.size
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight, fmt = torch.randn(options.size, options.size) * 0.02, options.format
    shape = (options.size, options.size)
    cases: dict[str, tuple[Callable[[], object], Callable[[], Tensor], int]] = {
        "bitfold hqq": (lambda: solvers.hqq_solve(weight, fmt), lambda: ours(weight, fmt), 5),
        "bitfold search": (
            lambda: ops.quantize(weight, fmt, "search"),
            lambda: ops.dequantize(ops.quantize(weight, fmt, "search"), fmt, shape),
            5,
        ),
        "published loop in torch": (lambda: published(weight, fmt), lambda: published(weight, fmt), 1),
        "package hqq": (lambda: package(weight, fmt), lambda: package(weight, fmt), 1),
    }
    print(f"{options.size} x {options.size}, {fmt}, {options.threads} threads, {ops.instruction_set()}")
    rows = []
    for name, (call, decoded, times) in cases.items():
        try:
            error = (decoded() - weight).double() / weight.double().std()
        except ImportError:
            print(f"{name:24s} not installed")
            continue
        square = float(error.square().mean())
        power = float(error.abs().pow(0.7).mean())
        seconds = timed(call, times)
        print(f"{name:24s} {seconds * 1e3:9.1f} ms  mse {square:.6f}  |r|^0.7 {power:.5f}")
        rows.append({"name": name, "seconds": seconds, "mse": square, "power": power})
    env = environment()
    print(environment_line(env))
    write_json(options.out, "hqq_cpu", {"environment": env, "shape": shape, "format": str(fmt), "rows": rows})


if __name__ == "__main__":
    main()
