"""From the statistics of one set to its packed matrices."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from bitfold import methods
from bitfold.calibration.distributed import Processes
from bitfold.calibration.guards import seeded
from bitfold.calibration.sets import MatrixSet
from bitfold.calibration.settings import Settings
from bitfold.calibration.statistics import InputStatistics, mean_of
from bitfold.choosing import Fold
from bitfold.methods import Solution

FALLBACK = "search"  # where there is no data, or next to none


def solve_set(
    matrices: MatrixSet,
    gathered: list[InputStatistics],
    folds: Mapping[str, Fold],
    method_of: Mapping[str, str],
    options: Mapping[str, Any],
    settings: Settings,
    processes: Processes,
    biased: Collection[str] = (),
) -> dict[str, Solution]:
    """Choose the codes of all matrices of a set; each is solved on one rank, all ranks get all.

    Args:
        matrices: the set; their modules are float still.
        gathered: statistics of its groups, of all data.
        folds: by name of the matrix.
        method_of: by name of the matrix.
        options: for calibrated methods.
        settings: treatment of experts, seed.
        processes: to share the work with.
        biased: names of matrices whose modules have a bias of their own.

    Returns:
        name -> Solution, whose report has become the matrix's line.
    """
    thin = [i for i, part in enumerate(gathered) if part.tokens < 4 * part.size]
    ranks = {i: round(gathered[i].effective_rank(), 1) for i in thin}
    blended = blend_experts(matrices, gathered, settings)
    jobs = [(name, i) for i, group in enumerate(matrices.groups) for name in group]
    finished = [part.finish() for part in gathered]

    def solve(number: int) -> Solution:
        name, i = jobs[number]
        part = gathered[i]
        line: dict[str, Any] = {"method": method_of[name], "tokens": part.tokens}
        if part.dropped:
            line["dropped_rows"] = part.dropped
        if part.unmasked:
            line["padding_counted"] = True
        if i in ranks:
            line["effective_rank"] = ranks[i]
        if i in blended:
            line["blended"] = round(blended[i], 4)
        floor = 1 if matrices.roles[i] is None else max(1, settings.expert_floor)
        if part.tokens < floor:
            line |= {"method": FALLBACK, "fallback": f"{part.tokens} tokens reached it, fewer than {floor}"}
            return fold_alone(folds[name], FALLBACK, line)
        start = time.perf_counter()
        with seeded(settings.seed, name):
            solution = methods.fold_weight(
                folds[name].owner.float_matrix(),
                folds[name].format,
                method_of[name],
                replace(finished[i], bias=name in biased),
                **options,
            )
        solution.report = {**line, **solution.report, "seconds": _since(start)}
        return solution

    shapes = [folds[name].owner.shape for name, _ in jobs]
    costs = [float(rows) * columns**2 + float(columns) ** 3 / 3 for rows, columns in shapes]
    formats = [folds[name].format for name, _ in jobs]
    solved = processes.solve(list(zip(formats, shapes, costs, strict=True)), solve)
    return {name: solution for (name, _), solution in zip(jobs, solved, strict=True)}


def fold_alone(fold: Fold, method: str, line: dict[str, Any]) -> Solution:
    """Fold a matrix without data; `line` is what to report of it."""
    start = time.perf_counter()
    solution = methods.fold_weight(fold.owner.float_matrix(), fold.format, method)
    solution.report = {**line, **solution.report, "seconds": _since(start)}
    return solution


def blend_experts(
    matrices: MatrixSet, gathered: list[InputStatistics], settings: Settings
) -> dict[int, float]:
    """Mix the mean over all experts of a role into those that few tokens reached.

    Returns:
        Group number -> share of the mean in the result.
    """
    shares: dict[int, float] = {}
    for role in dict.fromkeys(role for role in matrices.roles if role is not None):
        members = [i for i, other in enumerate(matrices.roles) if other == role]
        few = [
            i for i in members if max(1, settings.expert_floor) <= gathered[i].tokens < 4 * gathered[i].size
        ]
        if few and len(members) > 1:
            mean = mean_of([gathered[i] for i in members])
            for i in few:
                prior = gathered[i].size if settings.expert_prior is None else settings.expert_prior
                shares[i] = gathered[i].blend(mean, prior)
    return shares


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 4)
