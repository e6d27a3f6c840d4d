"""bitfold.quantize: fold the weights of a model in place, one matrix after the other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from bitfold import methods
from bitfold.choosing import Choice, Fold, choose
from bitfold.errors import WeightError
from bitfold.formats import Format
from bitfold.manifest import PACKED_KINDS, QUANT_METHOD, describe, forget_tied_keys
from bitfold.nn._base import check_finite
from bitfold.nn._places import Places
from bitfold.progress import progress_bar
from bitfold.swapping import swaps_of

if TYPE_CHECKING:
    from bitfold.calibration import Settings

CALIBRATED_METHOD = "gptq"  # where there is data and no method is named


def quantize(
    model: nn.Module,
    fmt: Any = "nf4",
    *,
    embeddings: Format | str | None = "int8-g64",
    skip: Iterable[str] = (),
    rules: Mapping[str, Format | str | None] | None = None,
    method: str | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    options: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    checkpoint: str | os.PathLike[str] | bool | None = None,
    log: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """Fold the weights of `model` in place, and return it.

    Every `nn.Linear` (heads and classifiers included), GPT-2 `Conv1D` and `nn.Embedding` of exactly that type
    is replaced by its packed twin; each float matrix is released before the next is folded, so the peak is
    the model plus one packed matrix. Tied weights stay tied: one packed matrix, in the format for embeddings.
    All checks come before the first change; an interrupt leaves every module either float or folded, and
    calling again finishes the work. Folding again with the same formats changes nothing. On the meta device
    the modules are swapped for empty packed ones. Where there is nothing to fold, a UserWarning says so.

    With `calibration` the model is walked through block by block: each matrix is folded for what it is fed
    by the blocks folded before it. An interrupted run, also one that was killed, goes on where it was when
    called again with the same arguments. What was done to each matrix: `bitfold.calibration.report(model)`.

    Args:
        model: any torch model, in fp32, fp16 or bf16, on any one device.
        fmt: Format of the linear layers, such as `"nf4"`, or a plan (`bitfold.plan`), which says everything
            that `embeddings`, `skip` and `rules` would.
        embeddings: Format of the embeddings, or None to leave them in float.
        skip: modules to leave in float: names, prefixes up to a dot, or regular expressions for whole names.
        rules: pattern (as in `skip`) -> Format, or None for float. The first match wins; `skip` goes before.
        method: `"round"`, `"search"`, `"gptq"`, …; default what each Format does best, `"gptq"` where there
            is `calibration`. Embeddings are folded by their Format's own method where this one needs data or
            does not suit the Format.
        calibration: data for methods that need it: an iterable of texts, of token ids, or of batches of the
            model's arguments (`bitfold.calibration.batches.as_batches`). A few hundred sequences like those
            that the model is for; at least four tokens per input of the widest matrix.
        tokenizer: for texts; default the one that the model came with.
        options: keyword arguments for the method that is named.
        settings: of calibration: batch size, sequence length, memory limit, ….
        checkpoint: directory in which a calibrated run keeps its state, removed when it is done; None takes
            one below `~/.cache/bitfold`, False keeps none.
        log: file for a JSON line per matrix of a calibrated run.
        progress: show a bar on a terminal or in a notebook, where tqdm is installed.

    Raises:
        CoverageError: more than 1 % of the matrix bytes would stay float without being named in `skip` or
            `rules` (or by `embeddings=None`): convolutions, fused experts, subclasses, matrices that their
            parent reads itself. The message lists them ready to paste.
        WeightError: NaN, Inf, integer, complex or empty weights, named.
        FormatError: bad format, or folded in another one already.
        ValueError: unknown method, a pattern that matches nothing, a method that needs calibration without
            it, or calibration data that cannot be used.
        CheckpointError: `checkpoint` is of another model, other data or another plan; the message says which.
        MemoryLimitError: a calibrated run would not fit in memory.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> model = quantize(model, "nf4", skip=["2"], progress=False)
        >>> model(torch.randn(3, 128)).shape
        torch.Size([3, 8])
    """
    if not isinstance(model, nn.Module):
        found = type(model).__name__  # type: ignore[unreachable]
        msg = f"quantize(): model must be a torch.nn.Module, got {found}"
        raise TypeError(msg)
    choice, planned = _choose(model, fmt, embeddings, skip, rules)
    choice.check_coverage()
    if not choice.folds:
        warnings.warn(
            f"quantize(): nothing in this {type(model).__name__} is folded: it has no nn.Linear, "
            "nn.Embedding or transformers Conv1D (subclasses do not count) that skip, rules and "
            "embeddings leave to fold; give the model that holds the layers, or name fewer",
            stacklevel=2,
        )
    method_of = _methods(choice, method, planned, calibration, options or {})
    _check_values([fold for fold in choice.folds if not fold.done])
    calibrated = [fold for fold in choice.folds if methods.is_calibrated(method_of(fold.owner.name))]
    folds = [fold for fold in choice.folds if not methods.is_calibrated(method_of(fold.owner.name))]
    del choice  # it refers to the float modules, which are to be released one by one
    try:
        if calibrated:
            _calibrate(
                model,
                calibrated,
                folds,
                method_of,
                calibration,
                tokenizer,
                options,
                settings,
                checkpoint,
                log,
                progress,
            )
        found = Places(model)
        folds = [fold for fold in folds if not fold.done]
        for fold in _consumed(folds, progress):
            _fold_one(model, fold, method_of(fold.owner.name), options or {}, found)
    finally:  # also after an interrupt: what is folded by now must be saved as such
        forget_tied_keys(model)
        record(model)
    return model


def _choose(
    model: nn.Module,
    fmt: Any,
    embeddings: Format | str | None,
    skip: Iterable[str],
    rules: Mapping[str, Format | str | None] | None,
) -> tuple[Choice, Mapping[str, str]]:
    """What to fold, and the methods that a plan names."""
    if isinstance(fmt, Format | str) or not hasattr(fmt, "choose"):
        return choose(model, fmt, embeddings=embeddings, skip=skip, rules=rules), {}
    if rules or list(skip):
        msg = "quantize(): a plan says what is folded; skip and rules belong to the making of the plan"
        raise ValueError(msg)
    return fmt.choose(model), fmt.methods


def _methods(
    choice: Choice,
    method: str | None,
    planned: Mapping[str, str],
    calibration: Any,
    options: Mapping[str, Any],
) -> Callable[[str], str | None]:
    """Name of a matrix -> its method (never a calibrated one for embeddings); ValueError without data."""
    for name in (method, *planned.values()):
        if name is not None:
            methods.get(name)
    if method is None and calibration is not None:
        method = CALIBRATED_METHOD
    chosen: dict[str, str | None] = {}
    for fold in choice.folds:
        name = planned.get(fold.owner.name, method)
        if fold.owner.kind == "embedding" and name is not None:
            name = None if methods.is_calibrated(name) or not methods.suits(name, fold.format) else name
        chosen[fold.owner.name] = name
    needing = sorted({name for name in chosen.values() if name is not None and methods.is_calibrated(name)})
    if needing and calibration is None:
        msg = (
            f"method {needing[0]!r} needs data: give calibration=[…], texts or token ids like those that the "
            "model is for, or choose a method without, such as 'search'"
        )
        raise ValueError(msg)
    for name in needing or ([] if method is None else [method]):
        methods.check_options(name, options)
    if calibration is not None and not needing:
        msg = (
            f"method {method!r} uses no calibration data; leave calibration out, or choose a method that does"
        )
        raise ValueError(msg)
    return chosen.get


def _calibrate(
    model: nn.Module,
    folds: list[Fold],
    data_free: list[Fold],
    method_of: Callable[[str], str | None],
    calibration: Any,
    tokenizer: Any,
    options: Mapping[str, Any] | None,
    settings: Settings | None,
    checkpoint: str | os.PathLike[str] | bool | None,
    log: str | os.PathLike[str] | None,
    progress: bool,
) -> None:
    from bitfold.calibration.distributed import is_first
    from bitfold.calibration.driver import Job, calibrate
    from bitfold.calibration.settings import Settings

    if any(parameter.is_meta for parameter in model.parameters()):
        msg = "quantize(): a model on the meta device has no values to calibrate; load it first"
        raise ValueError(msg)
    left = sum(not fold.done for fold in [*folds, *data_free])
    with progress_bar(left, "folding", "matrix", progress and is_first()) as advance:
        job = Job(
            model,
            folds,
            data_free,
            method_of,
            calibration,
            tokenizer,
            options or {},
            settings or Settings(),
            checkpoint,
            log,
            advance,
        )
        calibrate(job)


def _check_values(todo: list[Fold]) -> None:
    for fold in todo:
        check_finite(fold.owner.module.weight, f"{fold.owner.name}.weight")


def _consumed(todo: list[Fold], progress: bool) -> Iterator[Fold]:
    """Hand out the folds, forgetting each, under a progress bar where there is one."""
    todo.reverse()
    with progress_bar(len(todo), "folding", "matrix", progress and bool(todo)) as advance:
        while todo:
            name = todo[-1].owner.name
            yield todo.pop()
            advance(name)


def _fold_one(
    model: nn.Module, fold: Fold, method: str | None, options: Mapping[str, Any], found: Places
) -> None:
    owner = fold.owner
    if owner.module.weight.is_meta:
        empty = PACKED_KINDS[owner.kind].empty_like(owner.module, fold.format)
        found.replace(swaps_of(model, fold, empty))
        return
    try:
        solution = None
        if method is not None and options:
            solution = methods.fold_weight(owner.float_matrix(), fold.format, method, **options)
        packed = PACKED_KINDS[owner.kind].from_float(owner.module, fold.format, method, solution=solution)
    except WeightError as error:
        raise WeightError(f"{owner.name}: {error}") from error  # noqa: EM102
    found.replace(swaps_of(model, fold, packed))


# Called with each model that was folded; `bitfold.hf` adds what transformers models need.
AFTER_FOLDING: list[Callable[[nn.Module], None]] = []


def record(model: nn.Module) -> None:
    """Leave the manifest in a transformers config, from where `save_pretrained` writes it."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "save_pretrained"):
        for part in model.modules():  # one that was folded by itself before, under names of its own
            inner = getattr(part, "config", None)
            if inner is not config and _is_ours(getattr(inner, "quantization_config", None)):
                del inner.quantization_config  # type: ignore[union-attr]
        config.quantization_config = describe(model)
    for hook in AFTER_FOLDING:
        hook(model)


def _is_ours(recorded: Any) -> bool:
    if isinstance(recorded, dict):
        return recorded.get("quant_method") == QUANT_METHOD
    return getattr(recorded, "quant_method", None) == QUANT_METHOD
