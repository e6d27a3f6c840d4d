"""Folding a model block by block on calibration data: how one block goes through is `Walk.fold_stage`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import methods
from bitfold.calibration import memory
from bitfold.calibration.batches import as_batches
from bitfold.calibration.blocks import Stage
from bitfold.calibration.checkpoint import Checkpoint, Finished
from bitfold.calibration.distributed import Processes
from bitfold.calibration.gathering import gather
from bitfold.calibration.guards import frozen, refuse_inference_tensors
from bitfold.calibration.placing import Placing
from bitfold.calibration.preparing import CHANGED, Prepared, prepare
from bitfold.calibration.refining import refine_stage
from bitfold.calibration.report import Log, Report, remember
from bitfold.calibration.resuming import checkpoint_of, go_on
from bitfold.calibration.sets import MatrixSet, find_sets
from bitfold.calibration.settings import Settings
from bitfold.calibration.solving import FALLBACK, solve_set
from bitfold.calibration.statistics import InputStatistics
from bitfold.calibration.streams import Stream, Streams
from bitfold.calibration.survey import predict_memory, survey
from bitfold.choosing import Fold
from bitfold.methods import Solution
from bitfold.outputs import Batch, device_of
from bitfold.progress import Advance

__all__ = ["Job", "calibrate"]


@dataclass
class Job:
    """What is to be folded, with what, and where to tell of it.

    Args:
        model: changed in place.
        folds: matrices of calibrated methods. They too are listed that are folded already, where an
            interrupted run goes on. Emptied, so that each float matrix is released as soon as it is folded.
        data_free: all others, such as embeddings; they are folded first. Emptied too.
        method_of: name of a matrix -> name of its method, None for the format's own.
        calibration: all data, the same in every process, as `as_batches` takes it.
        tokenizer: for texts.
        options: for the methods.
        settings: of calibration.
        checkpoint: directory, None for the default one, False for none.
        log: file for a JSON line per matrix.
        advance: called with the name of each matrix that is done.
    """

    model: nn.Module
    folds: list[Fold]
    data_free: list[Fold]
    method_of: Callable[[str], str | None]
    calibration: Any
    tokenizer: Any
    options: Mapping[str, Any]
    settings: Settings
    checkpoint: str | os.PathLike[str] | bool | None
    log: str | os.PathLike[str] | None
    advance: Advance


def calibrate(job: Job) -> None:
    """Fold the matrices of `job` in place. All processes of a group call this; if one fails, all do."""
    # Inference tensors know no versions, and cannot be trained through.
    with torch.inference_mode(False):
        _calibrate(job)


def _calibrate(job: Job) -> None:
    refuse_inference_tensors(job.model)
    processes = Processes(device_of(job.model))
    with processes.together(), frozen(job.model):
        batches = as_batches(job.calibration, job.model, job.tokenizer, job.settings)
        walk = Walk(job, processes.share(batches), processes)
        with checkpoint_of(walk, job, batches) as store:
            walk.go(store)
            if store is not None and processes.everywhere(True) and processes.rank == 0:
                store.remove()


class Walk:
    """One walk through a model, on this rank's share of the data."""

    def __init__(self, job: Job, batches: list[Batch], processes: Processes) -> None:
        self.model, self.options = job.model, job.options
        self.batches, self.processes = batches, processes
        every = [*job.folds, *job.data_free]
        self.method_of = {
            fold.owner.name: job.method_of(fold.owner.name) or fold.format.default_method for fold in every
        }
        self.plan = {fold.owner.name: f"{fold.format} {self.method_of[fold.owner.name]}" for fold in every}
        self.settings = self._complete(job.settings)
        both = bool(self.settings.float_stream)
        self._data_free = [fold for fold in job.data_free if not fold.done]
        todo = {fold.owner.name: fold for fold in job.folds if not fold.done}
        names = [fold.owner.name for fold in job.folds]
        for folds in (every, job.folds, job.data_free):
            folds.clear()
        found = survey(self.model, names, batches, processes)
        self.stages = found.layout.stages
        self.streams = Streams(Stream(self.model, found.layout.stacks, len(batches), found.keep_all), both)
        prediction = predict_memory(
            self.model, found, todo, self._data_free, self.method_of, batches[0], self.settings
        )
        memory.check(prediction, self.settings.max_memory)
        self.report = Report(notes=found.notes, predicted_bytes=prediction.peak)
        remember(self.model, self.report)
        log = Log(job.log if processes.rank == 0 else None, self.report)
        self.placing = Placing(self.model, todo, self.method_of, log, job.advance, both)
        self.known: list[Any] = []  # what preparations of earlier blocks leave for later ones

    def go(self, store: Checkpoint | None) -> None:
        """All stages, from where the checkpoint is."""
        try:
            self.placing.fold_data_free(self._data_free)
            start = 0 if store is None else go_on(self, store)
            for number, stage in enumerate(self.stages[start:], start):
                self._fold_and_store(number, stage, store)
                self.placing.finish_stage()
            for name in list(self.placing.todo):
                self.placing.put_alone(name, FALLBACK, tokens=0, fallback="the data does not reach it")
            self.placing.record_refined({})
        except BaseException:  # what is half folded is not in the checkpoint, and could not be gone on with
            self.placing.originals.restore()
            raise
        self.report.warn()

    def _fold_and_store(self, number: int, stage: Stage, store: Checkpoint | None) -> None:
        first, known = len(self.report.lines), len(self.known)
        solutions, changed = self.fold_stage(stage)
        self.advance_float(stage)
        refine_stage(
            self.model,
            stage,
            self.placing,
            solutions,
            self.method_of,
            self.batches,
            self.streams,
            self.options,
            self.settings.seed,
        )
        self.advance(stage)
        lines = self.report.lines[first:]
        if store is not None:
            store.save_streams(number, self.streams.by_name())
            if self.processes.everywhere(True) and self.processes.rank == 0:
                store.save(number, Finished(solutions, lines, changed, self.known[known:]))
            if self.processes.everywhere(True) and number:
                store.forget_streams(number - 1)
        CHANGED.setdefault(self.model, set()).update(changed)

    def fold_stage(self, stage: Stage) -> tuple[dict[str, Solution], dict[str, Tensor]]:
        """Gather, solve and put in place the matrices of one block, set after set.

        Returns the solutions, and other parameters that have changed.
        """
        solutions: dict[str, Solution] = {}
        sets = self._sets(stage)
        prepared = self._prepare(stage, sets)
        for matrices in sets:
            solved = solve_set(
                matrices,
                self._gather(matrices),
                self.placing.todo,
                self.method_of,
                self.options,
                self.settings,
                self.processes,
                [name for group in matrices.groups for name in group if self.placing.has_bias(name)],
            )
            for name, solution in solved.items():
                solution.report |= prepared.lines.get(name, {})
                self.placing.put(name, solution)
            solutions |= solved
        return solutions, prepared.changed

    def _sets(self, stage: Stage) -> list[MatrixSet]:
        names = [name for name in stage.matrices if name in self.placing.todo]
        if not names:
            return []
        sets = find_sets(self.model, stage, self.batches[0], self.streams.folded.stubs(0), names)
        if not self.settings.true_sequential:
            sets = [MatrixSet.joined(sets)]
        return self.processes.agree(sets)

    def _gather(self, matrices: MatrixSet) -> list[InputStatistics]:
        gathered = gather(
            self.model,
            matrices,
            self.batches,
            self.streams.folded,
            self.streams.floats,
            self.placing.originals.view,
        )
        self.processes.reduce(gathered)
        return gathered

    def _prepare(self, stage: Stage, sets: list[MatrixSet]) -> Prepared:
        """What the method does to the block as a whole, if it does and all of it is float."""
        wanted = [name for name in stage.matrices if methods.preparation(self.method_of[name]) is not None]
        block = stage.block if stage.block is not None else "" if len(self.stages) == 1 else None
        if not wanted or not sets:
            return Prepared()
        if block is None:
            return Prepared.nothing(wanted, "it is in no block")
        if any(name not in self.placing.todo for name in stage.matrices):
            return Prepared.nothing(wanted, "some of its block was folded before")
        self.placing.originals.keep_values(self.model.get_submodule(block))
        prepared = prepare(
            self.model,
            block,
            sets,
            self._gather,
            self.placing.todo,
            self.method_of,
            self.batches[0],
            self.streams.folded,
            self.known,
            self.processes,
        )
        fresh = [note for note in prepared.notes if not any(old.endswith(note) for old in self.report.notes)]
        self.report.notes += [f"{stage.name} and blocks like it: {note}" for note in fresh]
        return prepared

    def advance(self, stage: Stage) -> None:
        """Run the block, now folded, for what it feeds to the next."""
        if stage.block is not None:
            self.streams.folded.advance(stage.block, self.batches)

    def advance_float(self, stage: Stage) -> None:
        """Run the block as it was."""
        if stage.block is not None and self.streams.floats is not None:
            with self.placing.originals.view():
                self.streams.floats.advance(stage.block, self.batches)

    def _complete(self, settings: Settings) -> Settings:
        """`settings` with what they leave to the methods."""
        names = set(self.method_of.values())
        refined = sorted(name for name in names if methods.refinement(name) is not None)
        if refined and self.processes.size > 1:
            msg = f"method {refined[0]!r} trains blocks in one process; run it without torchrun"
            raise ValueError(msg)
        if refined and settings.float_stream is False:
            msg = f"method {refined[0]!r} learns from the float model; Settings.float_stream cannot be False"
            raise ValueError(msg)
        wanted = settings.float_stream
        if wanted is None:
            wanted = any(methods.wants_float_stream(name) for name in names)
        return replace(settings, float_stream=wanted)
