"""A float32 copy of a block, scaled at random and put back."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.folds.scaling import ScaleFold, apply_folds, columns_of, divide, multiply
from bitfold.folds.signals import channels_read, distance, random_scale, scaled_by
from bitfold.nn.conv1d import is_conv1d

Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]

TOLERANCE = 1e-5  # of the block's output, relative; the copy computes in float32
_ROUNDS = 4  # readers behind a router are found only once the router's own input is undone


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


class Trial:
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
        scale = random_scale(channels).to(outputs[0].device)
        for form in ("rows",) if is_matrix(module) else ("gain", "one_plus_gain"):
            saved = [
                (p, p.clone())
                for m in self._modules.values()
                for p in m._parameters.values()
                if p is not None
            ]
            try:
                divide(module, form, scale)
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
        apply_folds(self.block, folds, [random_scale(fold.channels) for fold in folds])
        return distance(self._base.result, self._run().result) <= TOLERANCE

    @staticmethod
    def _fits(module: nn.Module, channels: int) -> bool:
        weight: Any = module.weight
        return channels == (weight.shape[-1] if weight.ndim == 1 or is_conv1d(module) else weight.shape[0])

    def _search(self, name: str, form: str, scale: Tensor, taken: set[str]) -> ScaleFold | str | None:
        now = self._run()
        # (Of the first call: in later ones of a shared norm what it changed before comes back.)
        if not scaled_by(self._base.outputs[name][:1], now.outputs[name][:1], scale):
            return "its output does not scale with its weight"
        readers: dict[str, Tensor] = {}
        for _ in range(_ROUNDS):
            new: dict[str, Tensor] = {}
            for other in self._matrices:
                if other in readers or other == name:
                    continue
                channel = channels_read(self._base.inputs[other], now.inputs[other], scale)
                if channel is not None:
                    new[other] = channel
            if not new:
                break
            for other, channel in new.items():
                multiply(self._modules[other], columns_of(channel, scale))
            readers |= new
            now = self._run()
        if not readers:
            return None
        obstacle = self._add_unreached(readers) or self._obstacle(readers, taken)
        if obstacle:
            return obstacle
        error = distance(self._base.result, now.result)
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


def _role(name: str) -> str:
    """`experts.3.w1` -> `experts.*.w1`."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
