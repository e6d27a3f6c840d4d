"""PEFT on folded models: adapters train as they are; merging them into packed codes is refused by name.

`merge` of PEFT's own layers adds floats to `base_layer.weight`, which is packed bytes here. torch would
refuse most of those additions with a message about shapes; this says what is going on instead.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

__all__ = ["guard_merge"]


def guard_merge(layer: ModuleType) -> None:
    """Have `merge` of every LoRA layer in module `layer` (`peft.tuners.lora.layer`) refuse folded bases."""
    for _, cls in inspect.getmembers(layer, inspect.isclass):
        own = cls.__dict__.get("merge")
        if own is not None and not hasattr(own, "__bitfold_guard__"):
            cls.merge = _guarded(own)  # type: ignore[attr-defined]


def _guarded(merge: Any) -> Any:
    @functools.wraps(merge)
    def refuse_folded(self: Any, *args: Any, **kwargs: Any) -> Any:
        from bitfold.errors import BitfoldError
        from bitfold.nn import PackedModule

        base = self.get_base_layer()
        if isinstance(base, PackedModule):
            msg = (
                f"merge: the base layer is a {type(base).__name__} ({base.format}), whose weight is packed "
                "codes; floats cannot be added to it. Keep the adapter beside the folded model (save and "
                "load it with PEFT), or merge it into the float model and fold that with bitfold.quantize"
            )
            raise BitfoldError(msg)
        return merge(self, *args, **kwargs)

    refuse_folded.__bitfold_guard__ = True  # type: ignore[attr-defined]
    return refuse_folded
