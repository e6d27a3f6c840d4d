"""One pass over the data for one set of matrices: hooks on their inputs, statistics out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.calibration.replay import Stop, run
from bitfold.calibration.sets import MatrixSet
from bitfold.calibration.statistics import InputStatistics
from bitfold.calibration.streams import Stream
from bitfold.outputs import Batch, device_of, row_mask

FloatView = Callable[[], contextlib.AbstractContextManager[None]]


def gather(
    model: nn.Module,
    matrices: MatrixSet,
    batches: list[Batch],
    stream: Stream,
    float_stream: Stream | None = None,
    float_view: FloatView = contextlib.nullcontext,
) -> list[InputStatistics]:
    """Statistics of each group of `matrices`, in their order.

    Args:
        model: in eval mode, blocks before the stage finished in `stream`.
        matrices: what to gather for; its modules are float still.
        batches: the data.
        stream: what the folded model feeds.
        float_stream: what the float model feeds, for `Statistics.cross`; with it
        float_view: in which the modules of this stage are float again.
    """
    device = device_of(model)
    gathered = [
        InputStatistics(
            in_features(model.get_submodule(group[0])),
            device,
            cross=float_stream is not None and matrices.roles[i] is None,
        )
        for i, group in enumerate(matrices.groups)
    ]
    watched = {group[0]: i for i, group in enumerate(matrices.groups)}
    for number, batch in enumerate(batches):
        reference: dict[int, list[Tensor]] = {}
        if float_stream is not None:
            with float_view():
                _record(model, batch, float_stream.stubs(number), watched, matrices.once, reference)
        _accumulate(model, batch, stream.stubs(number), watched, matrices, gathered, reference)
    for part in gathered:
        part.complete()
    return gathered


def in_features(module: nn.Module) -> int:
    """Inputs of a Linear or a Conv1D (whose weight is transposed)."""
    weight: Any = module.weight
    return int(getattr(module, "in_features", None) or weight.shape[0])


def _record(
    model: nn.Module,
    batch: Batch,
    stubs: dict[str, Callable[[], Any]],
    watched: dict[str, int],
    once: bool,
    reference: dict[int, list[Tensor]],
) -> None:
    def keep(i: int, x: Tensor) -> None:
        reference.setdefault(i, []).append(x.detach().clone())
        if once and len(reference) == len(watched):
            raise Stop

    run(model, batch, stubs=stubs, before={name: _hook(keep, i) for name, i in watched.items()})


def _accumulate(
    model: nn.Module,
    batch: Batch,
    stubs: dict[str, Callable[[], Any]],
    watched: dict[str, int],
    matrices: MatrixSet,
    gathered: list[InputStatistics],
    reference: dict[int, list[Tensor]],
) -> None:
    masks = [mask for mask in batch.masks if not bool(mask.all())]
    routed = _RoutedRows(masks) if masks and any(matrices.roles) else None
    seen: set[int] = set()

    def add(i: int, x: Tensor) -> None:
        mask = row_mask(x, masks)
        if mask is None and routed is not None and matrices.roles[i] is not None:
            mask = routed.mask_of(x)
        gathered[i].unmasked |= (bool(masks) or batch.has_unread_mask) and mask is None
        other = reference.get(i)
        gathered[i].add(x, mask, other.pop(0) if other else None)
        seen.add(i)
        if matrices.once and len(seen) == len(watched):
            raise Stop

    before = {name: _hook(add, i) for name, i in watched.items()}
    if routed is not None:
        before = routed.hooks(matrices) | before
    run(model, batch, stubs=stubs, before=before)


def _hook(function: Callable[[int, Tensor], None], i: int) -> Callable[[Any, Any], None]:
    def hook(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        function(i, next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)))

    return hook


class _RoutedRows:
    """Finds padding among the rows that a router sent to an expert.

    Rows are copied when they are routed, so a row of padding is known by its bits: those of the input of the
    module that holds the experts are remembered, those that reach an expert are looked up.
    """

    def __init__(self, masks: list[Tensor]) -> None:
        self._masks = masks
        self._padding: dict[int, Tensor] = {}  # width -> hashes of rows of padding
        self._current: Tensor | None = None

    def hooks(self, matrices: MatrixSet) -> dict[str, Callable[[Any, Any], None]]:
        found: dict[str, Callable[[Any, Any], None]] = {}
        for group, role in zip(matrices.groups, matrices.roles, strict=True):
            if role is not None:
                experts = role.partition(".*")[0]
                number = group[0][len(experts) + 1 :].partition(".")[0]
                if (parent := experts.rpartition(".")[0]) not in group:
                    found[parent] = self._remember
                if (expert := f"{experts}.{number}") not in group:
                    found[expert] = self._enter
        return found

    def mask_of(self, x: Tensor) -> Tensor | None:
        """Which rows of an expert's inner input count."""
        rows = x.numel() // x.shape[-1]
        if self._current is not None and self._current.numel() == rows:
            return self._current
        return self._look_up(x)

    def _remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in [*args, *kwargs.values()]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 2:
                mask = row_mask(x, self._masks)
                if mask is not None:
                    self._padding[x.shape[-1]] = _hashes(x)[~mask.to(x.device)]

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        self._current = None if x is None else self._look_up(x)

    def _look_up(self, x: Tensor) -> Tensor | None:
        padding = self._padding.get(x.shape[-1])
        return None if padding is None else ~torch.isin(_hashes(x), padding)


def _hashes(x: Tensor) -> Tensor:
    """One integer per row of x `[..., n]`, the same for the same bits."""
    bits = x.detach().reshape(-1, x.shape[-1]).float().contiguous().view(torch.int32).long()
    odd = torch.arange(bits.shape[1], device=bits.device).mul_(0x9E3779B97F4A7C1).bitwise_or_(1)
    return (bits * odd).sum(dim=1)
