"""The protocol of a method, and the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from bitfold.formats import Format


class Method(Protocol):
    """Chooses the codes of one matrix.

    Args:
        weight: float `[out, in]`, finite.
        fmt: the Format to fill.
        statistics: what calibration gathered for this matrix, or None for methods that need none.

    Returns:
        The packed tensors in the order of `fmt.buffers(weight.shape)`.
    """

    def __call__(self, weight: Tensor, fmt: Format, statistics: Any = None) -> list[Tensor]:
        """Fold `weight`."""
        ...


_METHODS: dict[str, Method] = {}


def register(name: str) -> Callable[[Method], Method]:
    """Decorator that registers a method under `name`; a second registration of a name is an error."""

    def add(method: Method) -> Method:
        if name in _METHODS:
            msg = f"register(): there is a method named {name!r} already"
            raise ValueError(msg)
        _METHODS[name] = method
        return method

    return add


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_METHODS)


def get(name: str) -> Method:
    """The method registered as `name`; ValueError listing what there is."""
    if name not in _METHODS:
        msg = f"method must be one of {', '.join(names())}, got {name!r}"
        raise ValueError(msg)
    return _METHODS[name]


def fold_weight(
    weight: Tensor, fmt: Format, method: str | None = None, statistics: Any = None
) -> list[Tensor]:
    """Pack `weight` `[out, in]` with the named method, or with the format's own default one."""
    return get(method or fmt.default_method)(weight, fmt, statistics)
