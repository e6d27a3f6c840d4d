"""Folding a model block by block on calibration data: how one block goes through is `_Run.fold_stage`."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import methods
from bitfold.calibration import fingerprint, memory
from bitfold.calibration.batches import Batch
from bitfold.calibration.blocks import Layout, Stage, arrange, find_layout
from bitfold.calibration.checkpoint import Checkpoint, default_directory
from bitfold.calibration.distributed import Processes
from bitfold.calibration.gathering import gather, in_features
from bitfold.calibration.replay import device_of, run
from bitfold.calibration.report import CalibrationWarning, Log, Report, peak_rss_bytes, remember
from bitfold.calibration.sets import MatrixSet, find_sets
from bitfold.calibration.settings import Settings
from bitfold.calibration.statistics import InputStatistics, mean_of
from bitfold.calibration.streams import Stream, needs_all_outputs
from bitfold.choosing import Fold
from bitfold.errors import WeightError
from bitfold.manifest import PACKED_KINDS, bias_owner
from bitfold.methods import Solution
from bitfold.nn._places import Places
from bitfold.quantizing import swaps_of

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    folds: Sequence[Fold],
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
        folds: Linear and Conv1D matrices, also those that are folded already (a run that goes on).
        data_free: matrices whose methods need no data, such as embeddings; they are folded first. Emptied.
        method_of: name of a matrix -> name of its method, None for the format's own.
        batches: all data, the same in every process.
        options: for the methods.
        settings: of calibration.
        checkpoint: directory, None for the default one, False for none.
        log: file for a JSON line per matrix.
        bar: a tqdm bar to be advanced by one per matrix, or None.
    """
    report = Report()
    remember(model, report)
    processes = Processes(device_of(model))
    try:
        with _frozen(model):
            run_ = _Run(model, folds, data_free, method_of, batches, options, settings, processes, log, bar, report)
            store = run_.open(checkpoint)
            run_.check_memory()
            run_.go(store)
        if store is not None and processes.everywhere(True) and processes.rank == 0:
            store.remove()
    finally:
        processes.close()


