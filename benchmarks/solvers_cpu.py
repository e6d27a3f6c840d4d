"""Solvers on the CPU: the Hessian of a layer's input, GPTQ in parts, the searches of AWQ, HQQ.

Beside them stands what public implementations do (`public_solvers.py`).

    python benchmarks/solvers_cpu.py                       # 4096 x 4096, 8192 rows, int4-g128, two threads
    python benchmarks/solvers_cpu.py --format nf4 --sweeps 2 --refit 1
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from goals import print_goals, solver_goals
from harness import (
    arguments,
    environment,
    environment_line,
    interleaved,
    print_table,
    weight_of,
    write_json,
)
from public_solvers import SEQUENCE, hqq_package, public_gptq, public_hessian, public_hqq

from bitfold import Format, ops, solvers

HQQ_FORMAT = Format("int4-g64-fz")
PARTS = ("factor", "scales", "products", "columns")
Case = dict[str, Any]


def inputs_of(rows: int, n: int) -> torch.Tensor:
    """Inputs as layers see them: correlated, a few of them large."""
    g = torch.Generator().manual_seed(2)
    low = torch.randn(rows, n // 8, generator=g) @ torch.randn(n // 8, n, generator=g) / (n // 8) ** 0.5
    sizes = torch.exp(torch.randn(n, generator=g))
    return (low + 0.3 * torch.randn(rows, n, generator=g)) * sizes


def native_hessian(x: torch.Tensor) -> torch.Tensor:
    """The same mean by the native op, in the same batches."""
    hessian, tokens = torch.empty(x.shape[1], x.shape[1]), 0
    for batch in x.split(SEQUENCE):
        tokens += solvers.hessian_update(hessian, batch, tokens=tokens)[0]
    return solvers.hessian_finish(hessian)


def damped_loss(weight: torch.Tensor, decoded: torch.Tensor, hessian: torch.Tensor, damping: float) -> float:
    """tr(E H Eᵀ), H damped, relative to that of the weight itself."""
    h = hessian + damping * hessian.diag().mean() * torch.eye(len(hessian))
    error = weight - decoded
    return float(((error @ h) * error).sum() / ((weight @ h) * weight).sum())


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    parser = arguments("Speed of calibrated solvers on the CPU.")
    parser.add_argument("--shape", nargs=2, type=int, default=[4096, 4096], metavar=("OUT", "IN"))
    parser.add_argument("--rows", type=int, default=8192, help="of calibration data")
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--sweeps", type=int, default=2, help="of the case with sweeps")
    parser.add_argument("--refit", type=int, default=1, help="rounds, of the case with sweeps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="per case")
    parser.add_argument("--no-reference", action="store_true", help="the native solvers alone")
    args = parser.parse_args(argv)
    if args.smoke:
        args.shape, args.rows, args.seconds = [64, 256], 512, 0.05
    fmt, damping, shape = Format(args.format), 0.01, (args.shape[0], args.shape[1])
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        env = environment()
        weight, x = weight_of(*shape), inputs_of(args.rows, shape[1])
        hessian = native_hessian(x)
        reports: dict[str, list[dict[str, Any]]] = {}
        decoded: dict[str, torch.Tensor] = {}

        def solve(name: str, **options: Any) -> None:
            packed, report = solvers.gptq_quantize(
                weight, fmt, hessian, damping=damping, timed=True, **options
            )
            reports.setdefault(name, []).append(report)
            decoded[name] = ops.dequantize(packed, fmt, shape)

        reader = solvers.AwqReader(weight, fmt, hessian, x.abs().mean(0), torch.arange(shape[1]), args.rows)

        def clip() -> None:
            decoded["awq, clip"] = ops.dequantize(solvers.awq_clip(weight, fmt, hessian)[0], fmt, shape)

        def solve_publicly(_: int) -> None:
            decoded["public solve"] = public_gptq(weight, hessian, 128, damping)

        more = {"sweeps": args.sweeps, "refit": args.refit}
        swept = f"solve, {args.sweeps} sweeps, {args.refit} refits"
        calls: dict[str, Any] = {
            "hessian": lambda _: native_hessian(x),
            "solve": lambda _: solve("solve"),
            "solve, range scales": lambda _: solve("solve, range scales", scales="range"),
            swept: lambda _: solve(swept, **more),
            "awq, scale grid": lambda _: solvers.awq_scale([reader], shape[1]),
            "awq, clip": lambda _: clip(),
            "hqq": lambda _: solvers.hqq_solve(weight, HQQ_FORMAT),
        }
        if not args.no_reference:
            calls["torch, one product [in, in] x [in, out]"] = lambda _: hessian @ weight.T  # a yardstick
            calls |= {"public hessian": lambda _: public_hessian(x), "public solve": solve_publicly}
            calls["public hqq"] = lambda _: public_hqq(weight, HQQ_FORMAT)
            if importlib.util.find_spec("hqq") is not None:
                calls["hqq, the package"] = lambda _: hqq_package(weight, HQQ_FORMAT)
        with torch.inference_mode():
            timings = interleaved(calls, seconds=args.seconds, least=2)
            losses = {name: damped_loss(weight, d, hessian, damping) for name, d in decoded.items()}
    finally:
        torch.set_num_threads(before)

    records = []
    for name, timing in timings.items():
        record: Case = {"case": name, **timing.to_dict()}
        if name in losses:
            record["relative_loss"] = losses[name]
        if name in reports:
            parts = {p: sorted(r[f"seconds_{p}"] for r in reports[name]) for p in PARTS}
            record["parts_s"] = {p: values[len(values) // 2] for p, values in parts.items()}
        records.append(record)
    head = ["", "s", "best", "relative loss", *PARTS]
    rows = [
        [r["case"], f"{r['median_s']:.3f}", f"{r['best_s']:.3f}"]
        + [f"{r['relative_loss']:.3e}" if "relative_loss" in r else ""]
        + [f"{r['parts_s'][p]:.3f}" if "parts_s" in r else "" for p in PARTS]
        for r in records
    ]
    print_table(f"{args.format}, [{shape[0]}, {shape[1]}], {args.rows} rows of input", head, rows)
    print(f"hqq: {HQQ_FORMAT}, without data; the others: {args.format}")
    goals = solver_goals({r["case"]: r for r in records}) if shape == (4096, 4096) else []
    print_goals(goals)
    print(environment_line(env))
    result = {
        "environment": env,
        "format": args.format,
        "shape": list(shape),
        "rows": args.rows,
        "records": records,
        "goals": goals,
    }
    write_json(args.out, "solvers_cpu", result)
    return result


if __name__ == "__main__":
    main()
