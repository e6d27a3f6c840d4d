"""The outputs of the blocks finished last: all that is kept of a walk through the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bitfold.calibration.blocks import Layout, Print, Stack, alike, fingerprint
from bitfold.calibration.replay import Stop, run, tensor_map
from bitfold.outputs import Batch, device_of


class Stream:
    """What the blocks finished last returned, for each batch: the state of one walk through the model.

    Args:
        model: whose blocks these are.
        stacks: names of blocks, in order.
        count: number of batches.
        keep_all: keep the outputs of all blocks, for models in which later blocks read those of earlier ones.
    """

    def __init__(self, model: nn.Module, stacks: list[Stack], count: int, keep_all: bool = False) -> None:
        self._model = model
        self.stacks = stacks
        self.count = count
        self.keep_all = keep_all
        self.outputs: dict[str, list[Any]] = {}  # block -> per batch, on the CPU

    def another(self) -> Stream:
        """One for the same blocks and batches, at the start."""
        return Stream(self._model, self.stacks, self.count, self.keep_all)

    def stubs(self, number: int) -> dict[str, Callable[[], Any]]:
        """Stubs of all finished blocks for batch `number`."""
        found: dict[str, Callable[[], Any]] = {}
        for stack in self.stacks:
            finished = [name for name in stack.blocks if name in self.finished]
            if not finished:
                continue
            # The outputs of all but the last are handed to a stub that ignores them. The last is copied anew
            # each time, since what follows may write into it.
            shared = None if self.keep_all else self._fresh(finished[-1], number)
            for name in finished[:-1]:
                found[name] = self._maker(name, number) if self.keep_all else _returning(shared)
            found[finished[-1]] = self._maker(finished[-1], number)
        return found

    @property
    def finished(self) -> set[str]:
        """Blocks that are stubbed."""
        done = set()
        for stack in self.stacks:
            last = max((i for i, name in enumerate(stack.blocks) if name in self.outputs), default=-1)
            done |= set(stack.blocks[: last + 1])
        return done

    def advance(self, block: str, batches: list[Batch]) -> None:
        """Run `block` on every batch and keep what it returns in place of its predecessor's output."""
        stack = next(stack for stack in self.stacks if block in stack.blocks)
        position = stack.blocks.index(block)
        previous = self.outputs.get(stack.blocks[position - 1]) if position else None
        made: list[Any] = []
        for number, batch in enumerate(batches):
            made.append(self._output(block, number, batch, previous))
            if previous is not None and not self.keep_all:
                previous[number] = None  # one batch at a time is held twice
        self.outputs[block] = made
        if position and not self.keep_all:
            del self.outputs[stack.blocks[position - 1]]

    def _output(self, block: str, number: int, batch: Batch, previous: list[Any] | None) -> Any:
        seen: list[Any] = []

        def keep(output: Any) -> None:
            seen.append(tensor_map(lambda t: t.detach().to("cpu", copy=True), output))
            raise Stop

        run(self._model, batch, stubs=self.stubs(number), after={block: keep})
        if seen:
            return seen[0]
        return None if previous is None else previous[number]  # this batch does not come by here

    def _maker(self, name: str, number: int) -> Callable[[], Any]:
        return lambda: self._fresh(name, number)

    def _fresh(self, name: str, number: int) -> Any:
        device = device_of(self._model)
        return tensor_map(lambda t: t.to(device, copy=True), self.outputs[name][number])


class Streams:
    """The walk of the folded model, and beside it that of the float one where somebody asks for it.

    Args:
        folded: at the start.
        both: whether there is a float one.
    """

    def __init__(self, folded: Stream, both: bool) -> None:
        self.folded = folded
        self.floats = folded.another() if both else None

    def by_name(self) -> dict[str, Stream]:
        """For the checkpoint."""
        return {"folded": self.folded} | ({} if self.floats is None else {"float": self.floats})

    def restart(self) -> None:
        """Back to the start."""
        for stream in self.by_name().values():
            stream.outputs = {}


def _returning(value: Any) -> Callable[[], Any]:
    return lambda: value


def needs_all_outputs(model: nn.Module, layout: Layout, batch: Batch) -> bool | None:
    """Whether later blocks read outputs of more than the block before them; None if replay does not work.

    A walk over one batch, block by block through stubs, is compared with one plain pass: the inputs of every
    block and the final output must be the same.
    """
    blocks = [stage.block for stage in layout.stages if stage.block is not None]
    expected: dict[str, Print] = {}

    def look(name: str, args: Any, kwargs: Any) -> None:
        expected[name] = fingerprint((args, kwargs))

    hooks = {name: (lambda a, k, name=name: look(name, a, k)) for name in blocks}
    final = fingerprint(run(model, batch, before=hooks))
    for keep_all in (False, True):
        stream = Stream(model, layout.stacks, 1, keep_all)
        if _walk_agrees(model, stream, blocks, batch, expected, final):
            return keep_all
    return None


def _walk_agrees(
    model: nn.Module,
    stream: Stream,
    blocks: list[str],
    batch: Batch,
    expected: dict[str, Print],
    final: Print,
) -> bool:
    for name in blocks:
        found: list[Print] = []

        def look(args: Any, kwargs: Any, found: list[Print] = found) -> None:
            found.append(fingerprint((args, kwargs)))
            raise Stop

        run(model, batch, stubs=stream.stubs(0), before={name: look})
        if not found or not alike(found[0], expected[name]):
            return False
        stream.advance(name, [batch])
    return alike(fingerprint(run(model, batch, stubs=stream.stubs(0))), final)