class _Run:
    """One walk through the model."""

    def __init__(
        self,
        model: nn.Module,
        folds: Sequence[Fold],
        data_free: list[Fold],
        method_of: Callable[[str], str | None],
        batches: list[Batch],
        options: Mapping[str, Any],
        settings: Settings,
        processes: Processes,
        log: str | os.PathLike[str] | None,
        bar: Any,
        report: Report,
    ) -> None:
        self.model, self.settings, self.processes = model, settings, processes
        self.options, self.method_of, self.bar, self.report = dict(options), method_of, bar, report
        self.all_batches, self.batches = batches, processes.share(batches)
        self.data_free = data_free
        self.names = [fold.owner.name for fold in folds]
        self.plan = {
            fold.owner.name: f"{fold.format} {method_of(fold.owner.name) or fold.format.default_method}"
            for fold in [*folds, *data_free]
        }
        self.todo = {fold.owner.name: fold for fold in folds if not fold.done}
        self.places = Places(model)
        self.log = Log(log if processes.rank == 0 else None, report)
        self.floats = _FloatView()
        self.layout, self.activations, self.stream_bytes = self._look()
        self.keep_all = False
        self.layout = self._check_replay()
        self.stream = self._new_stream()
        self.float_stream = self._new_stream() if settings.float_stream else None
        self.thinnest: tuple[float, str] | None = None  # tokens per input of the matrix that saw fewest

    # --- before anything changes

    def _look(self) -> tuple[Layout, int, dict[str, int]]:
        """The layout of the model, the same on all ranks; bytes of one pass, and of all outputs per block."""
        layout = self.processes.agree(find_layout(self.model, self.names, self.batches[0]))
        sizes = [memory.tensor_bytes(batch.tensors()) for batch in self.batches]
        share = sum(sizes) / max(max(sizes), 1)  # of all data, in largest batches
        outputs: dict[str, int] = {}

        def weigh(name: str, output: Any) -> None:
            outputs[name] = int(memory.tensor_bytes(output) * share)

        blocks = [block for stack in layout.stacks for block in stack.blocks]
        hooks = {name: (lambda output, name=name: weigh(name, output)) for name in blocks}
        with memory.LiveBytes() as live:
            run(self.model, self.batches[sizes.index(max(sizes))], after=hooks)
        return layout, live.peak, outputs

    def _check_replay(self) -> Layout:
        answer = self.processes.agree(needs_all_outputs(self.model, self.layout, self.batches[0]))
        if answer is None:
            self.report.notes.append(
                "the inputs of blocks could not be replayed; the whole model was taken as one block"
            )
            return self.processes.agree(arrange(self.model, [], self.names, self.batches[0]))
        if answer:
            self.report.notes.append("blocks read outputs of earlier blocks: the outputs of all were kept")
        self.keep_all = answer
        return self.layout

    def _new_stream(self) -> Stream:
        return Stream(self.model, self.layout.stacks, len(self.batches), self.keep_all)

    def open(self, checkpoint: str | os.PathLike[str] | bool | None) -> Checkpoint | None:
        """The checkpoint directory, or None where none is wanted."""
        if checkpoint is False:
            return None
        from bitfold import __version__

        made = {
            "model": fingerprint.of_model(self.model),
            "calibration": fingerprint.of_batches(self.all_batches),
            "plan": self.plan,
            "options": {k: repr(v) for k, v in {**vars(self.settings), **self.options}.items()},
            "processes": self.processes.size,
            "versions": {"bitfold": __version__, "torch": torch.__version__},
        }
        made = self.processes.agree(made)
        directory = default_directory(made) if checkpoint in (None, True) else checkpoint
        if self.processes.rank == 0:
            Checkpoint(directory, made)
        self.processes.everywhere(True)
        return Checkpoint(directory, made, self.processes.rank)  # type: ignore[arg-type]

    def check_memory(self) -> None:
        """Refuse what will not fit."""
        cross = self.settings.float_stream
        costs = []
        for stage in self.layout.stages:
            names = [name for name in stage.matrices if name in self.todo]
            if not names:
                continue
            shapes = {name: self._shape(name) for name in names}
            sets = find_sets(self.model, stage, self.batches[0], {}, names) if len(costs) < 1 else []
            hessians = _largest_set(sets, shapes, cross) or (costs[-1].hessians if costs else 0)
            costs.append(
                memory.StageCost(
                    hessians=max(hessians, max(memory.hessian_bytes(k, cross) for _, k in shapes.values())),
                    solver=max(memory.solver_bytes(shape) for shape in shapes.values()),
                    freed=sum(self._weight(name).numel() * self._weight(name).itemsize for name in names),
                    packed=sum(self.todo[name].format.nbytes(shapes[name]) for name in names),
                )
            )
        prediction = memory.predict(self._predicted_streams(), self.activations, costs)
        self.report.predicted_bytes = prediction.peak
        memory.check(prediction, self.settings.max_memory)

    def _predicted_streams(self) -> int:
        kept = 0
        for stack in self.layout.stacks:
            sizes = [self.stream_bytes.get(name, 0) for name in stack.blocks]
            kept += sum(sizes) if self.keep_all else max(sizes)
        return kept * (2 if self.settings.float_stream else 1)

    # --- the walk

    def go(self, store: Checkpoint | None) -> None:
        """All stages, from where the checkpoint is."""
        self._fold_data_free()
        start = 0 if store is None else self.processes.agree(store.finished())
        if store is not None and start:
            self._resume(store, start)
        for number, stage in enumerate(self.layout.stages[start:], start):
            solutions, lines = self.fold_stage(stage)
            self._advance(stage)
            if store is not None:
                store.save_streams(number, self._streams())
                self.processes.everywhere(True)
                if self.processes.rank == 0:
                    store.save(number, solutions, lines)
                self.processes.everywhere(True)
                if number:
                    store.forget_streams(number - 1)
            self.floats.forget()
        self._fold_the_unreached()
        self._warn_of_thin_data()

    def _fold_data_free(self) -> None:
        while self.data_free:
            fold = self.data_free.pop(0)
            name = fold.owner.name
            self.todo[name] = fold
            start = time.perf_counter()
            method = self.method_of(name) or fold.format.default_method
            solution = methods.fold_weight(self._weight(name).detach().float(), fold.format, method)
            seconds = round(time.perf_counter() - start, 4)
            solution.report = {"method": method, **solution.report, "seconds": seconds}
            self._put(name, solution)
        self.floats.keep()

    def fold_stage(self, stage: Stage) -> tuple[dict[str, Solution], list[dict[str, Any]]]:
        """Gather, solve and put in place the matrices of one block, set after set."""
        solutions: dict[str, Solution] = {}
        first_line = len(self.report.lines)
        for matrices in self._sets(stage):
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
            shares = self._blend_experts(matrices, gathered)
            for name, solution in self._solve(matrices, gathered, shares).items():
                self._put(name, solution)
                solutions[name] = solution
        return solutions, self.report.lines[first_line:]

    def _sets(self, stage: Stage) -> list[MatrixSet]:
        names = [name for name in stage.matrices if name in self.todo]
        if not names:
            return []
        sets = find_sets(self.model, stage, self.batches[0], self.stream.stubs(0), names)
        if not self.settings.true_sequential:
            groups = tuple(group for part in sets for group in part.groups)
            roles = tuple(role for part in sets for role in part.roles)
            sets = [MatrixSet(groups, roles, all(part.once for part in sets))]
        return self.processes.agree(sets)

    def _solve(
        self, matrices: MatrixSet, gathered: list[InputStatistics], shares: dict[int, float]
    ) -> dict[str, Solution]:
        jobs = [(name, i) for i, group in enumerate(matrices.groups) for name in group]
        finished = [part.finish() for part in gathered]

        def solve(number: int) -> Solution:
            name, i = jobs[number]
            fold, part = self.todo[name], gathered[i]
            line: dict[str, Any] = {"tokens": part.tokens}
            if part.dropped:
                line["dropped_rows"] = part.dropped
            if part.unmasked:
                line["padding_counted"] = True
            if i in shares:
                line["blended"] = round(shares[i], 4)
            method, options = self.method_of(name), self.options
            floor = self.settings.expert_floor if matrices.roles[i] is not None else 1
            if part.tokens < floor:
                line["fallback"] = f"{part.tokens} tokens reached it, fewer than {floor}"
                method, options = "search", {}
            start = time.perf_counter()
            weight = self._weight(name).detach().float()
            with _seeded(self.settings.seed, name):
                solution = methods.fold_weight(weight, fold.format, method, finished[i], **options)
            line |= {**solution.report, "seconds": round(time.perf_counter() - start, 4)}
            return Solution(solution.packed, {"method": method, **line}, solution.bias_shift)

        shapes = [self._shape(name) for name, _ in jobs]
        costs = [float(rows) * columns**2 + float(columns) ** 3 / 3 for rows, columns in shapes]
        formats = [self.todo[name].format for name, _ in jobs]
        solved = self.processes.solve(list(zip(formats, shapes, costs, strict=True)), solve)
        self._note_thin_data(matrices, gathered)
        return {name: solution for (name, _), solution in zip(jobs, solved, strict=True)}

    def _put(self, name: str, solution: Solution) -> None:
        """Swap the packed module in, and record the line."""
        shape = self._shape(name)
        fold = self.todo.pop(name)
        owner = fold.owner
        if solution.bias_shift is not None and bias_owner(self.model, owner.module) is not None:
            solution = Solution(solution.packed, solution.report)  # another module adds this bias too
        try:
            packed = PACKED_KINDS[owner.kind].from_float(owner.module, fold.format, solution=solution)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error  # noqa: EM102
        swaps = swaps_of(self.model, fold, packed)
        if self.float_stream is not None:
            self.floats.remember(self.places, swaps)
        self.places.replace(swaps)
        self.log.add(
            {"name": name, "shape": list(shape), "format": str(fold.format), **solution.report}
            | {"peak_rss_bytes": peak_rss_bytes()}
        )
        if self.bar is not None:
            self.bar.set_postfix_str(name, refresh=False)
            self.bar.update()

    def _advance(self, stage: Stage) -> None:
        if stage.block is None:
            return
        if self.float_stream is not None:
            with self.floats.view():
                self.float_stream.advance(stage.block, self.batches)
        self.stream.advance(stage.block, self.batches)

    def _blend_experts(self, matrices: MatrixSet, gathered: list[InputStatistics]) -> dict[int, float]:
        """Mix the mean over all experts of a role into those that few tokens reached."""
        shares: dict[int, float] = {}
        for role in {role for role in matrices.roles if role is not None}:
            members = [i for i, other in enumerate(matrices.roles) if other == role]
            few = [
                i
                for i in members
                if self.settings.expert_floor <= gathered[i].tokens < 4 * gathered[i].size
            ]
            if few and len(members) > 1:
                mean = mean_of([gathered[i] for i in members])
                for i in few:
                    prior = self.settings.expert_prior
                    shares[i] = gathered[i].blend(mean, gathered[i].size if prior is None else prior)
        return shares

    # --- going on

    def _streams(self) -> dict[str, Stream]:
        found = {"folded": self.stream}
        if self.float_stream is not None:
            found["float"] = self.float_stream
        return found

    def _resume(self, store: Checkpoint, start: int) -> None:
        """Put the packed matrices of finished stages in place, and get the streams back."""
        loaded = self.processes.everywhere(store.load_streams(start - 1, self._streams()))
        if not loaded:
            self.stream = self._new_stream()
            self.float_stream = self._new_stream() if self.float_stream is not None else None
        for number, stage in enumerate(self.layout.stages[:start]):
            solutions, lines = store.load(number)
            for line in lines:
                self.log.add(line)
            for name, solution in solutions.items():
                if name in self.todo:
                    self._put_again(name, solution)
            if not loaded:
                self._advance(stage)
            self.floats.forget()
        self.report.notes.append(f"went on after {start} of {len(self.layout.stages)} stages")

    def _put_again(self, name: str, solution: Solution) -> None:
        device = device_of(self.model)
        packed = [tensor.to(device) for tensor in solution.packed]
        log, self.log = self.log, Log(None, Report())
        self._put(name, Solution(packed, {}, solution.bias_shift))
        self.log = log

    def _fold_the_unreached(self) -> None:
        for name in list(self.todo):
            fold = self.todo[name]
            solution = methods.fold_weight(self._weight(name).detach().float(), fold.format, "search")
            solution.report = {"method": "search", "tokens": 0, "fallback": "the data does not reach it"}
            self._put(name, solution)

    # --- small things

    def _weight(self, name: str) -> Tensor:
        owner = self.todo[name].owner
        weight: Tensor = owner.module.weight
        return weight.t() if owner.kind == "conv1d" else weight

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._weight(name).shape
        return rows, columns

    def _note_thin_data(self, matrices: MatrixSet, gathered: list[InputStatistics]) -> None:
        for group, part in zip(matrices.groups, gathered, strict=True):
            depth = part.tokens / part.size
            if depth < 4 and (self.thinnest is None or depth < self.thinnest[0]):
                text = f"{group[0]} saw {part.tokens} tokens for {part.size} inputs"
                self.thinnest = (depth, f"{text}, effective rank {part.effective_rank():.1f}")

    def _warn_of_thin_data(self) -> None:
        bad = {line["name"]: line["dropped_rows"] for line in self.report.lines if line.get("dropped_rows")}
        if bad:
            shown = ", ".join(f"{name} ({count} rows)" for name, count in list(bad.items())[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            _warn(f"activations that are not finite were left out at the inputs of {shown}{more}")
        if self.thinnest is not None:
            _warn(
                f"little calibration data: {self.thinnest[1]}; at least four tokens per input are wanted, "
                "give more or longer sequences"
            )


def _largest_set(sets: list[MatrixSet], shapes: dict[str, tuple[int, int]], cross: bool) -> int:
    return max(
        (sum(memory.hessian_bytes(shapes[group[0]][1], cross) for group in part.groups) for part in sets),
        default=0,
    )


def _warn(text: str) -> None:
    warnings.warn(text, CalibrationWarning, stacklevel=2)


class _FloatView:
    """The float modules of the stage in work (and those folded without data), to be put back for a moment."""

    def __init__(self) -> None:
        self._swapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._kept = 0

    def remember(self, places: Places, swaps: Mapping[nn.Module, nn.Module]) -> None:
        for old, new in swaps.items():
            self._swapped += [(parent, attribute, old, new) for parent, attribute in places.of(old)]

    def keep(self) -> None:
        """Never forget those that are there by now: every pass runs through them."""
        self._kept = len(self._swapped)

    def forget(self) -> None:
        del self._swapped[self._kept :]

    @contextlib.contextmanager
    def view(self) -> Iterator[None]:
        for parent, attribute, old, _ in self._swapped:
            parent._modules[attribute] = old
        try:
            yield
        finally:
            for parent, attribute, _, new in self._swapped:
                parent._modules[attribute] = new


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key-value cache; all as before afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    caching = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            config.use_cache = False
            caching.append(config)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for name, module in model.named_modules():
            if name in training:
                module.training = training[name]


@contextlib.contextmanager
def _seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers that depend on nothing but the seed and the matrix."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ zlib.crc32(name.encode()))
        yield
