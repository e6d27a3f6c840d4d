"""learned: rounding, scales and biases of a block trained together on what the block returns.

AutoRound's idea (arXiv 2309.05516) from GPTQ's codes on: each weight may move from its code to a neighbour by
an offset V in [-0.5, 0.5] before rounding, trained through a straight-through estimator by the sign of its
gradient, the step falling linearly to zero. Scales (where they are stored one by one) and biases train beside
it. The loss is the mean squared error of the block's output against the float block on float inputs, so
errors of earlier blocks are made good as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.formats import Format
from bitfold.methods.base import Solution, Statistics, register
from bitfold.methods.gptq import gptq
from bitfold.methods.grid import Grid
from bitfold.nn import PackedModule

_INSIDE = (
    0.35  # how near to its code's border a weight may start: nearer ones would cross it at the first steps
)


@dataclass(frozen=True)
class Training:
    """How a block is trained.

    Args:
        iterations: steps; 200 is the paper's, 1000 its best.
        batches: calibration batches per step.
        scale_rate: Adam's rate for relative scales and for biases (in units of the output's deviation).
        evaluations: how often the loss on all batches is measured; the best state of those is kept.

    Raises:
        ValueError: a negative number, or no batch.
    """

    iterations: int = 200
    batches: int = 1
    scale_rate: float = 1e-3
    evaluations: int = 4

    def __post_init__(self) -> None:
        for name, low in (("iterations", 0), ("batches", 1), ("evaluations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                msg = f"Training: {name} must be a whole number of at least {low}, got {value!r}"
                raise ValueError(msg)
        if not self.scale_rate >= 0:
            msg = f"Training: scale_rate must be at least 0, got {self.scale_rate!r}"
            raise ValueError(msg)


@dataclass
class Call:
    """One call of the block: what the folded model feeds it, and what the float one would return."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    mask: Tensor | None  # bool, the leading dimensions of target; None counts all


def refine(
    block: nn.Module,
    folded: dict[str, tuple[PackedModule, Tensor]],
    calls: Sequence[Call],
    options: Mapping[str, Any],
) -> tuple[dict[str, Solution], dict[str, float]]:
    """Train the codes of a folded block.

    Batches are drawn from torch's generator: `torch.manual_seed` makes two runs alike.

    Args:
        block: with its matrices folded; left as it is.
        folded: name below the block -> (packed module, the float weight `[out, in]` it came from). Learned
            codebooks and formats with outliers stay as they are.
        calls: the data. Calls whose error is not finite (or that have no token that counts) are left out.
        options: of the method; `training` is a `Training`.

    Returns:
        name -> Solution, and the mean squared error, relative to the target's mean square, before and
        after; where training did not help, no solution, and where no call is left, no errors either.
    """
    training: Training = options.get("training") or Training()
    learners = {
        name: _Learner(module, weight)
        for name, (module, weight) in folded.items()
        if not module.format.code.startswith("kmeans") and not module.format.outliers
    }
    offsets = [learner.offset for learner in learners.values()]
    smooth = [tensor for learner in learners.values() for tensor in learner.smooth()]
    adam = torch.optim.Adam(smooth, lr=training.scale_rate) if smooth else None
    errors = _errors(block, learners, calls)
    calls = [call for call, error in zip(calls, errors, strict=True) if math.isfinite(error)]
    if not calls:
        return {}, {}
    before = best = sum(error for error in errors if math.isfinite(error)) / len(calls)
    if not learners:
        return {}, {"block_error_before": before, "block_error": before}
    kept: list[list[Tensor]] | None = None
    order = _endless(len(calls))
    every = math.ceil(training.iterations / max(training.evaluations, 1))
    for step in range(training.iterations):
        rate = 1 - step / training.iterations
        for _ in range(training.batches):
            call = calls[next(order)]
            with torch.enable_grad(), _in_place(block, learners):
                _add_gradients(_error(block, call) / training.batches, [*offsets, *smooth])
        for offset in offsets:
            if offset.grad is None:  # an expert that no token reached
                continue
            offset.data.sub_(offset.grad.sign(), alpha=rate / training.iterations).clamp_(-0.5, 0.5)
            offset.grad = None
        if adam is not None:
            adam.param_groups[0]["lr"] = training.scale_rate * rate
            adam.step()
            adam.zero_grad()
        if (step + 1) % every == 0 or step + 1 == training.iterations:
            error = sum(_errors(block, learners, calls)) / len(calls)
            if error < best:
                best, kept = error, [learner.state() for learner in learners.values()]
    report = {"block_error_before": before, "block_error": best}
    if kept is None:
        return {}, report
    for learner, state in zip(learners.values(), kept, strict=True):
        learner.load(state)
    return {name: learner.solution() for name, learner in learners.items()}, report


def _errors(block: nn.Module, learners: dict[str, _Learner], calls: Sequence[Call]) -> list[float]:
    with torch.no_grad(), _in_place(block, learners, stored=True):
        return [float(_error(block, call)) for call in calls]


