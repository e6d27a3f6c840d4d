"""What is found out before anything changes: layout, whether replay works, memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitfold import methods
from bitfold.calibration import memory
from bitfold.calibration.blocks import Layout, Stage, arrange, find_layout
from bitfold.calibration.distributed import Processes
from bitfold.calibration.preparing import probe_rows
from bitfold.calibration.replay import run
from bitfold.calibration.sets import MatrixSet, find_sets
from bitfold.calibration.settings import Settings
from bitfold.calibration.streams import needs_all_outputs
from bitfold.choosing import Fold
from bitfold.formats import Format
from bitfold.outputs import Batch


@dataclass
class Survey:
    """What is known of the model; the same on all ranks but for the bytes.

    Args:
        layout: stacks and stages.
        keep_all: blocks read outputs of others than the one before.
        activations: bytes of tensors alive at most during one pass.
        widest: bytes of the largest input of a matrix, as float32.
        outputs: block -> bytes of its outputs over all data of this rank.
        made: block -> bytes of all tensors that it makes in one pass.
        notes: for the report.
    """

    layout: Layout
    keep_all: bool
    activations: int
    widest: int
    outputs: dict[str, int]
    made: dict[str, int]
    notes: list[str] = field(default_factory=list)


def survey(model: nn.Module, names: Collection[str], batches: list[Batch], processes: Processes) -> Survey:
    """Look at the float `model`, of which the matrices `names` are to be folded, with a few passes."""
    layout = processes.agree(find_layout(model, names, batches[0]))
    notes: list[str] = []
    keep_all = processes.agree(needs_all_outputs(model, layout, batches[0]))
    if keep_all is None:
        notes.append("the inputs of blocks could not be replayed; the whole model was taken as one block")
        layout, keep_all = processes.agree(arrange(model, [], names, batches[0])), False
    elif keep_all:
        notes.append("blocks read outputs of earlier blocks: the outputs of all were kept")
    return Survey(layout, keep_all, *_weigh(model, layout, batches), notes)


def _weigh(
    model: nn.Module, layout: Layout, batches: list[Batch]
) -> tuple[int, int, dict[str, int], dict[str, int]]:
    """One pass over the largest batch: peak, widest input, outputs of blocks scaled up to all data, and what
    each block makes.
    """
    sizes = [memory.tensor_bytes(batch.tensors()) for batch in batches]
    share = sum(sizes) / max(*sizes, 1)
    outputs: dict[str, int] = {}
    made: dict[str, int] = {}

    def start(name: str, args: Any, kwargs: Any) -> None:
        if name in matrices:
            inputs.extend(4 * x.numel() for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        made[name] = -live.made

    def weigh(name: str, output: Any) -> None:
        made[name] += live.made
        outputs[name] = int(memory.tensor_bytes(output) * share)

    inputs = [0]
    matrices = {name for stage in layout.stages for name in stage.matrices}
    blocks = [block for stack in layout.stacks for block in stack.blocks]
    with memory.LiveBytes() as live:
        run(
            model,
            batches[sizes.index(max(sizes))],
            before={name: partial(start, name) for name in [*matrices, *blocks]},
            after={name: partial(weigh, name) for name in blocks},
        )
    return live.peak, max(inputs), outputs, {name: made[name] for name in outputs}


def predict_memory(
    model: nn.Module,
    found: Survey,
    todo: dict[str, Fold],
    data_free: Collection[Fold],
    method_of: Mapping[str, str],
    batch: Batch,
    settings: Settings,
) -> memory.Prediction:
    """The worst moment of a run over `todo`: preparing, gathering, solving one of the sets, or refining.

    The matrices of `data_free` are folded before; with the float stream their float modules are kept.
    """
    cross = bool(settings.float_stream)
    # For the cross term the float model's input is held beside the folded one's, and their difference.
    one_pass = found.activations + (2 * found.widest if cross else 0)
    moments = [memory.Prediction(work=one_pass)]
    known: dict[tuple[tuple[int, int], ...], list[list[list[int]]]] = {}
    streams: dict[str, int] = {}  # stack -> bytes kept
    packed = sum(fold.format.nbytes(fold.owner.shape) for fold in data_free)
    moments.append(memory.Prediction(packed=packed))
    freed = 0 if cross else sum(memory.tensor_bytes(fold.owner.module.weight) for fold in data_free)
    for stage in found.layout.stages:
        names = [name for name in stage.matrices if name in todo]
        shapes = [todo[name].owner.shape for name in names]
        kind = tuple(shapes)  # blocks of the same shapes have the same sets
        if names and kind not in known:
            known[kind] = _sets(model, stage, batch, names, settings)
        held = sum(streams.values()) * (2 if cross else 1)
        block = found.made.get(stage.block or "", 0)
        copies = _copies(model, found, stage, [method_of[name] for name in names])
        if copies:
            rows, few = probe_rows(batch)
            work = memory.trial_bytes(copies, block * few // rows)
            moments.append(memory.Prediction(held, 0, work, packed, freed, copies))
        before = 0  # Hessians of the set before, which are still there while a block is prepared
        for groups in known[kind] if names else []:
            members = [i for group in groups for i in group]
            hessians = sum(memory.hessian_bytes(shapes[group[0]][1], cross) for group in groups)
            solver = max(
                _solver_bytes(shapes[i], todo[names[i]].format, method_of[names[i]], cross) for i in members
            )
            if copies:
                unfolded = memory.Prediction(held, before + hessians, one_pass, packed, freed, copies)
                moments.append(unfolded)
                before = hessians
            moments += [
                memory.Prediction(held, hessians, work, packed, freed, copies) for work in (one_pass, solver)
            ]
            packed += sum(todo[names[i]].format.nbytes(shapes[i]) for i in members)
        if any(methods.refinement(method_of[name]) for name in names) and stage.block is not None:
            outputs = found.outputs.get(stage.block, 0)
            weights = sum(rows * columns for rows, columns in shapes)
            work = memory.training_bytes(weights) + block
            moments.append(memory.Prediction(max(held, outputs), 0, work, packed, freed, outputs))
        tensors = [todo[name].owner.module.weight for name in names]  # kept until the stage is done
        freed += sum(weight.numel() * weight.itemsize for weight in tensors)
        for stack in found.layout.stacks:
            if stage.block in stack.blocks:
                kept = streams.get(stack.name, 0) if found.keep_all else 0
                streams[stack.name] = kept + found.outputs.get(stage.block or "", 0)
    return max(moments, key=lambda moment: moment.peak)


def _solver_bytes(shape: tuple[int, int], fmt: Format, method: str, cross: bool) -> int:
    return memory.clip_bytes(shape) if method == "awq" else memory.solver_bytes(shape, fmt, cross)


def _copies(model: nn.Module, found: Survey, stage: Stage, used: list[str]) -> int:
    """Bytes of the copy of a block that is kept while a method prepares it and it is folded."""
    whole = stage.block if stage.block is not None else "" if len(found.layout.stages) == 1 else None
    if whole is None or not any(methods.preparation(method) for method in used):
        return 0
    return memory.tensor_bytes(list(model.get_submodule(whole).parameters()))


def _sets(
    model: nn.Module, stage: Stage, batch: Batch, names: list[str], settings: Settings
) -> list[list[list[int]]]:
    """The sets of a stage, each a list of groups, with the places of matrices in `names`."""
    place = {name: i for i, name in enumerate(names)}
    sets = find_sets(model, stage, batch, {}, names)
    if not settings.true_sequential:
        sets = [MatrixSet.joined(sets)]
    return [[[place[name] for name in group] for group in part.groups] for part in sets]
