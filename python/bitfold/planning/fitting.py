"""Formats for groups of matrices that keep a file within a budget, with its header counted exactly."""

from __future__ import annotations

from collections.abc import Sequence

from bitfold.choosing import Fold
from bitfold.errors import BudgetError
from bitfold.formats import Format
from bitfold.planning.candidates import Group
from bitfold.planning.file_bytes import FileBytes
from bitfold.planning.knapsack import solve
from bitfold.planning.sensitivity import Losses

__all__ = ["Fitting"]

_HEADER_SLACK = 1024  # bytes by which the sum of costs may differ from the exact change of a file


class Fitting:
    """The choices that there are for one model; a choice is the index of a format for each group.

    Args:
        files: tells the size of the file for given formats.
        folds: the matrices, as `files` has them.
        groups: shares them out; each has its formats.
    """

    def __init__(self, files: FileBytes, folds: Sequence[Fold], groups: Sequence[Group]) -> None:
        self._files = files
        self._folds = folds
        self._groups = groups
        self._costs = [
            [sum(files.cost(i, fmt) for i in group.members) for fmt in group.formats] for group in groups
        ]
        self._smallest = [costs.index(min(costs)) for costs in self._costs]
        self.smallest_bytes = self.total(self._smallest)

    def formats(self, chosen: Sequence[int]) -> list[Format]:
        """The format of each matrix."""
        by_fold = {
            i: group.formats[option]
            for group, option in zip(self._groups, chosen, strict=True)
            for i in group.members
        }
        return [by_fold[i] for i in range(len(by_fold))]

    def total(self, chosen: Sequence[int]) -> int:
        """Bytes of the file, header included."""
        return self._files.total(self.formats(chosen))

    def check_feasible(self, budget: int) -> None:
        """Raise BudgetError, naming the smallest file and its largest parts, if that is above `budget`."""
        if self.smallest_bytes <= budget:
            return
        before = self._files.total([None] * len(self._folds))
        parts = [(f"{name} (float)", nbytes) for name, nbytes in self._files.floats()]
        for i, fmt in enumerate(self.formats(self._smallest)):
            parts.append((f"{self._folds[i].owner.name} ({fmt})", self._files.cost(i, fmt)))
        parts.sort(key=lambda part: -part[1])
        listed = ", ".join(f"{name} {nbytes:,} bytes" for name, nbytes in parts[:5])
        msg = (
            f"the file cannot be as small as {budget:,} bytes ({before / budget:.3f}x): the smallest choice "
            f"takes {self.smallest_bytes:,} bytes ({before / self.smallest_bytes:.3f}x). Its largest parts: "
            f"{listed}. Ask for less, or allow smaller formats (min_bits, formats, embeddings), or fold what "
            "skip, rules or embeddings=None leave in float"
        )
        raise BudgetError(msg)

    def solve(self, losses: Losses, budget: int) -> list[int]:
        """The choice of least loss whose file is within `budget`, which `check_feasible` has passed.

        The header depends a little on all choices together (digits of offsets). So what the sum of costs
        leaves out is taken from the last solution, until one fits; then what bytes are left are used.
        """
        tables = [
            [
                (cost, losses.get(group.name, {}).get(str(fmt), 0.0))
                for cost, fmt in zip(costs, group.formats, strict=True)
            ]
            for group, costs in zip(self._groups, self._costs, strict=True)
        ]
        chosen = self._smallest
        others = self._beyond_costs(chosen)
        for _ in range(8):
            found = solve(tables, budget - others)
            if found is None:
                break
            if self.total(found) <= budget:
                chosen = found
                break
            others = max(others + 1, self._beyond_costs(found))
        return self._use_what_is_left(tables, chosen, budget)

    def next_ratios(self, chosen: Sequence[int]) -> tuple[float | None, float | None]:
        """Ratios of the nearest larger and the nearest smaller file that one group's change gives."""
        changes = [
            (cost - costs[chosen[i]], i, new)
            for i, costs in enumerate(self._costs)
            for new, cost in enumerate(costs)
        ]
        larger = min((change for change in changes if change[0] > 0), default=None)
        smaller = max((change for change in changes if change[0] < 0), default=None)
        before = self._files.total([None] * len(self._folds))

        def ratio(change: tuple[int, int, int] | None) -> float | None:
            if change is None:
                return None
            _, i, new = change
            return before / self.total([*chosen[:i], new, *chosen[i + 1 :]])

        return ratio(larger), ratio(smaller)

    def _beyond_costs(self, chosen: Sequence[int]) -> int:
        return self.total(chosen) - sum(
            costs[option] for costs, option in zip(self._costs, chosen, strict=True)
        )

    def _use_what_is_left(
        self, tables: Sequence[Sequence[tuple[int, float]]], chosen: list[int], budget: int
    ) -> list[int]:
        """While some single group can change for less loss within the budget, take the best such change."""
        while True:
            left = budget - self.total(chosen) + _HEADER_SLACK
            changes = [
                (table[new][1] - table[chosen[i]][1], i, new)
                for i, table in enumerate(tables)
                for new in range(len(table))
                if table[new][1] < table[chosen[i]][1] and table[new][0] - table[chosen[i]][0] <= left
            ]
            for _, i, new in sorted(changes):
                trial = [*chosen[:i], new, *chosen[i + 1 :]]
                if self.total(trial) <= budget:
                    chosen = trial
                    break
            else:
                return chosen
