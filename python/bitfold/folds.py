"""Places in a block where a scale per channel can be folded into the weights before and after, exactly.

A norm that feeds linears, a value projection and what reads its attention, the two ends of a gated MLP:
dividing the output channels of the one by s and multiplying the input columns of the others by s changes
nothing but what each of them is easy to quantize to (AWQ, arXiv 2306.00978). Nothing is known by name. A
candidate is tried: its output is scaled at random in a copy of the block, the linears whose input scales
along are found, column by column, and undone; where the block's output is then what it was, the fold is
legal. So norms with 1 + weight, grouped key-value heads, routers, experts and architectures yet to come are
covered, and a norm that also feeds a residual is not.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.nn.conv1d import is_conv1d

Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

TOLERANCE = 1e-5  # of the block's output, relative; the copy computes in float32
_PURE = 1e-4  # how exactly a column must be scaled
_ROUNDS = 4  # readers behind a router are found only once the router's own input is undone


@dataclass(frozen=True)
class ScaleFold:
    """A legal fold: the output of `source` may be divided by s `[channels]`, its readers' columns multiplied.

    Args:
        source: module whose weight (and bias) is divided; a norm or a linear, named relative to the block.
        form: `"gain"` (weight / s), `"one_plus_gain"` ((1 + weight) / s - 1) or `"rows"` (of a linear).
        channels: of the source's output.
        readers: module -> int64 `[in]`, the channel that each of its input columns carries, -1 for none.
    """

    source: str
    form: str
    channels: int
    readers: dict[str, Tensor] = field(hash=False)


@dataclass(frozen=True)
class Findings:
    """Legal folds in the order in which their sources run, and what stood against others."""

    folds: list[ScaleFold]
    refused: dict[str, str]


@torch.no_grad()
def find_folds(block: nn.Module, inputs: Inputs, shared: Collection[int] = ()) -> Findings:
    """Try every norm and linear of `block` as the source of a fold.

    Args:
        block: any float module, in eval mode; a float32 copy of it is made and thrown away.
        inputs: `(args, kwargs)` of one or more calls, a few dozen tokens in all; with experts enough to
            reach each of them.
        shared: `id` of parameters that modules outside of the block use too: they are left alone.

    Returns:
        Folds that leave the output the same to `TOLERANCE`, at most one per reader.

    Example:
        >>> block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        >>> found = find_folds(block.eval(), [((torch.randn(8, 16),), {})])
        >>> [(fold.source, fold.form, list(fold.readers)) for fold in found.folds]
        [('0', 'gain', ['1']), ('1', 'rows', ['3'])]
    """
    trial = _Trial(block, inputs, shared)
    folds: list[ScaleFold] = []
    refused: dict[str, str] = {}
    taken: set[str] = set()
    for name in trial.order:
        found = trial.try_source(name, taken)
        if isinstance(found, ScaleFold):
            folds.append(found)
            taken |= set(found.readers)
        elif found:
            refused[name] = found
    return Findings(folds, refused)


@torch.no_grad()
def holds(block: nn.Module, inputs: Inputs, folds: Sequence[ScaleFold], shared: Collection[int] = ()) -> bool:
    """Whether `folds`, found in a block like this one, are all legal here; much cheaper than `find_folds`."""
    trial = _Trial(block, inputs, shared)
    return trial.try_together(folds)


@torch.no_grad()
def apply_folds(block: nn.Module, folds: Sequence[ScaleFold], scales: Sequence[Tensor]) -> None:
    """Divide sources by their scale and multiply readers, in place; the block computes what it did.

    Args:
        block: that `folds` were found in.
        folds: any of them.
        scales: one per fold, `[channels]`, positive and finite; without effect on -1 columns.

    Raises:
        ValueError: a scale of another size, or not positive and finite.

    Example:
        >>> block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
        >>> x = torch.randn(5, 16)
        >>> expected, folds = block(x), find_folds(block, [((x,), {})]).folds
        >>> apply_folds(block, folds, [torch.rand(16) + 0.5])
        >>> bool(torch.allclose(block(x), expected, atol=1e-5))
        True
    """
    for fold, scale in zip(folds, scales, strict=True):
        if scale.shape != (fold.channels,):
            size = list(scale.shape)
            msg = f"apply_folds(): the scale of {fold.source} must be [{fold.channels}], got {size}"
            raise ValueError(msg)
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            msg = f"apply_folds(): the scale of {fold.source} must be positive and finite"
            raise ValueError(msg)
        _divide(block.get_submodule(fold.source), fold.form, scale)
        for name, channel in fold.readers.items():
            _multiply(block.get_submodule(name), columns_of(channel, scale))


def columns_of(channel: Tensor, scale: Tensor) -> Tensor:
    """The factor of each column `[in]` of a reader, from the scale `[channels]` and its `channel` map."""
    channel = channel.to(scale.device)
    return torch.where(channel >= 0, scale[channel.clamp_min(0)], torch.ones((), device=scale.device))


def is_matrix(module: nn.Module) -> bool:
    """Whether the module may be linear in its input: a 2-D float weight of its own, and no embedding."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 2
        and weight.is_floating_point()
        and not isinstance(module, nn.Embedding)
    )


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1 and weight.numel() > 1 and weight.is_floating_point()


