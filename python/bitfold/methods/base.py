"""The contract of a method: what it gets, what it returns, and the registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from bitfold.formats import Format


@dataclass
class Statistics:
    """What calibration gathered of the input x `[tokens, in]` of one matrix; float32.

    Args:
        hessian: `[in, in]`, mean of x xᵀ over the tokens; symmetric, both halves filled.
        tokens: rows of x that were counted.
        mean: `[in]`, mean of x.
        mean_abs: `[in]`, mean of |x|.
        cross: `[in, in]`, mean of (x_float - x) xᵀ, x_float being what the float model would have fed
            (GPTAQ, arXiv 2504.02692); None unless asked for.
        mean_float: `[in]`, mean of x_float; with `cross`.
        bias: the module has a bias of its own, to which the mean error of its outputs can be added.
    """

    hessian: Tensor
    tokens: int
    mean: Tensor
    mean_abs: Tensor
    cross: Tensor | None = None
    mean_float: Tensor | None = None
    bias: bool = False


@dataclass
class Solution:
    """One folded matrix.

    Args:
        packed: the tensors in the order of `fmt.buffers(weight.shape)`.
        report: JSON types only: loss, predicted, damping, dead, fallback, …; empty for data-free methods.
        bias_shift: `[out]`, to be added to the module's bias where it has one (the mean error of the
            outputs), or None.
    """

    packed: list[Tensor]
    report: dict[str, Any] = field(default_factory=dict)
    bias_shift: Tensor | None = None


class Method(Protocol):
    """Chooses the codes of one matrix.

    Args:
        weight: float `[out, in]`, finite.
        fmt: the Format to fill.
        statistics: what calibration gathered for this matrix; None for methods that need none.
        options: of the method's own.
    """

    def __call__(
        self, weight: Tensor, fmt: Format, statistics: Statistics | None = None, **options: Any
    ) -> Solution:
        """Fold `weight`."""
        ...


@dataclass
class BlockView:
    """A float block whose matrices are about to be folded. Names are relative to it.

    Args:
        block: a preparation may change its float weights, as long as it computes the same.
        inputs: `(args, kwargs)` of a call, some dozens of tokens or more.
        formats: of the matrices to be folded, by name.
        statistics: of their inputs, a few at a time, all once; each pass over the data for a few is made
            when they are asked for, on weights that are not changed yet.
        shared: `id` of parameters that modules outside of the block use too.
        known: what earlier blocks of this run left here for later ones: dicts and lists of tensors, numbers
            and texts, which a checkpoint can hold.
        refused: a preparation says here what it could not do: module -> why.
    """

    block: nn.Module
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]
    formats: Mapping[str, Format]
    statistics: Iterable[dict[str, Statistics]]
    shared: Collection[int] = ()
    known: list[Any] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


# What some methods do to a whole block before any of its codes is chosen. Returns what to report of matrices,
# by name; JSON types.
Preparation = Callable[[BlockView], dict[str, dict[str, Any]]]

# What some methods do to a block once all of it is folded: (block, name -> (packed module, float weight),
# calls, the method's options) -> (name -> Solution, what to report of the block).
Refinement = Callable[..., tuple[dict[str, Solution], dict[str, float]]]

_Chooser = Callable[..., Solution]  # a Method; mypy wants no keyword of its own spelled out in a Protocol
_METHODS: dict[str, _Chooser] = {}
_CALIBRATED: set[str] = set()
_PREPARATIONS: dict[str, Preparation] = {}
_REFINEMENTS: dict[str, Refinement] = {}
_FLOAT_STREAM: set[str] = set()
_HANDED_ON: dict[str, str] = {}  # method -> the one that gets its `**options`
_SUITS: dict[str, Callable[[Format], bool]] = {}


def register(
    name: str,
    calibrated: bool = False,
    prepare: Preparation | None = None,
    refine: Refinement | None = None,
    float_stream: bool = False,
    options_of: str | None = None,
    suits: Callable[[Format], bool] | None = None,
) -> Callable[[_Chooser], _Chooser]:
    """Decorator that registers a method under `name`; a second registration of a name is an error.

    `calibrated` says that the method cannot do without `statistics`; `prepare` is called for each block
    before the codes of its matrices are chosen, `refine` after; `float_stream` says that the method is better
    for knowing what the float model would have fed, `refine` that it needs to; `suits` tells the formats that
    it can fill, None all. `options_of` names the method
    to which its `**options` are handed on.
    """

    def add(method: _Chooser) -> _Chooser:
        if name in _METHODS:
            msg = f"register(): there is a method named {name!r} already"
            raise ValueError(msg)
        _METHODS[name] = method
        if calibrated:
            _CALIBRATED.add(name)
        if prepare is not None:
            _PREPARATIONS[name] = prepare
        if refine is not None:
            _REFINEMENTS[name] = refine
        if options_of is not None:
            _HANDED_ON[name] = options_of
        if float_stream or refine is not None:
            _FLOAT_STREAM.add(name)
        if suits is not None:
            _SUITS[name] = suits
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


def is_calibrated(name: str | None) -> bool:
    """Whether the method needs calibration; None stands for the format's own method, which never does."""
    return name is not None and get(name) is not None and name in _CALIBRATED


def preparation(name: str) -> Preparation | None:
    """What the method does to a block beforehand, or None."""
    return _PREPARATIONS.get(name)


def refinement(name: str) -> Refinement | None:
    """What the method does to a folded block, or None."""
    return _REFINEMENTS.get(name)


def wants_float_stream(name: str) -> bool:
    """Whether the method asks for what the float model would have fed."""
    return name in _FLOAT_STREAM


def suits(name: str, fmt: Format) -> bool:
    """Whether the method can fill the Format."""
    return name not in _SUITS or _SUITS[name](fmt)


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if the method takes no option of one of these names."""
    parameters = _parameters(name)
    if name in _HANDED_ON:
        parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD] + _parameters(_HANDED_ON[name])
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return  # it takes what it is given
    taken = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    for option in options:
        if option not in taken:
            known = f"; it takes {', '.join(sorted(taken))}" if taken else ", and takes none"
            msg = f"method {name!r} has no option {option!r}{known}"
            raise ValueError(msg)


def _parameters(name: str) -> list[inspect.Parameter]:
    return list(inspect.signature(get(name)).parameters.values())


def fold_weight(
    weight: Tensor,
    fmt: Format,
    method: str | None = None,
    statistics: Statistics | None = None,
    **options: Any,
) -> Solution:
    """Fold `weight` `[out, in]` with the named method, or with the format's own default one.

    Raises ValueError for an unknown method, and for one that needs calibration where there is none.
    """
    name = method or fmt.default_method
    chosen = get(name)
    if statistics is None and name in _CALIBRATED:
        msg = (
            f"method {name!r} needs calibration data: bitfold.quantize(model, {str(fmt)!r}, "
            f"method={name!r}, calibration=[texts or batches of token ids])"
        )
        raise ValueError(msg)
    return chosen(weight, fmt, statistics, **options)
