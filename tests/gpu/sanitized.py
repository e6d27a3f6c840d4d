"""A short walk through every kernel, for compute-sanitizer, which makes launches a hundred times slower."""

from __future__ import annotations

import torch

from bitfold import Format, ops

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
                try:
                    ops.linear(torch.randn(m, shape[1], device="cuda").bfloat16(), packed, spec)
                except NotImplementedError:
                    print("linear has no CUDA kernel in this build")
    codes = torch.randint(0, 8, (5, 37), dtype=torch.uint8).cuda()
    ops.unpack_bits(ops.pack_bits(codes, 3), 3, 5, 37)
    ops.double_dequantize(*ops.double_quantize(torch.rand(700, device="cuda") ** 12))
    torch.cuda.synchronize()
    print("sanitized: every kernel ran")


if __name__ == "__main__":
    main()
