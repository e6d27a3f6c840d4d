"""What each candidate format of each group of matrices costs in accuracy, measured on the float model.

Three measures, of which the last is the best and the dearest:

- `weight`: ``|W - Q|^2 / |W|^2`` of each matrix, times its share of all weights. No data.
- `output`: ``|x (W - Q)^T|^2 / |x W^T|^2`` over a sample of the inputs x of each layer, times the same share.
  One run of the model.
- `kl`: the group alone is replaced by what it decodes to, the model run, and the mean Kullback-Leibler
  divergence of its logits taken (for a model without logits, the relative squared error of its output).
  A run of the batches for each candidate of each group.

That losses of single layers add up to about the loss of the whole is the linearity theorem of HIGGS
(arXiv 2411.17525).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfold import ops
from bitfold.choosing import Fold, Use
from bitfold.formats import Format
from bitfold.outputs import Batch, check_rows, final_rows, kl_divergence
from bitfold.planning.candidates import Group

__all__ = ["MEASURES", "choose_measure", "measure"]

MEASURES = ("weight", "output", "kl")
Losses = dict[str, dict[str, float]]  # group -> format -> loss

_KL_WORK = 5e12  # multiply-adds up to which "auto" measures KL: a minute or two on two cores
_ROWS = 512  # rows of logits that are kept, and inputs of each layer


def choose_measure(model: nn.Module, groups: Sequence[Group], batches: Sequence[Batch]) -> str:
    """The best measure that is not too slow: KL, else output error, else (without data) weight error."""
    if not batches:
        return "weight"
    tokens = sum(_tokens(batch) for batch in batches)
    runs = sum(len(group.formats) for group in groups if len(group.formats) > 1)
    work = sum(parameter.numel() for parameter in model.parameters()) * tokens * runs
    return "kl" if work <= _KL_WORK else "output"


def measure(
    kind: str,
    model: nn.Module,
    folds: Sequence[Fold],
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int,
    advance: Callable[[str], None],
) -> tuple[Losses, list[str]]:
    """Loss of each format of each group; groups with a single one are not measured.

    The model is as before when this returns or raises.

    Returns:
        The losses, and the names of groups that the data do not reach: theirs are of the weights.
    """
    task = _Task(
        model,
        folds,
        [group for group in groups if len(group.formats) > 1],
        batches,
        torch.Generator().manual_seed(seed),
        advance,
    )
    by = {"weight": _by_weight, "output": _by_output, "kl": _by_kl}[kind]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        losses = by(task)
        unreached = [group for group in task.groups if not any(losses[group.name].values())]
        losses |= _by_weight(replace(task, groups=unreached, advance=lambda _: None))
    finally:
        for module in was_training:
            module.training = True
    return losses, [group.name for group in unreached]


@dataclass(frozen=True)
class _Task:
    """What each measure is given."""

    model: nn.Module  # in eval mode
    folds: Sequence[Fold]
    groups: Sequence[Group]  # those to be measured
    batches: Sequence[Batch]
    random: torch.Generator
    advance: Callable[[str], None]  # to be called with each group's name when it is done

    def members(self, group: Group) -> list[Fold]:
        return [self.folds[i] for i in group.members]

    @property
    def rows_per_batch(self) -> int:
        return -(-_ROWS // len(self.batches))


def _by_weight(task: _Task) -> Losses:
    total = sum(fold.owner.module.weight.numel() for fold in task.folds)
    losses: Losses = {}
    for group in task.groups:
        losses[group.name] = dict.fromkeys(map(str, group.formats), 0.0)
        for fold in task.members(group):
            weight = fold.owner.float_matrix()
            for fmt in group.formats:
                error = _relative(weight - _decoded(weight, fmt), weight)
                losses[group.name][str(fmt)] += error * weight.numel() / total
        task.advance(group.name)
    return losses


def _by_output(task: _Task) -> Losses:
    folds = [fold for group in task.groups for fold in task.members(group)]
    inputs = _sample_inputs(task, [use for fold in folds for use in (fold.owner, *fold.tied)])
    total = sum(fold.owner.module.weight.numel() for fold in task.folds)
    losses: Losses = {}
    for group in task.groups:
        losses[group.name] = dict.fromkeys(map(str, group.formats), 0.0)
        for fold in task.members(group):
            weight = fold.owner.float_matrix()
            seen = [(use, inputs[use.name]) for use in (fold.owner, *fold.tied) if use.name in inputs]
            for fmt in group.formats:
                error = weight - _decoded(weight, fmt)
                for use, x in seen:
                    relative = _relative(_apply(use, x, error), _apply(use, x, weight))
                    losses[group.name][str(fmt)] += relative * weight.numel() / total
        task.advance(group.name)
    return losses


def _sample_inputs(task: _Task, uses: Sequence[Use]) -> dict[str, Tensor]:
    """Up to `_ROWS` rows (embeddings: indices) that each module is called with; none for one never called."""
    kept: dict[str, list[Tensor]] = {}
    current: list[Batch] = []

    def watch(use: Use) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                return
            if use.kind == "embedding":
                rows = current[0].rows(x[..., None]).long() if x.ndim > 1 else x.reshape(-1, 1)
            else:
                rows = current[0].rows(x)
                check_rows(rows, f"{use.name}: input")
            chosen = torch.randperm(len(rows), generator=task.random)[: task.rows_per_batch].to(rows.device)
            kept.setdefault(use.name, []).append(rows[chosen].to(x.dtype))

        return hook

    handles = [use.module.register_forward_pre_hook(watch(use), with_kwargs=True) for use in uses]
    try:
        for batch in task.batches:
            current[:] = [batch]
            batch.run(task.model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in kept.items()}


def _by_kl(task: _Task) -> Losses:
    references: list[tuple[Tensor, Tensor]] = []  # rows that count, and what the float model puts out there
    name = ""
    for batch in task.batches:
        name, rows = final_rows(batch, task.model, "the float model")
        chosen = torch.randperm(len(rows), generator=task.random)[: task.rows_per_batch]
        chosen = chosen.sort().values.to(rows.device)
        references.append((chosen, rows[chosen]))
    losses: Losses = {}
    for group in task.groups:
        losses[group.name] = {}
        for fmt in group.formats:
            with _replaced(task.members(group), fmt):
                losses[group.name][str(fmt)] = _deviation(task, references, name)
        task.advance(group.name)
    return losses


def _deviation(task: _Task, references: Sequence[tuple[Tensor, Tensor]], name: str) -> float:
    """Mean KL of the logits at the chosen rows; without logits, squared error over squared norm."""
    top, bottom = 0.0, 0.0
    for batch, (chosen, reference) in zip(task.batches, references, strict=True):
        rows = final_rows(batch, task.model, "the float model with one group folded")[1][chosen]
        if name == "logits":
            top += float(kl_divergence(reference, rows).sum())
            bottom += len(chosen)
        else:
            top += float((rows - reference).double().square().sum())
            bottom += float(reference.double().square().sum())
    return top / bottom if bottom else top


@contextmanager
def _replaced(folds: Sequence[Fold], fmt: Format) -> Iterator[None]:
    """The matrices hold what `fmt` decodes to, and their own values again afterwards."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for fold in folds:
                weight = fold.owner.module.weight
                decoded = _decoded(fold.owner.float_matrix(), fmt)
                before.append((weight, weight.detach().clone()))
                weight.copy_(decoded.t() if fold.owner.kind == "conv1d" else decoded)
        yield
    finally:
        with torch.no_grad():
            for weight, values in before:
                weight.copy_(values)


def _decoded(weight: Tensor, fmt: Format) -> Tensor:
    rows, columns = weight.shape
    return ops.dequantize(ops.quantize(weight, fmt), fmt, (rows, columns))


def _apply(use: Use, x: Tensor, weight: Tensor) -> Tensor:
    return weight[x[:, 0]] if use.kind == "embedding" else x.to(weight.dtype) @ weight.t()


def _relative(error: Tensor, reference: Tensor) -> float:
    norm = float(reference.double().square().sum())
    return float(error.double().square().sum()) / norm if norm else 0.0


def _tokens(batch: Batch) -> int:
    tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)]
    return max((t.numel() if not t.is_floating_point() else len(t) for t in tensors), default=1)
