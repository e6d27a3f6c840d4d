"""transformers' weight conversions (5.x), kept away from packed tensors.

For some architectures transformers splits, merges or transposes tensors between file and model. Folded
tensors are stored under the names and in the shapes of the modules in memory, and must pass as they are.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from torch import nn

from bitfold.hf.checks import folded_modules

__all__ = ["keep_packed_on_save", "without_folded"]


def without_folded(conversions: list[Any], model: nn.Module) -> list[Any]:
    """`conversions` less those that would compute with a tensor of a folded module; renames stay."""
    keys = [f"{name}.{key}" for name, module in folded_modules(model) for key in module.state_dict()]
    return [conversion for conversion in conversions if not _computes_with(conversion, keys)]


def keep_packed_on_save(model: Any) -> None:
    """Have `save_pretrained` of a freshly folded model write packed tensors as they are.

    It undoes the conversions that the float model was loaded with, or would have been.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import PrefixChange
        except ImportError:  # transformers 4, or a 5.x without prefix changes: nothing is undone
            return
        # The list that save_pretrained makes for a model that was not loaded from files.
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
    kept = without_folded(conversions, model)
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def _computes_with(conversion: Any, keys: list[str]) -> bool:
    if not getattr(conversion, "operations", None):
        return False
    probes = [copy.deepcopy(conversion)]  # asking marks a conversion as used
    with contextlib.suppress(NotImplementedError, ValueError):  # one that cannot be reversed
        probes.append(conversion.reverse_transform())
    return any(probe.rename_source_key(key)[1] is not None for probe in probes for key in keys)
