"""Calibration in several processes: shares of the data, sums of statistics, matrices solved side by side.

Nothing is scheduled here: torchrun (or whoever initialised torch.distributed) started one process per rank,
and every one of them calls `bitfold.quantize` with the same model and the same data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitfold.calibration.statistics import InputStatistics
from bitfold.formats import Format
from bitfold.methods import Solution
from bitfold.outputs import Batch

T = TypeVar("T")


class Processes:
    """The processes that calibrate together; one that is alone works without torch.distributed.

    Args:
        device: where the model is; where a group must be made, nccl is taken for CUDA, gloo otherwise.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made = False
        self._parted = False  # no exchange is possible any more
        if dist.is_available() and not dist.is_initialized() and _started_by_torchrun():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self._made = True
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around all that the processes do: where one raises, all do, and say which one and why.

        Before each exchange all tell each other whether they are well. One that has raised takes part in the
        next such round, whatever the others meant to exchange, and leaves; so do they. (A process that is
        killed or interrupted takes part in nothing: whoever started it has to end the others.)
        """
        try:
            yield
            with self._meeting():
                pass  # whoever is through waits for those that are not
        except Exception as error:
            if self.size > 1 and not self._parted:
                self._meet(error)
            raise
        finally:
            if self._made:
                dist.destroy_process_group()
                self._made = False

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around every exchange."""
        if self.size > 1:
            self._meet(None)
            self._parted = True  # if the exchange itself fails, the others cannot be told
        yield
        self._parted = False

    def _meet(self, error: Exception | None) -> None:
        self._parted = True
        failed = torch.tensor([int(error is not None)], device=self._wire())
        dist.all_reduce(failed)
        if not failed:
            self._parted = False
            return
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            whose = "; ".join(f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None)
            msg = f"calibration stopped because of an error elsewhere: {whose}"
            raise RuntimeError(msg)

    def share(self, batches: list[Batch]) -> list[Batch]:
        """The batches of this rank."""
        if len(batches) < self.size:
            msg = (
                f"calibration: {len(batches)} batches cannot be shared out to {self.size} processes; "
                "give more data or a smaller batch_size"
            )
            raise ValueError(msg)
        return batches[self.rank :: self.size]

    def agree(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        with self._meeting():
            dist.broadcast_object_list(box, src=0, device=self._wire())
        return box[0]

    def everywhere(self, value: bool) -> bool:
        """Whether `value` is true on all ranks; also a barrier."""
        if self.size == 1:
            return value
        flag = torch.tensor([int(value)], device=self._wire())
        with self._meeting():
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag.item())

    def one_by_one(self, make: Callable[[], T]) -> T:
        """`make()` on rank 0, then on all others, which see what it left on the disk."""
        if self.rank == 0:
            made = make()
        self.everywhere(True)
        if self.rank != 0:
            made = make()
        self.everywhere(True)
        return made

    def reduce(self, gathered: Sequence[InputStatistics]) -> None:
        """Make the statistics of each rank's share those of all data, in place."""
        if self.size == 1:
            return
        with self._meeting():
            for part in gathered:
                self._reduce(part)

    def _reduce(self, part: InputStatistics) -> None:
        counts = torch.tensor(
            [part.tokens, part.dropped, int(part.unmasked), int(part.cross is None)], device=self._wire()
        )
        dist.all_reduce(counts)
        total, part.dropped = int(counts[0]), int(counts[1])
        part.unmasked = bool(counts[2])
        if counts[3]:
            part.cross = None
        cross = () if part.cross is None else (part.cross, part.mean_float)
        for tensor in (part.hessian, part.mean, part.mean_abs, *cross):
            tensor.mul_(part.tokens / max(total, 1))
            dist.all_reduce(tensor)
        part.tokens = total

    def solve(
        self,
        jobs: Sequence[tuple[Format, tuple[int, int], float]],
        solve: Callable[[int], Solution],
    ) -> list[Solution]:
        """Solve each job on one rank, the dearest first to whoever has least to do; all get all.

        Args:
            jobs: format, shape and cost of each.
            solve: called with the numbers of this rank's jobs.
        """
        if self.size == 1:
            return [solve(number) for number in range(len(jobs))]
        owners, load = [0] * len(jobs), [0.0] * self.size
        for number in sorted(range(len(jobs)), key=lambda n: -jobs[n][2]):
            owners[number] = load.index(min(load))
            load[owners[number]] += jobs[number][2]
        mine = {number: solve(number) for number, owner in enumerate(owners) if owner == self.rank}
        with self._meeting():
            return [
                self._spread(mine.get(number), owner, *jobs[number][:2])
                for number, owner in enumerate(owners)
            ]

    def _spread(self, solution: Solution | None, owner: int, fmt: Format, shape: tuple[int, int]) -> Solution:
        box: list[Any] = [None if solution is None else (solution.report, solution.bias_shift is not None)]
        dist.broadcast_object_list(box, src=owner, device=self._wire())
        report, has_shift = box[0]
        if solution is None:
            packed = [
                torch.empty(tuple(size), dtype=getattr(torch, name), device=self._device)
                for _, name, size in fmt.buffers(shape)
            ]
            shift = torch.empty(shape[0], device=self._device) if has_shift else None
            solution = Solution(packed, report, shift)
        for tensor in [*solution.packed, solution.bias_shift]:
            if tensor is not None:
                self._broadcast(tensor, owner)
        return solution

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        raw = tensor if tensor.is_contiguous() else tensor.contiguous()
        flat = raw.view(-1).view(torch.uint8)  # int16 travels by no backend
        dist.broadcast(flat, src=owner)
        if raw is not tensor:
            tensor.copy_(raw)

    def _wire(self) -> torch.device:
        return self._device if dist.get_backend() == "nccl" else torch.device("cpu")


def is_first() -> bool:
    """Whether this is rank 0, or alone: the one that shows how far all are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _started_by_torchrun() or os.environ["RANK"] == "0"


def _started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(
        os.environ
    )