def _add_gradients(loss: Tensor, tensors: Sequence[Tensor]) -> None:
    """As `loss.backward()`, for these tensors alone: parameters of the block get no gradients."""
    if not loss.requires_grad:  # the call went by all matrices
        return
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    for tensor, gradient in zip(tensors, found, strict=True):
        if gradient is not None:
            tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient


def _error(block: nn.Module, call: Call) -> Tensor:
    output = first_float(block(*call.args, **call.kwargs))
    target = call.target.to(output.device).float()
    difference = (output.float() - target).square().mean(dim=-1)
    power = target.square().mean(dim=-1)
    if call.mask is not None:
        counted = call.mask.to(output.device)
        difference, power = difference[counted], power[counted]
    return difference.mean() / power.mean().clamp_min(1e-20)


def first_float(output: Any) -> Tensor:
    """The first float tensor of what a module returned."""
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    msg = f"a block returned no float tensor but {type(output).__name__}; the learned method needs one"
    raise TypeError(msg)


def _endless(count: int) -> Iterator[int]:
    while True:
        yield from torch.randperm(count).tolist()


@contextmanager
def _in_place(block: nn.Module, learners: dict[str, _Learner], stored: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        for name, learner in learners.items():
            stack.enter_context(_forward_of(block.get_submodule(name), learner.forward(stored)))
        yield


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


class _Learner:
    """What of one packed matrix can be trained."""

    def __init__(self, module: PackedModule, weight: Tensor) -> None:
        self.module, self.fmt = module, module.format
        self.packed = list(module.packed())
        self.grid = grid = Grid.unpack(self.packed, self.fmt, module.shape)
        levels = torch.arange(2.0**self.fmt.bits) if grid.levels is None else grid.levels
        self.levels, self.code_of_rank = torch.sort(levels.to(weight.device), stable=True)
        self.rank = torch.argsort(self.code_of_rank)[grid.codes.long()].float()
        self.zero = grid.spread(grid.zero)
        value = weight.float() / grid.spread(grid.scale).clamp_min(1e-30) + self.zero
        gap = (self.levels[1:] - self.levels[:-1]).clamp_min(1e-12)
        self.gap = torch.cat([gap, gap[-1:]])
        beyond = (value - self.levels[self.rank.long()]) / self.gap[self.rank.long()]
        self.start = self.rank + beyond.clamp(-_INSIDE, _INSIDE)
        self.offset = torch.zeros_like(self.start, requires_grad=True)
        self.stretch = torch.zeros_like(grid.scale, requires_grad=not self.fmt.double_quant)
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach().float()
        self.shift = None if self.bias is None else torch.zeros_like(self.bias, requires_grad=True)

    def smooth(self) -> list[Tensor]:
        return [t for t in (self.stretch, self.shift) if t is not None and t.requires_grad]

    def state(self) -> list[Tensor]:
        return [t.detach().clone() for t in (self.offset, self.stretch, self.shift) if t is not None]

    def load(self, state: list[Tensor]) -> None:
        parts = [t for t in (self.offset, self.stretch, self.shift) if t is not None]
        for tensor, value in zip(parts, state, strict=True):
            tensor.data.copy_(value)

    def forward(self, stored: bool) -> Callable[[Tensor], Tensor]:
        """A forward for the module; `stored` computes with what would be stored."""
        weight = self._stored() if stored else self._weight()
        bias = self.bias
        if bias is not None and self.shift is not None:
            bias = bias + self.shift

        def forward(x: Tensor) -> Tensor:
            return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        return forward

    def _weight(self) -> Tensor:
        place = (self.start + self.offset).clamp(0, len(self.levels) - 1)
        rank = place.detach().round().long()
        # Straight through: a step from rank to rank counts as the gap there.
        unit = self.levels[rank] - self.zero + (place - place.detach()) * self.gap[rank]
        return unit * self.grid.spread(self.grid.scale * (1 + self.stretch))

    def _codes(self) -> Tensor:
        place = (self.start + self.offset.detach()).clamp(0, len(self.levels) - 1)
        return self.code_of_rank[place.round().long()].to(torch.uint8)

    def _pack(self) -> list[Tensor]:
        scale = self.grid.scale * (1 + self.stretch.detach())
        return Grid(self._codes(), scale, self.grid.zero, self.grid.group_size, self.grid.levels).pack(
            self.packed, self.fmt
        )

    def _stored(self) -> Tensor:
        from bitfold import ops

        return ops.dequantize(self._pack(), self.fmt, self.module.shape)

    def solution(self) -> Solution:
        shift = None if self.shift is None else self.shift.detach()
        return Solution(self._pack(), {}, shift)


@register("learned", calibrated=True, refine=refine, options_of="gptq")
def learned(
    weight: Tensor,
    fmt: Format,
    statistics: Statistics | None = None,
    *,
    training: Training | None = None,
    **options: Any,
) -> Solution:
    """Start from `gptq`; `refine` does the rest once all matrices of the block are folded."""
    del training  # for `refine`
    return gptq(weight, fmt, statistics, **options)
