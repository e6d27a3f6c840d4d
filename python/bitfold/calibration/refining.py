"""What some methods do to a folded block as a whole (learned rounding): the driver's side of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration.batches import Batch
from bitfold.calibration.replay import Stop, run, tensor_map
from bitfold.calibration.streams import Stream
from bitfold.methods import Solution
from bitfold.methods.base import Refinement
from bitfold.methods.learned import Call, first_float
from bitfold.nn import PackedModule


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
    prefix = len(block) + 1
    folded: dict[str, tuple[PackedModule, Tensor]] = {}
    for name, weight in floats.items():
        packed = model.get_submodule(name)
        if isinstance(packed, PackedModule):
            folded[name[prefix:]] = (packed, weight)
    solutions, report = refinement(module, folded, calls, options)
    return {f"{block}.{name}": solution for name, solution in solutions.items()}, report


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
