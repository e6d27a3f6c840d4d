"""transformers' own tying of weights, kept away from what bitfold ties by itself."""

from __future__ import annotations

from typing import Any

from bitfold.nn import TiedEmbedding, TiedHead

__all__ = ["release_ties"]


def release_ties(model: Any) -> None:
    """Take tied folded modules out of the patterns from which transformers 5 works out what to tie.

    A folded embedding is a buffer and its head has no tensor of its own. `model.tie_weights()` matches its
    patterns against tensors and raises where one matches nothing. Ties between parameters that still are
    parameters stay; they stand in `all_tied_weights_keys`, which `bitfold.manifest` has cleaned.
    """
    for module in model.modules():
        patterns = getattr(module, "_tied_weights_keys", None)
        tied = getattr(module, "all_tied_weights_keys", None)
        if not isinstance(patterns, dict) or not isinstance(tied, dict):  # a list in transformers 4
            continue
        if any(isinstance(part, TiedHead | TiedEmbedding) for part in module.modules()):
            module._tied_weights_keys = dict(tied)
