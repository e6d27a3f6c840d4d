"""Going on where an earlier run stopped: whether it is the same run, and how its state comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from bitfold import methods
from bitfold.calibration import fingerprint
from bitfold.calibration.checkpoint import Checkpoint, CheckpointError
from bitfold.calibration.directories import directory_for, remove_abandoned
from bitfold.calibration.preparing import CHANGED, restore
from bitfold.calibration.report import CalibrationWarning
from bitfold.methods import Solution
from bitfold.outputs import Batch, device_of

if TYPE_CHECKING:
    from bitfold.calibration.driver import Job, Walk


@contextmanager
def checkpoint_of(walk: Walk, job: Job, batches: list[Batch]) -> Iterator[Checkpoint | None]:
    """The checkpoint of this run, new or not; None where none is wanted. `batches` are those of all ranks."""
    where = job.checkpoint
    if where is False:
        yield None
        return
    from bitfold import __version__

    settings = {**vars(walk.settings), **job.options}
    del settings["max_memory"]  # no word on the result
    changed = CHANGED.get(walk.model, set())
    digests = fingerprint.of_model(walk.model)
    mine: dict[str, Any] = {
        "model": {name: digest for name, digest in digests.items() if name not in changed},
        "calibration": fingerprint.of_batches(batches),
        "plan": walk.plan,
        "options": {name: repr(value) for name, value in settings.items()},
        "processes": walk.processes.size,
        "versions": {"bitfold": __version__, "torch": torch.__version__},
    }
    made = walk.processes.agree(mine)
    other = fingerprint.differences(made, mine)
    if other:
        msg = f"process {walk.processes.rank} differs from process 0 in {'; '.join(other)}; give all the same"
        raise ValueError(msg)

    with ExitStack() as stack:

        def make() -> Checkpoint:
            directory = where
            if directory is None or directory is True:
                directory = directory_for(walk.model, made)
                if walk.processes.rank == 0:
                    remove_abandoned(directory.parent, but=directory)
            store = Checkpoint(directory, made, walk.processes.rank)
            stack.callback(store.close)  # also where another process fails at this
            return store

        yield walk.processes.one_by_one(make)


def go_on(walk: Walk, store: Checkpoint) -> int:
    """Put the packed matrices of finished stages in place and get the streams back; how many those are.

    Without its file a stream is made again by running the finished blocks, if they are what they were.
    """
    start = walk.processes.agree(store.finished())
    if not start:
        return 0
    stages, device = walk.stages[:start], device_of(walk.model)
    loaded = walk.processes.everywhere(store.load_streams(start - 1, walk.streams.by_name()))
    if not loaded:
        walk.streams.restart()
        if not _can_run_again(walk, store, start):
            return 0
    for number, stage in enumerate(stages):
        found = store.load(number)
        restore(walk.model, {name: value.to(device) for name, value in found.changed.items()})
        for line in found.lines:
            walk.placing.log.add(line)
        for name, solution in found.solutions.items():
            if name in walk.placing.todo:  # not folded before the interrupt, in this process
                packed = [tensor.to(device) for tensor in solution.packed]
                walk.placing.put(name, Solution(packed, {}, solution.bias_shift), quiet=True)
        if not loaded:
            walk.advance_float(stage)
            walk.advance(stage)
        walk.placing.finish_stage()
        CHANGED.setdefault(walk.model, set()).update(found.changed)
        walk.known += found.known
    walk.report.notes.append(f"went on after {start} of {len(walk.stages)} stages")
    return start


def _can_run_again(walk: Walk, store: Checkpoint, start: int) -> bool:
    """Whether finished blocks can be run again for what they fed; if not, the checkpoint starts over.

    The folded blocks are all there. The float ones are not where they were folded by this process, and not as
    they were where a method had changed their weights before folding (to the same function, not the same
    bits; and what surrounds the matrices is as it is for the changed ones).
    """
    if walk.streams.floats is None:
        return True
    names = [name for stage in walk.stages[:start] for name in stage.matrices]
    lost = f"{store.path}: the outputs of finished blocks (stream-{start - 1:04}) are lost or damaged"
    if any(name not in walk.placing.todo for name in names):
        msg = f"{lost}, and the float blocks to make them with are folded; load the model and call again"
        raise CheckpointError(msg)
    if not any(methods.preparation(walk.method_of[name]) for name in names):
        return True
    text = f"{lost}; after {walk.method_of[names[0]]!r} they cannot be made again, so the run starts over"
    warnings.warn(text, CalibrationWarning, stacklevel=6)
    if walk.processes.rank == 0:
        store.start_over()
    walk.processes.everywhere(True)
    walk.report.notes.append(f"started over: the outputs of {start} finished stages were lost")
    return False
