"""What some methods do to a block before its codes are chosen (AWQ's scales): the driver's side of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold import methods
from bitfold.calibration.distributed import Processes
from bitfold.calibration.replay import Stop, run
from bitfold.calibration.sets import MatrixSet
from bitfold.calibration.statistics import InputStatistics
from bitfold.calibration.streams import Stream
from bitfold.choosing import Fold
from bitfold.methods import BlockView, Statistics
from bitfold.outputs import Batch

_PROBE_TOKENS = 512  # of the call that a preparation may try things on


# Parameters of finished stages that runs of this process have changed: where an interrupted run goes on, they
# are not what its fingerprint says of them.
CHANGED: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


@dataclass
class Prepared:
    """What was done to a block.

    Args:
        lines: name of a matrix -> what to add to its line.
        changed: name of a parameter that has changed and is no matrix to be folded -> its value.
        notes: what could not be done, for the report.
    """

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def nothing(cls, names: Iterable[str], reason: str) -> Prepared:
        """None of the matrices `names` got a scale."""
        return cls({name: {"no_scale": reason} for name in names})


def prepare(
    model: nn.Module,
    block: str,
    sets: Iterable[MatrixSet],
    gather: Callable[[MatrixSet], list[InputStatistics]],
    folds: Mapping[str, Fold],
    method_of: Mapping[str, str],
    batch: Batch,
    stream: Stream,
    known: list[Any],
    processes: Processes,
) -> Prepared:
    """Let the method of the matrices in `sets` change the weights of a block.

    Args:
        model: in eval mode, the matrices of the block float still.
        block: its name; "" is the model itself.
        sets: the matrices, in the order in which they run.
        gather: statistics of the groups of a set, of all data.
        folds: by name of the matrix.
        method_of: by name of the matrix.
        batch: the first one, on which the model runs up to the block.
        stream: what the folded model feeds.
        known: kept from block to block, where `preparing` runs (on rank 0).
        processes: rank 0 chooses for all.

    """
    sets = list(sets)
    prefix = f"{block}." if block else ""
    names = [name for matrices in sets for group in matrices.groups for name in group]
    wanted = {method_of[name] for name in names if methods.preparation(method_of[name]) is not None}
    preparing = methods.preparation(min(wanted))
    assert preparing is not None
    module = model.get_submodule(block)
    statistics = _statistics(sets, gather, prefix)
    before = {name: parameter._version for name, parameter in module.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    if processes.rank == 0:  # each rank has data of its own: what they find may differ
        view = BlockView(
            block=module,
            inputs=_inputs_of(model, block, batch, stream.stubs(0)),
            formats={n.removeprefix(prefix): folds[n].format for n in names if method_of[n] in wanted},
            statistics=statistics,
            shared=_used_elsewhere(model, prefix),
            known=known,
        )
        found, refused = preparing(view), view.refused
    for _ in statistics:  # gathered together, also where only one looks at them
        pass
    changed = {n: p.detach() for n, p in module.named_parameters() if p._version != before[n]}
    if processes.size > 1:
        sent = {name: value.cpu() for name, value in changed.items()}
        sent, found, refused = processes.agree((sent, found, refused))
        if processes.rank != 0:
            _copy(module, sent)
            changed = {name: module.get_parameter(name).detach() for name in sent}
    weights = {f"{name.removeprefix(prefix)}.weight" for name in names}
    kept = {prefix + name: value.clone() for name, value in changed.items() if name not in weights}
    lines = Prepared.nothing((n for n in names if method_of[n] in wanted), "no legal fold feeds it").lines
    lines |= {prefix + name: line for name, line in found.items()}
    return Prepared(lines, kept, [f"no scale from {name}: {why}" for name, why in refused.items()])


@torch.no_grad()
def _copy(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module.get_parameter(name).copy_(value)


def restore(model: nn.Module, changed: Mapping[str, Tensor]) -> None:
    """Put the values that `prepare` returned back into a fresh model."""
    _copy(model, changed)


def _statistics(
    sets: list[MatrixSet], gather: Callable[[MatrixSet], list[InputStatistics]], prefix: str
) -> Iterator[dict[str, Statistics]]:
    for matrices in sets:
        parts = [part.finish() for part in gather(matrices)]
        yield {
            name.removeprefix(prefix): part
            for group, part in zip(matrices.groups, parts, strict=True)
            for name in group
        }


def _inputs_of(
    model: nn.Module, block: str, batch: Batch, stubs: Mapping[str, Callable[[], Any]]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the block is called with, of as many sequences as make a few hundred tokens."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Stop

    run(model, batch, stubs=stubs, before={block: look})
    rows, few = probe_rows(batch)

    def fewer(leaf: Any) -> Any:
        cut = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
        return leaf[:few].clone() if cut and few < rows else leaf  # a view would keep all

    return [(args, dict(kwargs)) for args, kwargs in pytree.tree_map(fewer, seen)]


def probe_rows(batch: Batch) -> tuple[int, int]:
    """Sequences in the batch, and how many of them a preparation tries things on."""
    tensors = batch.tensors()
    if not tensors or not tensors[0].ndim:
        return 1, 1
    first = tensors[0]
    rows = first.shape[0]
    # Of floats [rows, features] each row is a token.
    tokens = 1 if first.ndim == 1 or (first.ndim == 2 and first.is_floating_point()) else first.shape[1]
    return rows, min(rows, max(1, _PROBE_TOKENS // max(tokens, 1)))


def _used_elsewhere(model: nn.Module, prefix: str) -> set[int]:
    """`id` of the parameters of all modules outside of the block, by whatever name they go there."""
    return {
        id(parameter)
        for name, module in model.named_modules(remove_duplicate=False)
        if prefix and not f"{name}.".startswith(prefix)
        for parameter in module._parameters.values()
        if parameter is not None
    }
