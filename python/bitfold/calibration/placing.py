"""Packed modules take the places of float ones, matrix by matrix; the stage in work can be seen as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitfold import methods
from bitfold.calibration.guards import Originals
from bitfold.calibration.report import Log, peak_rss_bytes
from bitfold.calibration.solving import fold_alone
from bitfold.choosing import Fold
from bitfold.errors import WeightError
from bitfold.manifest import PACKED_KINDS, bias_owner
from bitfold.methods import Solution
from bitfold.nn._places import Places
from bitfold.progress import Advance
from bitfold.swapping import swaps_of

# In a line, what is of the codes.
_LOSSES = {
    "loss",
    "loss_damped",
    "loss_feedback",
    "measured",
    "plain",
    "plain_damped",
    "predicted",
    "tracked",
}


class Placing:
    """Puts solutions into a model, and records a line of each.

    Args:
        model: changed in place.
        todo: name of a matrix -> its Fold; whatever is put in place is taken out.
        method_of: by name of the matrix.
        log: for the lines.
        advance: called with the name of each matrix that is done.
        float_stream: the float model runs beside the folded one, so modules folded without data are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        todo: dict[str, Fold],
        method_of: Mapping[str, str],
        log: Log,
        advance: Advance,
        float_stream: bool,
    ) -> None:
        self.model, self.todo, self.log, self.advance = model, todo, log, advance
        self.originals = Originals()
        self.refinable: dict[str, Fold] = {}  # of the stage in work, where the method refines it
        self._unfinished: list[dict[str, Any]] = []  # lines of those
        self._method_of, self._float_stream = method_of, float_stream
        self._places = Places(model)

    def put(self, name: str, solution: Solution, quiet: bool = False) -> None:
        """Swap the packed module in; `quiet` records no line."""
        fold = self.todo.pop(name)
        owner, shape = fold.owner, fold.owner.shape
        if methods.refinement(self._method_of[name]) is not None:
            self.refinable[name] = fold
        if solution.bias_shift is not None and bias_owner(self.model, owner.module) is not None:
            solution = Solution(solution.packed, solution.report)  # another module adds this bias too
        try:
            packed = PACKED_KINDS[owner.kind].from_float(owner.module, fold.format, solution=solution)
        except WeightError as error:
            raise WeightError(f"{name}: {error}") from error  # noqa: EM102
        swaps = swaps_of(self.model, fold, packed)
        self.originals.remember(self._places, swaps)
        self._places.replace(swaps)
        if not quiet:
            line = {"name": name, "shape": list(shape), "format": str(fold.format), **solution.report}
            line["peak_rss_bytes"] = peak_rss_bytes()
            if name in self.refinable:
                self._unfinished.append(line)
            else:
                self.log.add(line)
        self.advance(name)

    def put_alone(self, name: str, method: str, **remarks: Any) -> None:
        """Fold a matrix without data and swap it in."""
        line = {"method": method, **remarks}
        self.put(name, fold_alone(self.todo[name], method, line))

    def fold_data_free(self, folds: list[Fold]) -> None:
        """Fold what needs no data; `folds` is emptied."""
        while folds:
            fold = folds.pop(0)
            name = fold.owner.name
            self.todo[name] = fold
            self.put_alone(name, self._method_of[name])
        if self._float_stream:
            self.originals.keep()
        else:
            self.originals.forget()

    def has_bias(self, name: str) -> bool:
        """Whether the matrix has a bias that no other module adds."""
        module = self.todo[name].owner.module
        return getattr(module, "bias", None) is not None and bias_owner(self.model, module) is None

    def record_refined(self, remarks: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the lines that waited for the block to be refined.

        Args:
            remarks: name of a matrix whose codes are others now -> what to say of it. Its losses are those of
                the codes before, and are called so.
        """
        for line in self._unfinished:
            told = line
            if line["name"] in remarks:
                told = {f"{key}_before" if key in _LOSSES else key: value for key, value in line.items()}
                told |= {"refined": True, **remarks[line["name"]]}
            self.log.add(told)
        self._unfinished = []

    def finish_stage(self) -> None:
        """Release what was there before: from here on the stage is as it is."""
        self.originals.forget()
        self.refinable.clear()
