"""How exactly packed modules multiply: a property of running, never stored."""

from __future__ import annotations

from torch import nn

from bitfold import ops

_NAMES = {number: name for name, number in ops.ACCURACY.items()}


class Multiplies:
    """Mixin of the modules that call `ops.linear`."""

    _accuracy = ops.ACCURACY["auto"]  # on the class, for modules pickled before there was a choice

    @property
    def accuracy(self) -> str:
        """`"auto"`, `"fp32"` or `"int8"`; `bitfold.ops.linear` says what each of them promises.

        Can be set at any time, by name or by number; another value raises ValueError. Copies and pickles
        keep it; it is no part of the format, of `state_dict` or of a saved model.
        """
        return _NAMES[self._accuracy]

    @accuracy.setter
    def accuracy(self, level: str | int) -> None:
        self._accuracy = ops.accuracy_level(level)

    def _accuracy_repr(self) -> str:
        return "" if self._accuracy == ops.ACCURACY["auto"] else f", accuracy={self.accuracy}"


def set_accuracy(model: nn.Module, accuracy: str | int) -> int:
    """Set the accuracy of every packed product in a model.

    Args:
        model: any module; its QuantLinear, QuantConv1D and tied heads are set, wherever they sit.
        accuracy: `"auto"`, `"fp32"` or `"int8"`, see `bitfold.ops.linear`.

    Returns:
        How many modules were set.

    Raises:
        ValueError: another accuracy; nothing is set then.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> _ = bitfold.quantize(model, "int4-g64")
        >>> set_accuracy(model, "fp32")
        2
    """
    level = ops.accuracy_level(accuracy)
    found = [module for module in model.modules() if isinstance(module, Multiplies)]
    for module in found:
        module.accuracy = level
    return len(found)
