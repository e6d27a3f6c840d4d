"""bitfold.plan: formats for all matrices of a model that keep the file within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from bitfold.choosing import Choice, choose
from bitfold.formats import Format, as_format
from bitfold.nn._base import check_finite
from bitfold.outputs import Batch
from bitfold.planning.candidates import TABLE_BITS, Group, group_folds, ladder
from bitfold.planning.file_bytes import FileBytes
from bitfold.planning.fitting import Fitting
from bitfold.planning.plans import Plan
from bitfold.planning.sensitivity import MEASURES, Losses, choose_measure, measure
from bitfold.progress import progress_bar

if TYPE_CHECKING:
    from bitfold.calibration import Settings

__all__ = ["plan"]


def plan(
    model: nn.Module,
    target_ratio: float | None = None,
    *,
    target_bytes: int | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
    formats: Iterable[Format | str] | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    settings: Settings | None = None,
    sensitivity: str | Plan = "auto",
    embeddings: Format | str | None = "auto",
    skip: Iterable[str] = (),
    rules: Mapping[str, Format | str | None] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Choose a Format for every matrix of `model`: the whole file small enough, the loss least.

    The loss of each candidate is measured for each group of matrices alone, on the float model, with scales
    by search; then the sum of losses is minimized exactly under the budget. Matrices that a fused kernel
    would read together (queries, keys and values of one attention, gate and up projections, all experts of
    a layer; told by name and shape) take one choice. The model is not changed.

    Args:
        model: a float model, in fp32, fp16 or bf16.
        target_ratio: bytes of the float model's file by those of the folded one's, at least; embeddings,
            metadata and headers counted.
        target_bytes: instead of a ratio: bytes of the file, at most.
        min_bits: least bits of the element codes to choose from, 2 to 8.
        max_bits: most of them.
        formats: candidates, instead of `planning.candidates.LADDER`.
        calibration: data that the losses are measured on, in any form that `bitfold.quantize` takes: texts,
            token ids, batches of the model's arguments. Take other than what a calibrated method is given
            afterwards.
        tokenizer: for texts; default the one that the model came with.
        settings: `bitfold.calibration.Settings`: batch size, sequence length and packing of texts and ids.
        sensitivity: `"kl"` (each group folded alone, divergence of the logits), `"output"` (error of each
            layer's outputs), `"weight"` (error of the weights, without data); `"auto"` is KL where that takes
            minutes, else output; weight where there is no calibration. Or an earlier Plan for the same
            model, whose measured losses are taken.
        embeddings: `"auto"` chooses for embeddings as for the rest, but (as always for the output head of a
            transformers model) from 4 bits up as long as the budget allows; or a Format for the embeddings,
            or None to leave them in float.
        skip: modules to leave in float, as for `bitfold.quantize`.
        rules: pattern -> Format or None, as for `bitfold.quantize`; such a Format is kept.
        seed: chooses the rows that losses are measured on.
        progress: show a bar on a terminal or in a notebook, where tqdm is installed.

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
    linear = ladder(formats, min_bits, max_bits)
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
        if fold.owner.module.weight.is_meta and not isinstance(sensitivity, Plan):
            msg = f"{fold.owner.name}: is on the meta device, there are no values to measure; load the model"
            raise ValueError(msg)
        check_finite(fold.owner.module.weight, f"{fold.owner.name}.weight")
    files = FileBytes(model, choice.folds)
    float_bytes = files.total([None] * len(choice.folds))
    budget = target_bytes if target_bytes is not None else int(float_bytes / (target_ratio or 1.0))
    table = _from_four_bits(linear)
    groups = group_folds(model, choice, linear, [fixed] if fixed else table, table)
    fitting = Fitting(files, choice.folds, groups)
    notes: list[str] = []
    if fitting.smallest_bytes > budget and table != linear:
        groups = group_folds(model, choice, linear, [fixed] if fixed else linear, linear)
        fitting = Fitting(files, choice.folds, groups)
        notes = ["embeddings and heads: below 4 bits allowed, as the budget cannot be met otherwise"]
    fitting.check_feasible(budget)

    batches = [] if calibration is None else _batches(calibration, model, tokenizer, settings)
    kind, losses, unreached = _losses(sensitivity, model, choice, groups, batches, seed, progress)
    if unreached:
        notes.append(f"not reached by the data, judged by their weights: {', '.join(unreached)}")
    chosen = fitting.solve(losses, budget)
    members = {i: group.name for group in groups for i in group.members}
    return Plan.made(
        choice,
        files,
        fitting.formats(chosen),
        groups=[members[i] for i in range(len(choice.folds))],
        measure=kind,
        losses=losses,
        next_ratio=fitting.next_ratios(chosen),
        notes=tuple(notes),
    )


def _batches(calibration: Any, model: nn.Module, tokenizer: Any, settings: Settings | None) -> list[Batch]:
    from bitfold.calibration.batches import as_batches
    from bitfold.calibration.settings import Settings

    return as_batches(calibration, model, tokenizer, settings or Settings())


def _from_four_bits(formats: list[Format]) -> list[Format]:
    """Those of `TABLE_BITS` up; all where none has so many."""
    return [fmt for fmt in formats if fmt.bits >= TABLE_BITS] or formats


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
        msg = f"plan(): sensitivity {sensitivity!r} is measured on data; pass calibration=[texts or batches]"
        raise ValueError(msg)


def _losses(
    sensitivity: str | Plan,
    model: nn.Module,
    choice: Choice,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    seed: int,
    progress: bool,
) -> tuple[str, Losses, list[str]]:
    """The measure, the losses, and the groups that the data do not reach."""
    if isinstance(sensitivity, Plan):
        for group in groups:
            known = sensitivity.losses.get(group.name, {})
            absent = [str(fmt) for fmt in group.formats if str(fmt) not in known]
            if absent and len(group.formats) > 1:
                msg = f"{group.name}: the plan given as sensitivity has not measured {', '.join(absent)}"
                raise ValueError(msg)
        return sensitivity.measure, {name: dict(found) for name, found in sensitivity.losses.items()}, []
    kind = choose_measure(model, groups, batches) if sensitivity == "auto" else sensitivity
    open_groups = sum(len(group.formats) > 1 for group in groups)
    with progress_bar(open_groups, f"measuring {kind}", "group", progress) as advance:
        return kind, *measure(kind, model, choice.folds, groups, batches, seed, advance)