def _in_features(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[0] if is_conv1d(module) else weight.shape[1])


def _divide(module: nn.Module, form: str, scale: Tensor) -> None:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    by = scale.float()
    if form == "one_plus_gain":
        weight.copy_((1 + weight.float()) / by - 1)
    elif form == "rows" and not is_conv1d(module):
        weight.copy_(weight.float() / by[:, None])
    else:
        weight.copy_(weight.float() / by)
    if bias is not None:
        bias.copy_(bias.float() / by)


def _multiply(module: nn.Module, columns: Tensor) -> None:
    weight: Any = module.weight
    by = columns.float()
    weight.copy_(weight.float() * (by[:, None] if is_conv1d(module) else by))


class _Trial:
    """A float32 copy of a block, scaled at random and put back."""

    def __init__(self, block: nn.Module, inputs: Inputs, shared: Collection[int]) -> None:
        names = dict(block.named_modules())
        uses = Counter(id(p) for module in names.values() for p in module._parameters.values())
        uses.update(dict.fromkeys(shared, 2))
        self._shared = {
            name
            for name, m in names.items()
            if any(uses[id(p)] > 1 for p in m._parameters.values() if p is not None)
        }
        self.block = copy.deepcopy(block).float()
        self._inputs = [(args, dict(kwargs)) for args, kwargs in pytree.tree_map(_widened, list(inputs))]
        self._modules = {n: m for n, m in self.block.named_modules() if is_matrix(m) or _is_norm(m)}
        self._matrices = [name for name, module in self._modules.items() if is_matrix(module)]
        self.order: list[str] = []
        self._base = self._run(order=self.order)

    def try_source(self, name: str, taken: set[str]) -> ScaleFold | str | None:
        """The legal fold out of module `name`; else why not, None if it feeds no linear by itself."""
        module = self._modules[name]
        outputs = self._base.outputs[name]
        if name in self._shared or not outputs:
            return "its weight is used by another module too" if outputs else None
        channels = outputs[0].shape[-1]
        if any(out.shape[-1] != channels for out in outputs) or not self._fits(module, channels):
            return None
        scale = _random_scale(channels).to(outputs[0].device)
        for form in ("rows",) if is_matrix(module) else ("gain", "one_plus_gain"):
            saved = [
                (p, p.clone())
                for m in self._modules.values()
                for p in m._parameters.values()
                if p is not None
            ]
            try:
                _divide(module, form, scale)
                found = self._search(name, form, scale, taken)
            finally:
                for parameter, value in saved:
                    parameter.copy_(value)
            if found != "its output does not scale with its weight":
                break
        return found

    def try_together(self, folds: Sequence[ScaleFold]) -> bool:
        """Whether the output stays with random scales in all of `folds`; leaves the copy changed."""
        names = {name for fold in folds for name in (fold.source, *fold.readers)}
        if not names <= self._modules.keys() or names & self._shared:
            return False
        for fold in folds:
            source, readers = self._modules[fold.source], fold.readers.items()
            if is_matrix(source) != (fold.form == "rows") or not self._fits(source, fold.channels):
                return False
            if any(
                not is_matrix(self._modules[n]) or _in_features(self._modules[n]) != len(c)
                for n, c in readers
            ):
                return False
        reached = {name for name in self._matrices if self._base.inputs[name]}
        siblings = {_role(name) for name in names & reached}
        if any(_role(name) not in siblings for name in names - reached if name in self._matrices):
            return False
        widths = {len(channel) for fold in folds for channel in fold.readers.values()}
        unreached = set(self._matrices) - reached - names
        if any(_in_features(self._modules[name]) in widths for name in unreached):
            return False
        apply_folds(self.block, folds, [_random_scale(fold.channels) for fold in folds])
        return _distance(self._base.result, self._run().result) <= TOLERANCE

    @staticmethod
    def _fits(module: nn.Module, channels: int) -> bool:
        weight: Any = module.weight
        return channels == (weight.shape[-1] if weight.ndim == 1 or is_conv1d(module) else weight.shape[0])

    def _search(self, name: str, form: str, scale: Tensor, taken: set[str]) -> ScaleFold | str | None:
        now = self._run()
        # (Of the first call: in later ones of a shared norm what it changed before comes back.)
        if not _scaled_by(self._base.outputs[name][:1], now.outputs[name][:1], scale):
            return "its output does not scale with its weight"
        readers: dict[str, Tensor] = {}
        for _ in range(_ROUNDS):
            new: dict[str, Tensor] = {}
            for other in self._matrices:
                if other in readers or other == name:
                    continue
                channel = _channels_read(self._base.inputs[other], now.inputs[other], scale)
                if channel is not None:
                    new[other] = channel
            if not new:
                break
            for other, channel in new.items():
                _multiply(self._modules[other], columns_of(channel, scale))
            readers |= new
            now = self._run()
        if not readers:
            return None
        obstacle = self._add_unreached(readers) or self._obstacle(readers, taken)
        if obstacle:
            return obstacle
        error = _distance(self._base.result, now.result)
        if not error <= TOLERANCE:
            return (
                f"it feeds more than {', '.join(readers)}: the output of the block would move by {error:.1e}"
            )
        readers = {reader: readers[reader] for reader in self._matrices if reader in readers}
        return ScaleFold(name, form, scale.numel(), {k: v.cpu() for k, v in readers.items()})

    def _add_unreached(self, readers: dict[str, Tensor]) -> str | None:
        """Experts that no token of the probe reached read what their siblings read."""
        roles = {_role(reader): channel for reader, channel in readers.items()}
        for other in self._matrices:
            if self._base.inputs[other]:
                continue
            channel = roles.get(_role(other))
            if channel is not None:
                readers[other] = channel
            elif _in_features(self._modules[other]) in {len(c) for c in readers.values()}:
                return f"it might feed {other}, which the probe did not reach"
        return None

    def _obstacle(self, readers: Collection[str], taken: set[str]) -> str | None:
        if both := sorted(set(readers) & taken):
            return f"the input of {both[0]} has a scale from another source already"
        if both := sorted(set(readers) & self._shared):
            return f"the weight of {both[0]} is used by another module too"
        return None

    def _run(self, order: list[str] | None = None) -> _Pass:
        seen = _Pass({name: [] for name in self._modules}, {name: [] for name in self._modules}, [])

        def before(name: str, args: Any, kwargs: Any) -> None:
            if order is not None and name not in order:
                order.append(name)
            seen.inputs[name] += _tensors((args, kwargs))[:1]

        def after(name: str, output: Any) -> None:
            seen.outputs[name] += _tensors(output)[:1]

        handles = []
        for name, module in self._modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda *call, name=name: after(name, call[2])))
        try:
            for args, kwargs in self._inputs:
                args, kwargs = copy.deepcopy((args, kwargs))  # noqa: PLW2901 - forwards may write into theirs
                seen.result += _tensors(self.block(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        return seen


@dataclass
class _Pass:
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    result: list[Tensor]


def _tensors(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _random_scale(channels: int) -> Tensor:
    """From 1.25 to 5, all distinct and evenly apart, in random order: a factor tells its channel."""
    generator = torch.Generator().manual_seed(channels)
    steps = (torch.arange(channels) + 0.5) / channels
    return (1.25 * 4**steps)[torch.randperm(channels, generator=generator)]


def _rows(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1, t.shape[-1]) for t in tensors]).double()


def _comparable(before: list[Tensor], now: list[Tensor]) -> bool:
    return bool(before) and [t.shape for t in before] == [t.shape for t in now] and before[0].ndim > 0


def _scaled_by(before: list[Tensor], now: list[Tensor], scale: Tensor) -> bool:
    if not _comparable(before, now):
        return False
    old, new = _rows(before), _rows(now) * scale.double()
    return bool((old - new).norm() <= _PURE * old.norm())


def _channels_read(before: list[Tensor], now: list[Tensor], scale: Tensor) -> Tensor | None:
    """Which channel each column carries, if every column is scaled by that of one channel or by none."""
    if not _comparable(before, now):
        return None
    old, new = _rows(before), _rows(now)
    power = (new * new).sum(0)
    dead = power == 0
    ratio = (old * new).sum(0) / power.masked_fill(dead, 1.0)
    off = (old - ratio * new).norm(dim=0)
    if bool((off > _PURE * old.norm(dim=0)).any()) or bool((old.norm(dim=0)[dead] > 0).any()):
        return None
    known = torch.cat([scale.double(), torch.ones(1, device=scale.device, dtype=torch.float64)])
    ordered, place = known.log().sort()
    wanted = ratio.masked_fill(dead, 1.0).clamp_min(1e-30).log()
    right = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    left = (right - 1).clamp_min(0)
    nearest = torch.where((ordered[right] - wanted).abs() < (ordered[left] - wanted).abs(), right, left)
    if bool(((ordered[nearest] - wanted).abs() > 0.25 / len(known)).any()):
        return None
    channel = place[nearest]
    channel[channel == scale.numel()] = -1
    if bool(dead.any()) and not _fill_dead(channel, dead, scale.numel()):
        return None
    return channel if bool((channel >= 0).any()) else None


def _fill_dead(channel: Tensor, dead: Tensor, channels: int) -> bool:
    """Columns that were zero for all tokens show no factor: they follow the others where the map is plain."""
    own = torch.arange(len(channel), device=channel.device)
    if len(channel) != channels or not bool((channel == own)[~dead].all()) or bool(dead.all()):
        return False
    channel[dead] = own[dead]
    return True


def _distance(before: list[Tensor], now: list[Tensor]) -> float:
    """|now - before| / |before| of the worst tensor; infinite where shapes differ."""
    if [t.shape for t in before] != [t.shape for t in now] or not before:
        return float("inf")
    worst = 0.0
    for old, new in zip(before, now, strict=True):
        size = float(old.double().norm())
        worst = max(worst, float((new.double() - old.double()).norm()) / max(size, 1e-30))
    return worst


def _role(name: str) -> str:
    """`experts.3.w1` -> `experts.*.w1`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
