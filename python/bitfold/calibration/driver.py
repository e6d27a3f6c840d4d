"""Folding a model block by block on calibration data: how one block goes through is `_Walk.fold_stage`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import methods
from bitfold.calibration import fingerprint, memory
from bitfold.calibration.batches import Batch
from bitfold.calibration.blocks import Stage
from bitfold.calibration.checkpoint import Checkpoint, directory_for
from bitfold.calibration.distributed import Processes
from bitfold.calibration.gathering import gather
from bitfold.calibration.guards import FloatView, frozen, seeded
from bitfold.calibration.preparing import CHANGED, Undo, prepare, restore
from bitfold.calibration.refining import refine_block
from bitfold.calibration.replay import device_of
from bitfold.calibration.report import CalibrationWarning, Log, Report, peak_rss_bytes, remember
from bitfold.calibration.sets import MatrixSet, find_sets
from bitfold.calibration.settings import Settings
from bitfold.calibration.solving import FALLBACK, float_matrix, fold_alone, solve_set
from bitfold.calibration.statistics import InputStatistics
from bitfold.calibration.streams import Stream
from bitfold.calibration.survey import predict_memory, survey
from bitfold.choosing import Fold, matrix_shape
from bitfold.errors import WeightError
from bitfold.manifest import PACKED_KINDS, bias_owner
from bitfold.methods import Solution
from bitfold.nn._places import Places
from bitfold.quantizing import swaps_of

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    folds: list[Fold],
    data_free: list[Fold],
    method_of: Callable[[str], str | None],
    batches: list[Batch],
    *,
    options: Mapping[str, Any],
    settings: Settings,
    checkpoint: str | os.PathLike[str] | bool | None,
    log: str | os.PathLike[str] | None,
    bar: Any,
) -> None:
    """Fold `folds` of `model` in place with calibrated methods.

    Args:
        model: changed in place.
        folds: matrices of calibrated methods. They too are listed that are folded already, where an
            interrupted run goes on. Emptied, so that each float matrix is released as soon as it is folded.
        data_free: all others, such as embeddings; they are folded first. Emptied too.
        method_of: name of a matrix -> name of its method, None for the format's own.
        batches: all data, the same in every process.
        options: for the methods.
        settings: of calibration.
        checkpoint: directory, None for the default one, False for none.
        log: file for a JSON line per matrix.
        bar: a tqdm bar to be advanced by one per matrix, or None.
    """
    processes = Processes(device_of(model))
    try:
        with frozen(model):
            walk = _Walk(model, folds, data_free, method_of, batches, options, settings, processes)
            walk.log, walk.bar = Log(log if processes.rank == 0 else None, walk.report), bar
            store = walk.open(checkpoint, batches)
            walk.go(store)
        if store is not None and processes.everywhere(True) and processes.rank == 0:
            store.remove()
    finally:
        processes.close()


class _Walk:
    """One walk through a model."""

    log: Log
    bar: Any

    def __init__(
        self,
        model: nn.Module,
        folds: list[Fold],
        data_free: list[Fold],
        method_of: Callable[[str], str | None],
        batches: list[Batch],
        options: Mapping[str, Any],
        settings: Settings,
        processes: Processes,
    ) -> None:
        self.model, self.options, self.processes = model, options, processes
        self.batches = processes.share(batches)
        every = [*folds, *data_free]
        self.method_of = {f.owner.name: method_of(f.owner.name) or f.format.default_method for f in every}
        self.plan = {f.owner.name: f"{f.format} {self.method_of[f.owner.name]}" for f in every}
        self.settings = self._complete(settings)
        self.data_free = data_free
        data_free[:] = [fold for fold in data_free if not fold.done]
        self.todo = {fold.owner.name: fold for fold in folds if not fold.done}
        self.places, self.floats = Places(model), FloatView()
        names = [fold.owner.name for fold in folds]
        del every
        folds.clear()
        found = survey(model, names, self.batches, processes)
        self.stages = found.layout.stages
        self.stream = Stream(model, found.layout.stacks, len(self.batches), found.keep_all)
        self.float_stream = self.stream.another() if self.settings.float_stream else None
        prediction = predict_memory(model, found, self.todo, self.batches[0], self.settings)
        memory.check(prediction, settings.max_memory)
        self.report = Report(notes=found.notes, predicted_bytes=prediction.peak)
        remember(model, self.report)
        self.originals: dict[str, Fold] = {}  # of the stage in work, where a method refines it
        self.undo = Undo()  # of the stage in work
        self.known: list[Any] = []  # what preparations of earlier blocks leave for later ones
        self.thinnest: tuple[float, str] | None = None  # tokens per input of the matrix that saw fewest

    def open(
        self, checkpoint: str | os.PathLike[str] | bool | None, batches: list[Batch]
    ) -> Checkpoint | None:
        """The checkpoint directory, or None where none is wanted."""
        if checkpoint is False:
            return None
        from bitfold import __version__

        settings = {**vars(self.settings), **self.options}
        del settings["max_memory"]  # no word on the result
        made = {
            "model": self._digests(),
            "calibration": fingerprint.of_batches(batches),
            "plan": self.plan,
            "options": {name: repr(value) for name, value in settings.items()},
            "processes": self.processes.size,
            "versions": {"bitfold": __version__, "torch": torch.__version__},
        }
        made = self.processes.agree(made)
        directory = (
            directory_for(self.model, made) if checkpoint is None or checkpoint is True else checkpoint
        )
        return self.processes.one_by_one(lambda: Checkpoint(directory, made, self.processes.rank))

    def go(self, store: Checkpoint | None) -> None:
        """All stages, from where the checkpoint is."""
        try:
            self._go(store)
        except BaseException:  # what is half folded is not in the checkpoint, and could not be gone on with
            self.floats.restore()
            self.undo.restore()
            raise
        self._warn()

    def _go(self, store: Checkpoint | None) -> None:
        self._fold_data_free()
        start = 0 if store is None else self.processes.agree(store.finished())
        if store is not None and start:
            self._go_on(store, start)
        for number, stage in enumerate(self.stages[start:], start):
            self._finish_stage(number, stage, store)
            self._forget_floats()
        for name in list(self.todo):
            line = {"method": FALLBACK, "tokens": 0, "fallback": "the data does not reach it"}
            self._put(name, fold_alone(self.todo[name], FALLBACK, line))

    def _forget_floats(self) -> None:
        """Release what was there before the stage that is finished."""
        self.undo = Undo()
        self.floats.forget()
        self.originals.clear()

    def _finish_stage(self, number: int, stage: Stage, store: Checkpoint | None) -> None:
        first = len(self.report.lines)
        solutions, changed = self.fold_stage(stage)
        self._advance_float(stage)
        self._refine(stage, solutions)
        self._advance(stage)
        lines = self.report.lines[first:]
        if store is not None:
            store.save_streams(number, self._streams())
            if self.processes.everywhere(True) and self.processes.rank == 0:
                store.save(number, solutions, lines, changed)
            if self.processes.everywhere(True) and number:
                store.forget_streams(number - 1)
        CHANGED.setdefault(self.model, set()).update(changed)

    def _digests(self) -> dict[str, str]:
        changed = CHANGED.get(self.model, set())
        return {name: of for name, of in fingerprint.of_model(self.model).items() if name not in changed}

    def fold_stage(self, stage: Stage) -> tuple[dict[str, Solution], dict[str, Tensor]]:
        """Gather, solve and put in place the matrices of one block, set after set.

        Returns the solutions, and other parameters that have changed.
        """
        solutions: dict[str, Solution] = {}
        sets = self._sets(stage)
        remarks, changed = self._prepare(stage, sets)
        for matrices in sets:
            gathered = self._gather(matrices)
            self._note_thin_data(matrices, gathered)
            solved = solve_set(
                matrices,
                gathered,
                self.todo,
                self.method_of,
                self.options,
                self.settings,
                self.processes,
                [name for group in matrices.groups for name in group if self._has_bias(name)],
            )
            for name, solution in solved.items():
                solution.report |= remarks.get(name, {})
                self._put(name, solution)
            solutions |= solved
        return solutions, changed

    def _gather(self, matrices: MatrixSet) -> list[InputStatistics]:
        gathered = gather(
            self.model,
            matrices,
            self.batches,
            self.stream,
            self.settings,
            self.float_stream,
            self.floats.view,
        )
        self.processes.reduce(gathered)
        return gathered

    def _prepare(
        self, stage: Stage, sets: list[MatrixSet]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
        """What the method does to the block as a whole, if it does and all of it is float."""
        whole = stage.block if stage.block is not None else "" if len(self.stages) == 1 else None
        wanted = any(methods.preparation(self.method_of[name]) for name in stage.matrices)
        if not wanted or whole is None or not sets or any(name not in self.todo for name in stage.matrices):
            return {}, {}
        self.undo.keep_values(self.model.get_submodule(whole))
        return prepare(
            self.model,
            whole,
            sets,
            self._gather,
            self.todo,
            self.method_of,
            self.batches[0],
            self.stream.stubs(0),
            self.known,
            self.processes,
        )

    def _sets(self, stage: Stage) -> list[MatrixSet]:
        names = [name for name in stage.matrices if name in self.todo]
        if not names:
            return []
        sets = find_sets(self.model, stage, self.batches[0], self.stream.stubs(0), names)
        if not self.settings.true_sequential:
            sets = [MatrixSet.joined(sets)]
        return self.processes.agree(sets)

    def _advance(self, stage: Stage) -> None:
        """Run the block, now folded, for what it feeds to the next."""
        if stage.block is not None:
            self.stream.advance(stage.block, self.batches)

    def _advance_float(self, stage: Stage) -> None:
        """Run the block as it was."""
        if stage.block is not None and self.float_stream is not None:
            with self.floats.view():
                self.float_stream.advance(stage.block, self.batches)

    def _refine(self, stage: Stage, solutions: dict[str, Solution]) -> None:
        """What the method does to the folded block as a whole; `solutions` become what was found."""
        refining = {method for name in solutions if methods.refinement(method := self.method_of[name])}
        if not refining or stage.block is None or self.float_stream is None:
            return
        refinement = methods.refinement(min(refining))
        assert refinement is not None
        floats = {name: float_matrix(fold) for name, fold in self.originals.items()}
        streams = self.stream, self.float_stream
        with seeded(self.settings.seed, stage.block):
            found, line = refine_block(
                self.model, stage.block, floats, self.batches, *streams, refinement, self.options
            )
        for name, solution in found.items():
            before = solutions[name].bias_shift
            if solution.bias_shift is not None and before is not None:
                solution.bias_shift = solution.bias_shift + before
            packed: Any = self.model.get_submodule(name)
            # From the float bias, in one step: the same bits as where an interrupted run goes on.
            packed.take(solution, self.originals[name].owner.module.bias)
            solutions[name] = solution
        self.log.add({"name": stage.block, "method": min(refining), **line})

    def _has_bias(self, name: str) -> bool:
        """Whether the matrix has a bias that no other module adds."""
        module = self.todo[name].owner.module
        return getattr(module, "bias", None) is not None and bias_owner(self.model, module) is None

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

    def _put(self, name: str, solution: Solution, quiet: bool = False) -> None:
        """Swap the packed module in, and record its line."""
        fold = self.todo.pop(name)
        owner, shape = fold.owner, matrix_shape(fold.owner)
        if methods.refinement(self.method_of[name]) is not None:
            self.originals[name] = fold
        if solution.bias_shift is not None and bias_owner(self.model, owner.module) is not None:
            solution = Solution(solution.packed, solution.report)  # another module adds this bias too
        try:
            packed = PACKED_KINDS[owner.kind].from_float(owner.module, fold.format, solution=solution)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error  # noqa: EM102
        swaps = swaps_of(self.model, fold, packed)
        if self.float_stream is not None:
            self.floats.remember(self.places, swaps)
        self.undo.remember(self.places, swaps)
        self.places.replace(swaps)
        if not quiet:
            line = {"name": name, "shape": list(shape), "format": str(fold.format), **solution.report}
            self.log.add({**line, "peak_rss_bytes": peak_rss_bytes()})
        if self.bar is not None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update()

    def _fold_data_free(self) -> None:
        while self.data_free:
            fold = self.data_free.pop(0)
            name = fold.owner.name
            self.todo[name] = fold
            self._put(name, fold_alone(fold, self.method_of[name], {"method": self.method_of[name]}))
        self.floats.keep()
        self.undo = Undo()

    def _go_on(self, store: Checkpoint, start: int) -> None:
        """Put the packed matrices of finished stages in place, and get the streams back."""
        loaded = self.processes.everywhere(store.load_streams(start - 1, self._streams()))
        if not loaded:
            self.stream = self.stream.another()
            self.float_stream = self.stream.another() if self.float_stream is not None else None
        device = device_of(self.model)
        for number, stage in enumerate(self.stages[:start]):
            solutions, lines, changed = store.load(number)
            restore(self.model, {name: value.to(device) for name, value in changed.items()})
            for line in lines:
                self.log.add(line)
            for name, solution in solutions.items():
                if name in self.todo:  # not folded before the interrupt, in this process
                    packed = [tensor.to(device) for tensor in solution.packed]
                    self._put(name, Solution(packed, {}, solution.bias_shift), quiet=True)
            if not loaded:
                self._advance_float(stage)
                self._advance(stage)
            self._forget_floats()
            CHANGED.setdefault(self.model, set()).update(changed)
        self.report.notes.append(f"went on after {start} of {len(self.stages)} stages")

    def _streams(self) -> dict[str, Stream]:
        found = {"folded": self.stream}
        if self.float_stream is not None:
            found["float"] = self.float_stream
        return found

    def _note_thin_data(self, matrices: MatrixSet, gathered: list[InputStatistics]) -> None:
        for group, part in zip(matrices.groups, gathered, strict=True):
            depth = part.tokens / part.size
            if depth < 4 and (self.thinnest is None or depth < self.thinnest[0]):
                rank = f"effective rank {part.effective_rank():.1f}"
                self.thinnest = (depth, f"{group[0]} saw {part.tokens} for {part.size} inputs, {rank}")

    def _warn(self) -> None:
        bad = {line["name"]: line["dropped_rows"] for line in self.report.lines if line.get("dropped_rows")}
        if bad:
            shown = ", ".join(f"{name} ({count} rows)" for name, count in list(bad.items())[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            text = f"activations that are not finite were left out at the inputs of {shown}{more}"
            warnings.warn(text, CalibrationWarning, stacklevel=5)
        if self.thinnest is not None:
            text = (
                f"little calibration data: {self.thinnest[1]}; at least four tokens per input are wanted, "
                "give more or longer sequences"
            )
            warnings.warn(text, CalibrationWarning, stacklevel=5)
