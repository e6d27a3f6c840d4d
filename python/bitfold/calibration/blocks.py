"""The structure of a model, from its modules and one traced pass: stacks of blocks, and what runs when.

A stack is a ModuleList or Sequential whose children run one after the other, such as the layers of an
encoder. Nothing is known by name: an encoder-decoder has two stacks, a plain network may have none, and then
all of it is one stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.calibration.replay import Stop, run, stop_after, tensor_map
from bitfold.outputs import Batch


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other; names of modules."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """What is folded in one go: a block, or matrices that run between blocks.

    Args:
        name: of the block, or of the first matrix with a remark.
        block: the module to run and to cache the output of; None outside of blocks.
        matrices: to fold here, in the order of the modules.
    """

    name: str
    block: str | None
    matrices: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The stacks of a model, the stages in the order in which they run, and matrices that no pass reached."""

    stacks: list[Stack]
    stages: list[Stage]
    unreached: list[str]


def find_layout(model: nn.Module, matrices: Collection[str], batch: Batch) -> Layout:
    """Look for stacks in `model`, and trace one pass over `batch` for the order of everything.

    Args:
        model: in eval mode.
        matrices: names of the modules to fold.
        batch: any batch that reaches what others reach.
    """
    stacks = _sequential_stacks(model, matrices, batch)
    return arrange(model, stacks, matrices, batch)


def arrange(model: nn.Module, stacks: list[Stack], matrices: Collection[str], batch: Batch) -> Layout:
    """Order the blocks of `stacks` and the matrices outside of them as one traced pass runs them."""
    home = {name: block for stack in stacks for block in stack.blocks for name in _below(block, matrices)}
    blocks = [block for stack in stacks for block in stack.blocks]
    outside = [name for name in matrices if name not in home]
    called = list(dict.fromkeys(call_order(model, batch, [*blocks, *outside])))
    stages: list[Stage] = []
    for name in called:
        if name in home.values() or name in blocks:
            stages.append(Stage(name, name, tuple(_below(name, matrices))))
        elif stages and stages[-1].block is None:
            stages[-1] = Stage(stages[-1].name, None, (*stages[-1].matrices, name))
        else:
            stages.append(Stage(f"{name} (outside of blocks)", None, (name,)))
    reached = {name for stage in stages for name in stage.matrices}
    return Layout(stacks, stages, [name for name in matrices if name not in reached])


def call_order(
    model: nn.Module,
    batch: Batch,
    names: Collection[str],
    stubs: Mapping[str, Callable[[], Any]] | None = None,
    until: str | None = None,
) -> list[str]:
    """The names of `names` in the order of all calls of one pass, which may end with that of `until`."""
    calls: list[str] = []
    hooks = {name: (lambda *_, name=name: calls.append(name)) for name in names}
    run(model, batch, stubs=stubs, before=hooks, after=stop_after(until))
    return calls


def _below(parent: str, names: Collection[str]) -> list[str]:
    return [name for name in names if name == parent or name.startswith(parent + ".")]


def _sequential_stacks(model: nn.Module, matrices: Collection[str], batch: Batch) -> list[Stack]:
    """The outermost candidates whose blocks run once each, one feeding the next."""
    found: list[Stack] = []
    pending = list(_candidates(model, "", matrices))
    while pending:
        stack = pending.pop(0)
        if _is_sequential(model, batch, stack.blocks):
            found.append(stack)
        else:  # towers side by side, experts, a shared block: look inside
            for block in stack.blocks:
                pending += _candidates(model.get_submodule(block), block, matrices)
    return found


def _candidates(module: nn.Module, name: str, matrices: Collection[str]) -> Iterator[Stack]:
    """The outermost containers below `module` with at least two blocks of one class."""
    blocks = _blocks_of(module, name, matrices)
    if blocks:
        yield Stack(name, blocks)
        return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".removeprefix(".")
        if _below(path, matrices):
            yield from _candidates(child, path, matrices)


def _blocks_of(module: nn.Module, name: str, matrices: Collection[str]) -> tuple[str, ...]:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return ()
    paths = {f"{name}.{key}".removeprefix("."): child for key, child in module.named_children()}
    blocks = {path: child for path, child in paths.items() if _below(path, matrices)}
    classes = Counter(type(child) for child in blocks.values())
    if max(classes.values(), default=0) < 2:
        return ()
    for path, child in blocks.items():  # a Sequential of (input layer, body, output layer) around the stack
        inner = [] if classes[type(child)] > 1 else list(_candidates(child, path, matrices))
        if any(len(stack.blocks) >= len(blocks) for stack in inner):
            return ()
    return tuple(blocks)


def _is_sequential(model: nn.Module, batch: Batch, blocks: tuple[str, ...]) -> bool:
    calls = call_order(model, batch, blocks)
    return calls == list(blocks) and depends(model, batch, blocks[0], blocks[1])


def depends(
    model: nn.Module,
    batch: Batch,
    first: str,
    second: str,
    stubs: Mapping[str, Callable[[], Any]] | None = None,
) -> bool:
    """Whether what goes into module `second` changes with what comes out of module `first`."""
    inputs: list[Any] = []

    def look(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(fingerprint((args, kwargs)))
        raise Stop

    def disturb(output: Any) -> Any:
        return tensor_map(lambda t: t * 0.5 + 0.25 if t.is_floating_point() else t, output)

    run(model, batch, stubs=stubs, before={second: look})
    run(model, batch, stubs=stubs, before={second: look}, after={first: disturb})
    return len(inputs) == 2 and not alike(*inputs)


Print = list[tuple[tuple[int, ...], float, float]]


def fingerprint(tree: Any) -> Print:
    """Shape, mean square and a fixed projection of each float tensor in `tree`."""
    found: Print = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            flat = leaf.detach().reshape(-1).float().nan_to_num(nan=1.0, posinf=1e4, neginf=-1e4)
            flat = flat.clamp(-1e4, 1e4)
            weights = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=torch.float32))
            size = flat.numel() or 1
            found.append((tuple(leaf.shape), float((flat * flat).mean()), float(flat @ weights) / size**0.5))
    return found


def alike(a: Print, b: Print, tolerance: float = 1e-3) -> bool:
    """Whether two fingerprints are of the same values, up to the order of additions."""
    if len(a) != len(b):
        return False
    for (shape_a, power_a, seen_a), (shape_b, power_b, seen_b) in zip(a, b, strict=True):
        power = max(power_a, power_b)
        if shape_a != shape_b or abs(power_a - power_b) > tolerance * power:
            return False
        if abs(seen_a - seen_b) > tolerance * max(power, 1e-30) ** 0.5:
            return False
    return True
