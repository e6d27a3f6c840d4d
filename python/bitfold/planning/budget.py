"""bitfold.plan: formats for all matrices of a model that keep the file within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bitfold.choosing import Choice, choose
from bitfold.errors import BudgetError
from bitfold.formats import Format, as_format
from bitfold.nn._base import check_finite
from bitfold.outputs import Batch, read_batches
from bitfold.planning import candidates
from bitfold.planning.candidates import Group
from bitfold.planning.file_bytes import FileBytes
from bitfold.planning.knapsack import solve
from bitfold.planning.plans import Plan
from bitfold.planning.sensitivity import MEASURES, Losses, choose_measure, measure

__all__ = ["plan"]


def plan(
    model: nn.Module,
    target_ratio: float | None = None,
    *,
    target_bytes: int | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
    formats: Iterable[Format | str] | None = None,
    calibration: Iterable[Any] | None = None,
    sensitivity: str | Plan = "auto",
    embeddings: Format | str | None = "auto",
    skip: Iterable[str] = (),
    rules: Mapping[str, Format | str | None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Choose a Format for every matrix of `model` so that the whole file is small enough and the loss is least.

    The loss of each candidate is measured for each group of matrices alone, on the float model, with scales by
    search; then the sum of losses is minimized exactly under the budget. Matrices that a fused
    kernel would read together (queries, keys and values of one attention, gate and up projections, all experts
    of a layer; told by name and shape) take one choice. The model is not changed.

    Args:
        model: a float model, in fp32, fp16 or bf16.
        target_ratio: bytes of the float model's file by those of the folded one's, at least; embeddings,
            metadata and headers counted.
        target_bytes: instead of a ratio: bytes of the file, at most.
        min_bits, max_bits: 2 to 8: bits of the element codes to choose from.
        formats: candidates, instead of `planning.candidates.LADDER`.
        calibration: batches that the losses are measured on: dicts of forward arguments, tensors, or tuples
            of arguments. Take others than those that a calibrated method is given afterwards.
        sensitivity: `"kl"` (each group folded alone, divergence of the logits), `"output"` (error of each
            layer's outputs), `"weight"` (error of the weights, without data); `"auto"` is KL where that takes
            minutes, else output; weight where there is no calibration. Or an earlier Plan for the same
            model, whose measured losses are taken.
        embeddings: `"auto"` chooses for embeddings and output heads as for the rest, but from 4 bits up as
            long as the budget allows; or a Format for the embeddings, or None to leave them in float.
        skip, rules: as for `bitfold.quantize`; a Format that a rule names is kept.
        seed: chooses the rows that losses are measured on.
        progress: show a bar, where tqdm is installed.

    Returns:
        A Plan whose `file_bytes` are within the budget.

    Raises:
        BudgetError: even the smallest choice is too large; names its bytes, and what takes them.
        CoverageError, FormatError, WeightError: as `bitfold.quantize`.
        ActivationError: the model puts out NaN or infinity.
        ValueError: contradicting or impossible arguments.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
        >>> made = plan(model, 7.0, progress=False)
        >>> made.ratio >= 7.0
        True
    """
    _check_arguments(target_ratio, target_bytes, sensitivity, calibration)
    linear = candidates.ladder(formats, min_bits, max_bits)
    fixed = None if embeddings is None or embeddings == "auto" else as_format(embeddings)
    choice = choose(
        model, linear[0], embeddings=linear[0] if embeddings == "auto" else fixed, skip=skip, rules=rules
    )
    choice.check_coverage()
    if not choice.folds:
        msg = f"plan(): {type(model).__name__} has no matrix to fold; nothing can be planned"
        raise ValueError(msg)
    for fold in choice.folds:
        if fold.done:
            msg = f"{fold.owner.name}: folded in {fold.format} already; plan for the float model"
            raise ValueError(msg)
        check_finite(fold.owner.module.weight, f"{fold.owner.name}.weight")
    files = FileBytes(model, choice.folds)
    budget = target_bytes if target_bytes is not None else _budget(files, choice, target_ratio)
    if fixed is not None or embeddings is None:
        groups, notes = _with_fixed_tables(candidates.group_folds(model, choice, linear, linear), choice, fixed), []
    else:
        groups, notes = _open_groups(model, choice, linear, files, budget)
    _check_feasible(files, choice, groups, budget)

    batches = list(read_batches(calibration, "plan(): calibration")) if calibration is not None else []
    kind, losses = _losses(sensitivity, model, choice, groups, batches, seed, progress)
    tables = [_options(files, group, losses) for group in groups]
    chosen = _solve(files, groups, tables, budget)
    made = _expand(groups, chosen)
    members = {i: group.name for group in groups for i in group.members}
    return Plan.made(
        choice,
        files,
        made,
        groups=[members[i] for i in range(len(choice.folds))],
        measure=kind,
        losses=losses,
        next_ratio=_next_ratios(files, choice, groups, tables, chosen),
        notes=tuple(notes),
    )


