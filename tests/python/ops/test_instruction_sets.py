"""The same bytes on every instruction set, and matrices beyond 2^31 weights."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from bitfold import _C, Format, ops
from products import PROMISED
from support import SOME_FORMATS

FORCED = """
import hashlib, sys, torch
from bitfold import ops
torch.manual_seed(0)
weight, x = torch.randn(7, 197), torch.randn(3, 197)
seen = hashlib.sha256()
for fmt in sys.argv[1:]:
    packed = ops.quantize(weight, fmt)
    decoded = [ops.dequantize(packed, fmt, (7, 197), dtype) for dtype in (torch.float32, torch.float16)]
    for tensor in [*packed, *decoded]:
        seen.update(tensor.numpy().tobytes())
print(ops.instruction_set(), seen.hexdigest())
"""


def run_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FORCED, *SOME_FORMATS],
        env={**os.environ, "BITFOLD_ISA": name},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_instruction_set_writes_the_same_bytes() -> None:
    digests = {}
    for name, _, supported in _C.instruction_sets():
        done = run_with_isa(name)
        if supported:
            assert done.returncode == 0, done.stderr
            ran, digest = done.stdout.split()
            assert ran == name
            digests[name] = digest
        else:
            assert done.returncode != 0
            assert f"BITFOLD_ISA={name}: this machine lacks" in done.stderr
    assert "portable" in digests
    assert len(set(digests.values())) == 1, digests


def test_an_unknown_instruction_set_is_refused() -> None:
    done = run_with_isa("sse9")
    assert done.returncode != 0
    assert "BITFOLD_ISA=sse9: unknown instruction set; known: " in done.stderr


@pytest.mark.slow
def test_more_than_two_to_the_31_weights() -> None:
    """Built from bytes; the float matrix (8 GiB) never exists."""
    rows, cols, fmt = 65536, 32800, Format("int2-row")
    shape = (rows, cols)
    assert rows * cols > 2**31
    packed = [torch.zeros(size, dtype=getattr(torch, dtype)) for _, dtype, size in fmt.buffers(shape)]
    packed[0].fill_(0x1B)  # codes 0 1 2 3: -1.5 -0.5 0.5 1.5
    scale = (torch.arange(rows) % 7 + 1).to(torch.float16)
    packed[1].copy_(scale.view(torch.int16).view(rows, 1))
    spec = fmt.spec(shape)
    pattern = torch.tensor([-1.5, -0.5, 0.5, 1.5]).repeat(cols // 4)
    indices = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    rows_read = ops.embedding(indices, packed, spec, torch.float32)
    assert torch.equal(rows_read, scale[indices].float()[:, None] * pattern)
    x = torch.randn(1, cols)
    y = ops.linear(x, packed, spec)
    expected = (x.double() @ pattern.double()) * scale.double()
    error = (y[0].double() - expected).square().mean() / expected.square().mean()
    assert error.sqrt() <= PROMISED["auto"]
    back = torch.ops.bitfold.linear_grad_input(
        torch.nn.functional.one_hot(torch.tensor([rows - 1]), rows).float(), packed, spec
    )
    assert torch.equal(back[0], scale[-1].float() * pattern)
