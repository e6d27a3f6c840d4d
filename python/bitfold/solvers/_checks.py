"""What the wrappers of solvers share: checks of arguments, errors, the shapes of what they return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bitfold import _C, ops  # noqa: F401  (ops loads the library)
from bitfold.errors import FormatError, WeightError
from bitfold.formats import Format, as_format


def dense(op: str, fmt: Format | str) -> Format:
    fmt = as_format(fmt)
    if fmt.outliers:
        msg = (
            f"{op}(): {fmt} has outliers, which are chosen first; solve for {fmt.dense}, given exact=mask "
            "where there is such an argument, then bitfold.outliers.fill_outliers; method 'gptq' does both"
        )
        raise FormatError(msg)
    return fmt


def check_weight(op: str, weight: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        msg = f"{op}(): weight must be float32, float16 or bfloat16, got {weight.dtype}"
        raise WeightError(msg)
    if weight.dim() != 2 or weight.numel() == 0:
        msg = f"{op}(): weight must be [out, in] with at least one element, got {tuple(weight.shape)}"
        raise WeightError(msg)


def weight_error(error: RuntimeError) -> Exception:
    sentence = str(error).splitlines()[0]
    return WeightError(sentence) if "every weight must be finite" in sentence else RuntimeError(sentence)


def empty_packed(weight: Tensor, spec: Sequence[int]) -> list[Tensor]:
    """What fake kernels return for a folded matrix."""
    buffers = _C.buffers_of_spec(list(spec))
    return [weight.new_empty(shape, dtype=getattr(torch, dtype)) for _, dtype, shape in buffers]


def report_like(count: int) -> Tensor:
    """What fake kernels return for a report, which is on the CPU wherever the matrix is."""
    return torch.empty((count,), dtype=torch.float64, device="cpu")


def moved(value: Any, device: torch.device | str) -> Any:
    """Tensors, and lists and tuples of them, on a device; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device) for part in value)
    return value


def through_cpu(solve: Callable[..., Any], device: torch.device, *arguments: Any) -> Any:
    """What a GPU has no form of: solved on the CPU, the way there and back included."""
    if device.type != "cuda":
        return solve(*arguments)
    return moved(solve(*moved(arguments, "cpu")), device)


# Torch has one setting for all threads. Nobody turns TF32 on while a solve runs that must not have it.
_setting = threading.Lock()


class _Solves:
    """How many need products as such, and what gives back what torch had been told before the first."""

    running = 0
    restore: Callable[[], None] = staticmethod(lambda: None)


@contextmanager
def exact_products(tensor: Tensor) -> Iterator[None]:
    """Products in fp32 as such on a GPU, whatever torch has been told: TF32 in the feedback changes codes."""
    if not tensor.is_cuda:
        yield
        return
    with _setting:
        if _Solves.running == 0:
            _Solves.restore = _without_tf32()
        _Solves.running += 1
    try:
        yield
    finally:
        with _setting:
            _Solves.running -= 1
            if _Solves.running == 0:
                _Solves.restore()


def _without_tf32() -> Callable[[], None]:
    """Turns TF32 off; returns what turns it on again if it was."""
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        return lambda: None
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through fp32_precision, of which the older setting must not know
        matmul.fp32_precision = "ieee"
        return lambda: setattr(matmul, "fp32_precision", "tf32")
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


@contextmanager
def tf32_products() -> Iterator[None]:
    """TF32 for products of what it holds exactly, as all numbers of 16 bits: only sums may differ.

    Not while another thread needs products as such, or is in here: then they are as torch has been told.
    """
    matmul = torch.backends.cuda.matmul
    if not _setting.acquire(blocking=False):
        yield
        return
    try:
        told = matmul.fp32_precision
        try:
            unclear = matmul.allow_tf32
        except RuntimeError:  # the older and the newer setting were both used, and contradict each other
            unclear = True
        if unclear or _Solves.running > 0:
            yield
            return
        matmul.allow_tf32 = True
        try:
            yield
        finally:
            matmul.allow_tf32 = False
            matmul.fp32_precision = told
    finally:
        _setting.release()