def _check_arguments(
    target_ratio: float | None, target_bytes: int | None, sensitivity: str | Plan, calibration: Any
) -> None:
    if (target_ratio is None) == (target_bytes is None):
        msg = "plan(): expected either target_ratio (such as 8.0) or target_bytes, got " + (
            "neither" if target_ratio is None else "both"
        )
        raise ValueError(msg)
    target = target_ratio if target_bytes is None else target_bytes
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < math.inf:
        msg = f"plan(): the target must be a positive number, got {target!r}"
        raise ValueError(msg)
    if isinstance(sensitivity, Plan):
        return
    if sensitivity not in ("auto", *MEASURES):
        allowed = ", ".join(("auto", *MEASURES))
        msg = f"plan(): sensitivity must be one of {allowed}, or a Plan, got {sensitivity!r}"
        raise ValueError(msg)
    if sensitivity in ("kl", "output") and calibration is None:
        msg = f"plan(): sensitivity {sensitivity!r} is measured on data; pass calibration=[batches]"
        raise ValueError(msg)


def _budget(files: FileBytes, choice: Choice, ratio: float | None) -> int:
    return int(files.total([None] * len(choice.folds)) / (ratio or 1.0))


def _with_fixed_tables(groups: list[Group], choice: Choice, fixed: Format | None) -> list[Group]:
    """Groups of embeddings keep the format that the caller named."""
    for group in groups:
        folds = [choice.folds[i] for i in group.members]
        is_table = any(use.kind == "embedding" for fold in folds for use in (fold.owner, *fold.tied))
        if is_table and fixed is not None and not folds[0].explicit:
            group.formats = [fixed]
    return groups


def _open_groups(
    model: nn.Module, choice: Choice, linear: list[Format], files: FileBytes, budget: int
) -> tuple[list[Group], list[str]]:
    """Groups with embeddings and heads from four bits up, or from the smallest where nothing else fits."""
    table = [fmt for fmt in linear if fmt.bits >= candidates.TABLE_BITS]
    if table:
        groups = candidates.group_folds(model, choice, linear, table)
        if files.total(_smallest(files, groups)) <= budget or len(table) == len(linear):
            return groups, []
    note = "embeddings and heads: below 4 bits allowed, as the budget cannot be met otherwise" if table else ""
    return candidates.group_folds(model, choice, linear, linear), [note] if note else []


def _smallest(files: FileBytes, groups: Sequence[Group]) -> list[Format]:
    costs = [[_cost(files, group, fmt) for fmt in group.formats] for group in groups]
    return _expand(groups, [sizes.index(min(sizes)) for sizes in costs])


def _cost(files: FileBytes, group: Group, fmt: Format) -> int:
    return sum(files.cost(i, fmt) for i in group.members)


def _expand(groups: Sequence[Group], chosen: Sequence[int]) -> list[Format]:
    """The format of each fold, from the option of each group."""
    by_fold = {i: group.formats[option] for group, option in zip(groups, chosen, strict=True) for i in group.members}
    return [by_fold[i] for i in range(len(by_fold))]


def _check_feasible(files: FileBytes, choice: Choice, groups: Sequence[Group], budget: int) -> None:
    formats = _smallest(files, groups)
    least = files.total(formats)
    if least <= budget:
        return
    float_bytes = files.total([None] * len(formats))
    parts = [(f"{name} (float)", nbytes) for name, nbytes in files.floats()]
    for i, (fold, fmt) in enumerate(zip(choice.folds, formats, strict=True)):
        parts.append((f"{fold.owner.name} ({fmt})", files.cost(i, fmt)))
    parts.sort(key=lambda part: -part[1])
    listed = ", ".join(f"{name} {nbytes:,} bytes" for name, nbytes in parts[:5])
    msg = (
        f"the file cannot be as small as {budget:,} bytes ({float_bytes / budget:.3f}x): the smallest choice takes "
        f"{least:,} bytes ({float_bytes / least:.3f}x). Largest parts of it: {listed}. Ask for less, or allow smaller "
        "formats (min_bits, formats, embeddings), or fold what skip, rules or embeddings=None leave in float"
    )
    raise BudgetError(msg)


