"""What some methods do to a folded block as a whole (learned rounding): the driver's side of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import methods
from bitfold.calibration.blocks import Stage
from bitfold.calibration.guards import seeded
from bitfold.calibration.placing import Placing
from bitfold.calibration.replay import Stop, run, tensor_map
from bitfold.calibration.report import peak_rss_bytes
from bitfold.calibration.streams import Stream, Streams
from bitfold.methods import Solution
from bitfold.methods.base import Refinement
from bitfold.methods.learned import Call, first_float
from bitfold.nn import PackedModule
from bitfold.outputs import Batch


def refine_stage(
    model: nn.Module,
    stage: Stage,
    placing: Placing,
    solutions: dict[str, Solution],
    method_of: Mapping[str, str],
    batches: list[Batch],
    streams: Streams,
    options: Mapping[str, Any],
    seed: int,
) -> None:
    """Let the method of a folded block improve it; `solutions` become what was found.

    Args:
        model: with the block folded.
        stage: of the block.
        placing: knows the float matrices that it was folded from.
        solutions: what was put in place, by name of the matrix.
        method_of: by name of the matrix.
        batches: the data.
        streams: the folded one is at the block, the float one behind it.
        options: of the method.
        seed: of its random numbers.
    """
    refining = {method for name in solutions if methods.refinement(method := method_of[name]) is not None}
    if not refining or stage.block is None or streams.floats is None:
        placing.record_refined({})
        return
    start = time.perf_counter()
    refinement = methods.refinement(min(refining))
    assert refinement is not None
    floats = {name: fold.owner.float_matrix() for name, fold in placing.refinable.items()}
    with seeded(seed, stage.block):
        found, line = refine_block(
            model, stage.block, floats, batches, streams.folded, streams.floats, refinement, options
        )
    for name, solution in found.items():
        before = solutions[name].bias_shift
        if solution.bias_shift is not None and before is not None:
            solution.bias_shift = solution.bias_shift + before
        packed: Any = model.get_submodule(name)
        # From the float bias, in one step: the same bits as where an interrupted run goes on.
        packed.take(solution, placing.refinable[name].owner.module.bias)
        solutions[name] = solution
    placing.record_refined(dict.fromkeys(found, line))
    cost = {"seconds": round(time.perf_counter() - start, 4), "peak_rss_bytes": peak_rss_bytes()}
    placing.log.add({"name": stage.block, "method": min(refining), **line, **cost})


def refine_block(
    model: nn.Module,
    block: str,
    floats: dict[str, Tensor],
    batches: list[Batch],
    stream: Stream,
    float_stream: Stream,
    refinement: Refinement,
    options: Mapping[str, Any],
) -> tuple[dict[str, Solution], dict[str, float]]:
    """Train the folded matrices of `block`.

    Args:
        model: with the block folded.
        block: its name.
        floats: names of its matrices -> the float weights `[out, in]` that they came from.
        batches: the data.
        stream: what the folded model feeds to the block.
        float_stream: advanced by the float block already: holds what it returned.
        refinement: of the method.
        options: of the method.

    Returns:
        name of matrix -> Solution (none where training did not help), and the block's errors.
    """
    calls = []
    for number, batch in enumerate(batches):
        seen = _arguments(model, block, batch, stream, number)
        if seen is None:  # this batch does not come by here
            continue
        target = first_float(float_stream.outputs[block][number])
        calls.append(Call(*seen, target, _mask(batch, target)))
    module = model.get_submodule(block)
    prefix = f"{block}."
    # A block that is a matrix itself goes by "" inside of itself.
    folded: dict[str, tuple[PackedModule, Tensor]] = {}
    for name, weight in floats.items():
        packed = model.get_submodule(name)
        if isinstance(packed, PackedModule):
            folded["" if name == block else name.removeprefix(prefix)] = (packed, weight)
    solutions, report = refinement(module, folded, calls, options)
    return {f"{prefix}{name}" if name else block: solution for name, solution in solutions.items()}, report


def _arguments(
    model: nn.Module, block: str, batch: Batch, stream: Stream, number: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(tensor_map(torch.clone, (args, kwargs)))
        raise Stop

    run(model, batch, stubs=stream.stubs(number), before={block: keep})
    return seen[0] if seen else None


def _mask(batch: Batch, target: Tensor) -> Tensor | None:
    """The mask of the batch that has the shape of the target's tokens."""
    for mask in batch.masks:
        if mask.shape == target.shape[:-1]:
            return mask.bool()
    return None
