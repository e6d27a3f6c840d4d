"""Where modules sit in a model, and putting others in their place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Places:
    """Every place of every module below a model; refers to parents only, so that children can be freed."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(id(child), []).append((parent, attribute))

    def of(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """(parent, attribute) wherever `module` hangs."""
        return self._places[id(module)]

    def replace(self, swaps: Mapping[nn.Module, nn.Module]) -> None:
        """Put each new module wherever its old one hangs (shared modules hang in several places).

        All or none: a Ctrl-C in the middle is held back until the rest is done, so tied modules never part.
        """
        work = []
        for old, new in swaps.items():
            found = self._places[id(old)]
            work += [(parent, attribute, new) for parent, attribute in found]

        def run() -> None:
            for parent, attribute, new in work:
                parent._modules[attribute] = new

        try:
            run()
        except KeyboardInterrupt:
            run()  # harmless for those that are in place already
            raise
        for old in swaps:  # the id may be given to another object once `old` is freed
            del self._places[id(old)]


def all_names(model: nn.Module) -> dict[str, nn.Module]:
    """Every name of every module, shared ones under each of their names."""
    return dict(model.named_modules(remove_duplicate=False))
