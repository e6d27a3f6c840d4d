"""A short walk through every kernel, for compute-sanitizer, which makes launches a hundred times slower."""

from __future__ import annotations

import torch

from bitfold import Format, ops, solvers

FORMATS = [
    "nf4",
    "nf4-nodq",
    "fp4-g16-nodq",
    "int8-row",
    "int4-g64",
    "int4-g48-fz-dq",
    "int3-g64",
    "int2-g64",
]
FORMATS += ["nf3", "int8-tensor-zp", "kmeans4-row", "int3-g64-outliers50"]

# Products that tensor cores make: (rows, columns), formats, rows of x. That each goes the way meant is tested
# without a GPU: WhatTheSanitizerWatches in tests/cpp/cuda/linear_plan_test.cc has this list.
OF_TENSOR_CORES = [
    ((33, 384), ["nf4", "int4-g64", "int8-row", "int8-g64-zp", "int3-g64", "int2-g64"], [1, 9, 20, 40, 64]),
    ((16, 16384), ["nf4", "int4-g64-dq"], [1]),  # slices of the columns, added up by add_slices
    ((16, 65536), ["int4-g64"], [64]),  # a slice of several slabs
]
SLABS = (33, 384), ["nf4", "int3-g64"], [130]  # the weight as floats, a slab at a time


def solve() -> None:
    """Ragged everywhere: rows, blocks of columns, groups, sections of the Hessian's rows."""
    rows, n = 35, 197
    x, weight = torch.randn(300, n, device="cuda"), torch.randn(rows, n, device="cuda")
    x[5, 0] = float("nan")
    cross = torch.zeros(n, n, device="cuda", dtype=torch.float64)
    solvers.cross_update(cross, x.half(), x.half(), torch.rand(300, device="cuda") < 0.9)
    for dtype in (torch.float32, torch.float64):
        hessian = torch.empty(n, n, device="cuda", dtype=dtype)
        solvers.hessian_update(hessian, x)
        solvers.hessian_finish(hessian)
    exact = torch.rand(rows, n, device="cuda") < 0.05
    for name in ("int4-g64", "int3-g48-sym", "nf4", "int4-g32-fz-dq"):
        solvers.gptq_quantize(weight, name, hessian, sweeps=1, refit=1)
        solvers.gptq_quantize(weight, name, hessian.float(), order="groups", dynamic=True, exact=exact)
    solvers.gptq_quantize(weight, "int8-tensor-zp", hessian, scales="range", cross=cross)
    never = torch.diag(torch.where(torch.arange(n, device="cuda") % 2 == 0, -0.9, 1.0))
    solvers.gptq_quantize(weight, "int4-g64", never)
    packed = ops.quantize(weight, "int4-g32-fz-dq", "round")
    solvers.refit_scales(packed, "int4-g32-fz-dq", weight, hessian)
    solvers.hqq_solve(weight, "int4-g32-fz")
    for name in ("int3-g48-sym", "nf4", "int8-row"):
        solvers.awq_clip(weight, name, hessian, exact=exact)
    channel = torch.arange(n, device="cuda") - 1
    mean_abs = torch.rand(n, device="cuda")
    solvers.awq_scale([solvers.AwqReader(weight, Format("int4-g64"), hessian, mean_abs, channel, 100)], n - 1)


def multiply() -> None:
    for shape, names, batches in (*OF_TENSOR_CORES, SLABS):
        for name in names:
            spec = Format(name).spec(shape)
            packed = ops.quantize(torch.randn(shape, device="cuda"), name, "round")
            for dtype in (torch.float16, torch.bfloat16):
                bias = torch.randn(shape[0], device="cuda", dtype=dtype)
                for m in batches:
                    x = torch.randn(m, shape[1], device="cuda", dtype=dtype, requires_grad=m == 1)
                    y = ops.linear(x, packed, spec, bias)
                    if x.requires_grad:
                        y.sum().backward()


def main() -> None:
    for shape in ((9, 136), (3, 67)):
        weight = torch.randn(shape)
        for name in FORMATS:
            fmt = Format(name)
            for method in ("round", "search"):
                packed = ops.quantize(weight.cuda(), fmt, method)
                for dtype in (torch.float32, torch.bfloat16):
                    ops.dequantize(packed, fmt, shape, dtype)
                spec = fmt.spec(shape)
                ops.embedding(torch.tensor([2, 0], device="cuda"), packed, spec, torch.float16)
            for m in (1, 17):
                ops.linear(torch.randn(m, shape[1], device="cuda").bfloat16(), packed, spec)
            if name == "int8-row":
                for columns in (None, [1, 66]):
                    x = 4.0 * torch.randn(19, shape[1], device="cuda")
                    ops.linear_mixed(x, packed, spec, columns=columns)
    codes = torch.randint(0, 8, (5, 37), dtype=torch.uint8).cuda()
    ops.unpack_bits(ops.pack_bits(codes, 3), 3, 5, 37)
    ops.double_dequantize(*ops.double_quantize(torch.rand(700, device="cuda") ** 12))
    multiply()
    solve()
    torch.cuda.synchronize()
    print("sanitized: every kernel ran")


if __name__ == "__main__":
    main()
