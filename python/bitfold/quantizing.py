"""bitfold.quantize: fold the weights of a model in place, one matrix after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from bitfold import methods
from bitfold.choosing import Choice, Fold, choose
from bitfold.errors import WeightError
from bitfold.formats import Format
from bitfold.manifest import PACKED_KINDS, QUANT_METHOD, bias_owner, describe, forget_tied_keys
from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.nn._base import check_finite
from bitfold.nn._places import Places


def quantize(
    model: nn.Module,
    fmt: Any = "nf4",
    *,
    embeddings: Format | str | None = "int8-g64",
    skip: Iterable[str] = (),
    rules: Mapping[str, Format | str | None] | None = None,
    method: str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Fold the weights of `model` in place, and return it.

    Every `nn.Linear` (heads and classifiers included), GPT-2 `Conv1D` and `nn.Embedding` of exactly that type
    is replaced by its packed twin; each float matrix is released before the next is folded, so the peak is
    the model plus one packed matrix. Tied weights stay tied: one packed matrix, in the format for embeddings.
    All checks come before the first change; an interrupt leaves every module either float or folded, and
    calling again finishes the work. Folding again with the same formats changes nothing. On the meta device
    the modules are swapped for empty packed ones.

    Args:
        model: any torch model, in fp32, fp16 or bf16, on any one device.
        fmt: Format of the linear layers, such as `"nf4"`; or a `bitfold.Plan`, which says all that
            `embeddings`, `skip` and `rules` would.
        embeddings: Format of the embeddings, or None to leave them in float.
        skip: modules to leave in float: names, prefixes up to a dot, or regular expressions for whole names.
        rules: pattern (as in `skip`) -> Format, or None for float. The first match wins; `skip` goes before.
        method: `"round"`, `"search"`, …; default what each Format does best.
        progress: show a bar, where tqdm is installed.

    Raises:
        CoverageError: more than 1 % of the matrix bytes would stay float without being named in `skip` or
            `rules` (or by `embeddings=None`): convolutions, fused experts, subclasses, matrices that their
            parent reads itself. The message lists them ready to paste.
        WeightError: NaN, Inf, integer, complex or empty weights, named.
        FormatError: bad format, or folded in another one already.
        ValueError: unknown method, or a pattern that matches nothing.

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
    for name in {method, *planned.values()} - {None}:
        methods.get(str(name))
    choice.check_coverage()
    todo = [fold for fold in choice.folds if not fold.done]
    _check_values(todo)
    del choice  # it refers to the float modules, which are to be released one by one
    found = Places(model)
    try:
        for fold in _consumed(todo, progress):
            _fold_one(model, fold, planned.get(fold.owner.name, method), found)
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


def _check_values(todo: list[Fold]) -> None:
    for fold in todo:
        check_finite(fold.owner.module.weight, f"{fold.owner.name}.weight")


def _consumed(todo: list[Fold], progress: bool) -> Iterator[Fold]:
    """Hand out the folds, forgetting each, under a progress bar where there is one."""
    bar = _bar(len(todo)) if progress and todo else None
    todo.reverse()
    try:
        while todo:
            if bar is not None:
                bar.set_postfix_str(todo[-1].owner.name, refresh=False)
            yield todo.pop()
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def _bar(total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="folding", unit="matrix")


def _fold_one(model: nn.Module, fold: Fold, method: str | None, found: Places) -> None:
    owner = fold.owner
    if owner.module.weight.is_meta:
        _swap(model, fold, PACKED_KINDS[owner.kind].empty_like(owner.module, fold.format), found)
        return
    try:
        packed = PACKED_KINDS[owner.kind].from_float(owner.module, fold.format, method)
    except WeightError as error:
        raise WeightError(f"{owner.name}: {error}") from error  # noqa: EM102
    _swap(model, fold, packed, found)


def _swap(model: nn.Module, fold: Fold, packed: PackedModule, found: Places) -> None:
    """Put the packed module and its tied ones in place, all or none."""
    swaps: dict[nn.Module, nn.Module] = {fold.owner.module: packed}
    for use in fold.tied:
        if use.kind == "embedding":
            swaps[use.module] = TiedEmbedding.from_float(use.module, packed)
        else:
            swaps[use.module] = TiedHead.from_float(use.module, packed, bias_owner(model, use.module))
    found.replace(swaps)


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
