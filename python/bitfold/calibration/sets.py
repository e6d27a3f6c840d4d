"""Sets within a stage: which matrices run when, which share one input, which are experts of one role."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitfold.calibration.blocks import Stage, call_order, depends
from bitfold.calibration.replay import run, stop_after
from bitfold.outputs import Batch


@dataclass(frozen=True)
class MatrixSet:
    """Matrices whose statistics are gathered in one pass.

    Args:
        groups: names of matrices; those of one group are fed the same tensor and share one Hessian.
        roles: group number -> role, the same for the groups of all experts that do the same; None for
            matrices that are no experts.
        once: each was called exactly once in the trace, so a pass can end at the last of them.
    """

    groups: tuple[tuple[str, ...], ...]
    roles: tuple[str | None, ...]
    once: bool

    @staticmethod
    def joined(sets: list[MatrixSet]) -> MatrixSet:
        """All of `sets` as one."""
        groups = tuple(group for part in sets for group in part.groups)
        roles = tuple(role for part in sets for role in part.roles)
        return MatrixSet(groups, roles, all(part.once for part in sets))


@dataclass
class _Unit:
    """One matrix, or the same matrix of all experts."""

    members: list[str]
    role: str | None
    source: Any = None  # the tensor that it was fed, held so that its identity cannot be reused
    version: int = 0  # of `source`, which may be written into before the next matrix reads it
    calls: int = 0


def find_sets(
    model: nn.Module, stage: Stage, batch: Batch, stubs: dict[str, Callable[[], Any]], todo: Collection[str]
) -> list[MatrixSet]:
    """The matrices of `todo` in `stage` as sets, in the order in which they run on `batch`."""
    names = [name for name in stage.matrices if name in todo]
    experts = _expert_lists(model, stage, batch, stubs, names)
    units: dict[str, _Unit] = {}
    owner: dict[str, _Unit] = {}
    for name in names:
        role = _role(name, experts)
        owner[name] = units.setdefault(role or name, _Unit([], role))
        owner[name].members.append(name)
    order: list[_Unit] = []

    def seen(unit: _Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unit.calls += 1
        if unit.source is None:
            unit.source = next(
                (value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None
            )
            unit.version = -1 if unit.source is None else unit.source._version
            order.append(unit)

    hooks = {name: partial(seen, owner[name]) for name in names}
    run(model, batch, stubs=stubs, before=hooks, after=stop_after(stage.block))
    sets: list[list[_Unit]] = []
    for unit in order:
        home = next((units for units in sets if _same_input(units[0], unit)), None)
        if home is None:
            sets.append([unit])
        else:
            home.append(unit)
    never = [unit for unit in units.values() if unit not in order]
    return [_as_set(units) for units in [*sets, *([unit] for unit in never)]]


def _as_set(units: list[_Unit]) -> MatrixSet:
    groups: dict[Any, list[str]] = {}
    roles: dict[Any, str | None] = {}
    for unit in units:
        for number, name in enumerate(unit.members):
            key = None if unit.role is None else (number,)
            groups.setdefault(key, []).append(name)
            roles.setdefault(key, units[0].role)
    once = all(unit.role is None and unit.calls == 1 for unit in units)
    return MatrixSet(tuple(tuple(group) for group in groups.values()), tuple(roles.values()), once)


def _same_input(one: _Unit, other: _Unit) -> bool:
    a: Tensor | None = one.source
    b: Tensor | None = other.source
    if a is None or b is None or one.version != other.version:
        return False
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
    )


def _expert_lists(
    model: nn.Module, stage: Stage, batch: Batch, stubs: dict[str, Callable[[], Any]], names: list[str]
) -> list[str]:
    """ModuleLists in the stage whose children run side by side, not one after the other."""
    found = []
    for path, module in model.named_modules():
        inside = stage.block is None or path.startswith(f"{stage.block}.")
        if not inside or not isinstance(module, nn.ModuleList):
            continue
        children = [f"{path}.{key}" for key, _ in module.named_children()]
        children = [child for child in children if any(_is_below(name, child) for name in names)]
        if len(children) < 2 or len({type(model.get_submodule(child)) for child in children}) > 1:
            continue
        called = list(dict.fromkeys(call_order(model, batch, children, stubs, stage.block)))
        if len(called) < 2 or not depends(model, batch, called[0], called[1], stubs):
            found.append(path)
    return found


def _is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def _role(name: str, experts: list[str]) -> str | None:
    """`…experts.3.w1` -> `…experts.*.w1` for what lies in a list of experts."""
    for path in experts:
        if name.startswith(path + "."):
            _, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.*.{rest}".removesuffix(".")
    return None