def _losses(
    sensitivity: str | Plan,
    model: nn.Module,
    choice: Choice,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int,
    progress: bool,
) -> tuple[str, Losses]:
    if isinstance(sensitivity, Plan):
        for group in groups:
            known = sensitivity.losses.get(group.name, {})
            absent = [str(fmt) for fmt in group.formats if str(fmt) not in known]
            if absent and len(group.formats) > 1:
                msg = f"{group.name}: the plan given as sensitivity has not measured {', '.join(absent)}"
                raise ValueError(msg)
        return sensitivity.measure, {name: dict(found) for name, found in sensitivity.losses.items()}
    kind = choose_measure(model, groups, batches) if sensitivity == "auto" else sensitivity
    with _bar(sum(len(group.formats) > 1 for group in groups), f"measuring {kind}", progress) as advance:
        return kind, measure(kind, model, choice.folds, groups, batches, seed, advance)


@contextmanager
def _bar(total: int, title: str, progress: bool) -> Iterator[Callable[[str], None]]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda name: None  # noqa: ARG005
        return
    with tqdm(total=total, desc=title, unit="group") as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield advance


def _options(files: FileBytes, group: Group, losses: Losses) -> list[tuple[int, float]]:
    known = losses.get(group.name, {})
    return [(_cost(files, group, fmt), known.get(str(fmt), 0.0)) for fmt in group.formats]


def _solve(
    files: FileBytes, groups: Sequence[Group], tables: Sequence[list[tuple[int, float]]], budget: int
) -> list[int]:
    """The options of least loss whose file is within the budget.

    The header's length depends a little on all choices together (digits of offsets), so what is not the sum of
    costs is taken from the last solution until one fits; then single groups take what bytes are left.
    """

    def total(chosen: Sequence[int]) -> int:
        return files.total(_expand(groups, chosen))

    def costs(chosen: Sequence[int]) -> int:
        return sum(table[option][0] for table, option in zip(tables, chosen, strict=True))

    smallest = [min(range(len(table)), key=lambda i: table[i][0]) for table in tables]  # noqa: B023
    chosen, others = smallest, total(smallest) - costs(smallest)
    for _ in range(8):
        found = solve(tables, budget - others)
        if found is None:
            break
        if total(found) <= budget:
            chosen = found
            break
        others = max(others + 1, total(found) - costs(found))
    return _use_what_is_left(tables, chosen, total, budget)


def _use_what_is_left(
    tables: Sequence[list[tuple[int, float]]],
    chosen: list[int],
    total: Callable[[Sequence[int]], int],
    budget: int,
) -> list[int]:
    """While some single group can change for less loss within the budget, take the best such change."""
    while True:
        left = budget - total(chosen) + 1024  # costs are near enough to rule out most changes
        changes = [
            (table[new][1] - table[chosen[i]][1], i, new)
            for i, table in enumerate(tables)
            for new in range(len(table))
            if table[new][1] < table[chosen[i]][1] and table[new][0] - table[chosen[i]][0] <= left
        ]
        for _, i, new in sorted(changes):
            trial = [*chosen[:i], new, *chosen[i + 1 :]]
            if total(trial) <= budget:
                chosen = trial
                break
        else:
            return chosen


def _next_ratios(
    files: FileBytes,
    choice: Choice,
    groups: Sequence[Group],
    tables: Sequence[list[tuple[int, float]]],
    chosen: Sequence[int],
) -> tuple[float | None, float | None]:
    """Ratios of the nearest larger and the nearest smaller file that one group's change gives."""
    changes = [
        (size - table[chosen[i]][0], i, new) for i, table in enumerate(tables) for new, (size, _) in enumerate(table)
    ]
    larger = min((change for change in changes if change[0] > 0), default=None)
    smaller = max((change for change in changes if change[0] < 0), default=None)
    before = files.total([None] * len(choice.folds))

    def ratio(change: tuple[int, int, int] | None) -> float | None:
        if change is None:
            return None
        _, i, new = change
        return before / files.total(_expand(groups, [*chosen[:i], new, *chosen[i + 1 :]]))

    return ratio(larger), ratio(smaller)
