"""awq: channels that matter get larger weights, undone in what comes before; then clip search (2306.00978).

`scale_block` finds the folds of a block (`bitfold.folds`), searches a scale for each and applies it: the
block computes what it did, but what rounding costs has moved away from channels with large inputs. Then each
matrix is folded on its own: by clip search (`awq`) or by error feedback on top (`awq+gptq`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bitfold import ops, solvers
from bitfold.folds import ScaleFold, apply_folds, find_folds, holds
from bitfold.formats import Format
from bitfold.methods import base
from bitfold.methods.base import BlockView, Solution, Statistics, register
from bitfold.nn.conv1d import is_conv1d
from bitfold.outliers import choose_outliers, fill_outliers, set_aside
from bitfold.solvers.awq import can_clip


def scale_block(view: BlockView) -> dict[str, dict[str, Any]]:
    """Choose and apply the scales of a block; each fold is judged by the outputs of all that read it."""
    folds = _folds_of(view)
    waiting = {fold.source: [name for name in fold.readers if name in view.formats] for fold in folds}
    seen: dict[str, Statistics] = {}
    chosen: list[tuple[ScaleFold, Tensor]] = []
    report: dict[str, dict[str, Any]] = {}
    for statistics in view.statistics:
        seen |= {
            name: found for name, found in statistics.items() if any(name in w for w in waiting.values())
        }
        for fold in folds:
            names = waiting.get(fold.source, [])
            if not names or not all(name in seen for name in names):
                continue
            del waiting[fold.source]
            scale, line = _choose(view, fold, names, seen)
            if scale is not None:
                chosen.append((fold, scale))
            report |= {name: {"scale": {"source": fold.source, **line}} for name in names}
            for name in names:
                del seen[name]
    apply_folds(view.block, [fold for fold, _ in chosen], [scale for _, scale in chosen])
    return report


def _folds_of(view: BlockView) -> list[ScaleFold]:
    """Blocks of a model are mostly alike, so what was found in one is tried on the next as a whole."""
    for known in view.known:
        folds = [ScaleFold(**fold) for fold in known["folds"]]
        if holds(view.block, view.inputs, folds, view.shared):
            view.refused |= known["refused"]
            return folds
    found = find_folds(view.block, view.inputs, view.shared)
    view.known.append(asdict(found))
    view.refused |= found.refused
    return list(found.folds)


def _choose(
    view: BlockView, fold: ScaleFold, names: list[str], seen: dict[str, Statistics]
) -> tuple[Tensor | None, dict[str, Any]]:
    readers = [
        solvers.AwqReader(
            _matrix(view, name),
            view.formats[name],
            seen[name].hessian,
            seen[name].mean_abs,
            fold.readers[name].to(seen[name].mean.device),
            seen[name].tokens,
        )
        for name in names
        if seen[name].tokens > 0
    ]
    if not readers:
        return None, {"alpha": 0.0}
    return solvers.awq_scale(readers, fold.channels)


def _matrix(view: BlockView, name: str) -> Tensor:
    module: Any = view.block.get_submodule(name)
    weight: Tensor = module.weight.detach()
    return (weight.t() if is_conv1d(module) else weight).float()


@register("awq", calibrated=True, prepare=scale_block)
def awq(weight: Tensor, fmt: Format, statistics: Statistics | None = None) -> Solution:
    """Codes by the format's own method, the range of each group clipped where that lowers the error."""
    assert statistics is not None  # fold_weight sees to it
    hessian, clipped = statistics.hessian, 0
    if not can_clip(fmt):
        packed = ops.quantize(weight, fmt)
    elif fmt.outliers:
        mask = choose_outliers(weight, fmt, hessian.diagonal().clamp_min(0).contiguous())
        packed, found = solvers.awq_clip(set_aside(weight, fmt, mask), fmt.dense, hessian, exact=mask)
        packed, clipped = fill_outliers(packed, fmt, weight, mask), found["clipped"]
    else:
        packed, found = solvers.awq_clip(weight, fmt, hessian)
        clipped = found["clipped"]
    error = ops.dequantize(packed, fmt, (weight.shape[0], weight.shape[1])) - weight.float()
    loss = float(torch.einsum("ij,ij->", error @ hessian, error))
    return Solution(packed, {"loss": loss, "clipped_groups": clipped})


@register("awq+gptq", calibrated=True, prepare=scale_block, float_stream=True, options_of="gptq")
def awq_gptq(weight: Tensor, fmt: Format, statistics: Statistics | None = None, **options: Any) -> Solution:
    """Scales as of `awq`, codes as of `gptq`, which takes the options."""
    return base.get("gptq")(weight, fmt, statistics, **options)
