"""Finding where modules sit in a model, and putting others in their place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Every module below `model` -> all `(parent, attribute)` where it hangs (several if it is shared)."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                found.setdefault(child, []).append((parent, attribute))
    return found


def replace(model: nn.Module, swaps: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one hangs, shared modules included; all of them or none.

    A Ctrl-C in the middle is held back until the rest is done, so that tied modules never part.
    """
    found = places(model)
    work = [(parent, attribute, new) for old, new in swaps.items() for parent, attribute in found[old]]

    def run() -> None:
        for parent, attribute, new in work:
            parent._modules[attribute] = new

    try:
        run()
    except KeyboardInterrupt:
        run()  # idempotent
        raise


def all_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every name of every module, shared ones under each of their names."""
    return dict(model.named_modules(remove_duplicate=False))
