"""How much memory a run will add at its peak, said before it starts."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bitfold.errors import BitfoldError
from bitfold.formats import Format


class MemoryLimitError(BitfoldError, MemoryError):
    """The run would need more memory than there is."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made and still alive while the mode is on; `peak` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.made = 0  # bytes of all tensors made, alive or not
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {
            _storage_id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in before | self._known:
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, nbytes = storage._cdata, storage.nbytes()
        self._known.add(number)
        self.live += nbytes
        self.made += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, number, nbytes)

    def _forget(self, number: int, nbytes: int) -> None:
        self._known.discard(number)
        self.live -= nbytes


def _storage_id(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class Prediction:
    """What is held at one moment beyond what the process held before the run, in bytes.

    Args:
        streams: cached outputs of blocks.
        hessians: statistics of one set.
        work: tensors of one forward pass, or the workspace of the solver.
        packed: matrices folded by then.
        freed: float matrices released by then.
        block: what a method holds of the block: a copy to undo its scales, inputs that it is trained on.
    """

    streams: int = 0
    hessians: int = 0
    work: int = 0
    packed: int = 0
    freed: int = 0
    block: int = 0

    @property
    def peak(self) -> int:
        """The sum."""
        return self.streams + self.hessians + self.work + self.packed - self.freed + self.block

    def __str__(self) -> str:
        parts = [
            f"{_mib(self.streams)} outputs of blocks",
            f"{_mib(self.hessians)} Hessians",
            f"{_mib(self.work)} for one pass or one matrix",
            *([f"{_mib(self.block)} copies of a block or of its inputs"] if self.block else []),
            f"{_mib(self.packed - self.freed)} packed matrices less released ones",
        ]
        return f"{_mib(self.peak)} ({', '.join(parts)})"


def solver_bytes(shape: tuple[int, int], fmt: Format, cross: bool) -> int:
    """Workspace of GPTQ with sweeps and refits, the larger of two moments.

    In both: moments around the mean (of a matrix with a bias; two with the cross term), the damped Hessian
    and its factor; with outliers another factor, the target and where they are. At the columns: products with
    H, three forms of the weight. At a refit: rows of H of a section, H inside of it, and four products of
    its width (a section is some groups, or one that is wide).
    """
    rows, columns = shape
    square, area, more = columns * columns, rows * columns, int(cross)
    section = min(columns, max(_SECTION, fmt.group_size or columns))
    held = (3 + more) * square
    if fmt.outliers:
        held += square + area * 5 // 4
        more = 0  # the target has taken the cross term in
    at_columns = more * square + (3 + more) * area
    at_refit = area * 13 // 4 + section * (columns + section + 4 * rows)
    return 4 * (held + max(at_columns, at_refit))


_SECTION = 512  # columns of some groups at once, as in csrc/solvers/refit.cc and awq_clip.cc
_CANDIDATES = 10 * 8 * 16  # of clipping at once: steps, panels, rows


def clip_bytes(shape: tuple[int, int]) -> int:
    """Workspace of AWQ: the weight in panels with its codes, and candidates' errors and products with H; or
    the error and its product with H.
    """
    rows, columns = shape
    search = rows * columns * 5 // 4 + 2 * min(columns, _SECTION) * _CANDIDATES
    return 4 * max(search, 2 * rows * columns)


def trial_bytes(block: int, activations: int) -> int:
    """Looking for the folds of a block: two copies of it, and what it makes of the probe, in and out of each
    module, before and after.
    """
    return 2 * block + 4 * activations


def training_bytes(weights: int) -> int:
    """State of `learned`: rank, zero point, start, offset, its gradient and the best one of each weight, and
    about as much that is kept for the gradient.
    """
    return 4 * 12 * weights


def hessian_bytes(size: int, cross: bool) -> int:
    """Statistics of one input of `size` columns."""
    return 4 * (size * size * (2 if cross else 1) + 2 * size)


def check(prediction: Prediction, limit: int | None) -> None:
    """Raise MemoryLimitError where the prediction exceeds `limit`, or what is available."""
    available = available_bytes() if limit is None else limit
    if available is not None and prediction.peak > available:
        whose = "available here" if limit is None else "allowed by max_memory"
        msg = (
            f"calibration would add {prediction}, but {_mib(available)} are {whose}; nothing was changed. "
            "Fewer or shorter calibration sequences lessen the outputs of blocks, a smaller batch_size the "
            "memory of one pass"
        )
        raise MemoryLimitError(msg)


def available_bytes() -> int | None:
    """What a process may still take: its share of the machine and of its control group; None if unknown."""
    found = [*_of_machine(), *_of_group()]
    # Processes that torchrun started here have to share it.
    return min(found) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if found else None


def _of_machine() -> list[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _of_group() -> list[int]:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    # File pages in the cache are given back before anything fails.
    return [] if limit == "max" else [max(0, int(limit) - used + int(stat.get("inactive_file", 0)))]


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in `tree`."""
    return sum(
        leaf.numel() * leaf.itemsize for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"
