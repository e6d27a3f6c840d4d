"""From the tensor names of a checkpoint to those of the model, and back when saving, as transformers itself
does it.

The names differ more often than not: the base model was saved and a class with a head is loaded (`encoder.x`
against `bert.encoder.x`) or the other way round, old BERTs say `LayerNorm.gamma`, and transformers 5 splits,
merges and transposes weights of many architectures while loading, and reverts that when saving. A `Unit` is
the smallest set of checkpoint tensors that must be read together: one for a rename, several for a merge.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bitfold.errors import PackedDataError

__all__ = ["Unit", "plan_units", "saved_as"]

Reader = Callable[[str], torch.Tensor]


@dataclass
class Unit:
    """Checkpoint tensors that become one or more tensors of the model."""

    sources: tuple[str, ...]
    _convert: Callable[[Reader], dict[str, torch.Tensor]]

    def realize(self, read: Reader) -> dict[str, torch.Tensor]:
        """Tensors under the model's names, made from those that `read(source)` gives (also on meta).

        Raises:
            PackedDataError: the conversion that transformers prescribes does not fit the tensors.
        """
        try:
            return self._convert(read)
        except PackedDataError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            message = f"{self.sources[0]}: cannot be converted to the model's layout ({reason})"
            raise PackedDataError(message) from error


def plan_units(model: Any, keys: Iterable[str]) -> tuple[list[Unit], list[str]]:
    """Sort the names of a checkpoint into units.

    Args:
        model: a float transformers model, also on meta. What reverting needs is noted on it
        (`_weight_conversions`,
            as the loader does).
        keys: all tensor names of the checkpoint.

    Returns:
        The units, and the names for which the model has no place.
    """
    try:
        from transformers import core_model_loading
    except ImportError:  # transformers 4
        return _plan_renames(model, list(keys))
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, core_model_loading.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix

    units: list[Unit] = []
    unused: list[str] = []
    merges: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(keys, key=core_model_loading.dot_natural_key):
        name, pattern = core_model_loading.rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unused.append(key)
        elif pattern is None:
            units.append(_rename(key, name))
        else:
            merges.setdefault(name, []).append((key, pattern))
    for name, parts in merges.items():
        units.append(_conversion(name, parts, by_pattern[parts[0][1]], model))
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return units, unused


def _rename(key: str, name: str) -> Unit:
    return Unit((key,), lambda read: {name: read(key)})


def _conversion(name: str, parts: list[tuple[str, str]], converter: Any, model: Any) -> Unit:
    def convert(read: Reader) -> dict[str, torch.Tensor]:
        work = copy.deepcopy(converter)
        for key, pattern in parts:
            # A callable is read only when the conversion comes to it.
            work.add_tensor(name, key, pattern, lambda key=key: read(key))
        result = work.convert(name, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in result.items()}

    return Unit(tuple(key for key, _ in parts), convert)


def _plan_renames(model: Any, keys: list[str]) -> tuple[list[Unit], list[str]]:
    """Transformers 4: renames only; the rules are those of its `_load_pretrained_model`."""
    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(key.startswith(prefix) for key in keys)
    expects_prefix = bool(prefix) and hasattr(model, prefix)
    names = model._get_key_renaming_mapping(
        keys,
        _key_mapping(model),
        loading_base_model_from_task_state_dict=has_prefix and not expects_prefix,
        loading_task_model_from_base_state_dict=not has_prefix and expects_prefix,
    )
    expected = set(model.state_dict())
    units = [_rename(key, names[key]) for key in keys if names.get(key) in expected]
    return units, [key for key in keys if names.get(key) not in expected]


def _key_mapping(model: Any) -> dict[str, str] | None:
    """Transformers 4: renames that some vision-language classes apply when loading and revert when saving."""
    from transformers.modeling_utils import VLMS

    words = [cls.__name__.lower() for cls in type(model).__mro__[:-1]]
    concerned = any(vlm in word for word in words for vlm in VLMS)
    return model._checkpoint_conversion_mapping if concerned else None


def saved_as(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names, and in the layout, in which `model.save_pretrained` stores them.

    Args:
        model: the folded model after `plan_units`.
        tensors: by the model's names; those that one conversion joins must come together.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {_reverted_name(model, name): tensor for name, tensor in tensors.items()}
    if not getattr(model, "_weight_conversions", None):
        return dict(tensors)
    return dict(revert_weight_conversion(model, dict(tensors)))


def _reverted_name(model: Any, name: str) -> str:
    for replacement, pattern in (_key_mapping(model) or {}).items():
        target = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
        name, count = re.subn(pattern, target, name)
        if count:
            break
    return name
