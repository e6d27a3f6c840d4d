"""LLM.int8() (arXiv 2208.07339) on packed layers: large columns of the activations as floats, the rest as
8-bit integers. Like the accuracy of products a property of running, never stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.formats import Format
from bitfold.outputs import read_batches


def suits_llm_int8(fmt: Format) -> bool:
    """Whether products of the format can be mixed: 8-bit codes around zero, one scale for a whole row."""
    return (fmt.bits, fmt.zero, fmt.group_size, fmt.outliers) == (8, "none", None, 0)


class MixesProducts:
    """Mixin of the modules that can call `ops.linear_mixed`; `_mixed` holds its last two arguments."""

    _mixed: tuple[float, list[int] | None] | None = None  # on the class, for modules pickled before
    format: Any
    layout: str

    @property
    def llm_int8_threshold(self) -> float | None:
        """Magnitude from which on a column of x is multiplied in float; None where products are not mixed."""
        return None if self._mixed is None else self._mixed[0]

    @property
    def llm_int8_columns(self) -> tuple[int, ...] | None:
        """The fixed outlier columns; None where they are searched for in each batch (or none are)."""
        return None if self._mixed is None or self._mixed[1] is None else tuple(self._mixed[1])

    def set_llm_int8(self, threshold: float | None = 6.0, columns: Iterable[int] | None = None) -> None:
        """Multiply as LLM.int8() does from now on, whatever `accuracy` says; see `bitfold.ops.linear_mixed`.

        Copies and pickles keep it; `state_dict` and saved models do not.

        Args:
            threshold: columns of x with a larger magnitude anywhere in the batch are multiplied in float.
                None: products are as `accuracy` says again.
            columns: these columns are, in every batch, and no others; in any order.

        Raises:
            ValueError: a format other than `int8-row` (`int8-row-dq`, `int8-tensor`), a negative threshold,
                a column that is none.

        Example:
            >>> layer = bitfold.nn.QuantLinear.from_float(torch.nn.Linear(128, 64), "int8-row")
            >>> layer.set_llm_int8(threshold=6.0)
            >>> layer.llm_int8_threshold
            6.0
        """
        if threshold is None:
            self._mixed = None
            return
        if not suits_llm_int8(self.format):
            msg = f"set_llm_int8(): format must be int8-row, int8-row-dq or int8-tensor, got {self.format}"
            raise ValueError(msg)
        threshold = float(threshold)
        if not threshold >= 0.0:
            msg = f"set_llm_int8(): threshold must not be negative, got {threshold}"
            raise ValueError(msg)
        fixed = None if columns is None else sorted({int(column) for column in columns})
        size = self.in_features  # type: ignore[attr-defined]
        if fixed and not 0 <= fixed[0] <= fixed[-1] < size:
            wrong = fixed[0] if fixed[0] < 0 else fixed[-1]
            msg = f"set_llm_int8(): columns must be within [0, {size}), got {wrong}"
            raise ValueError(msg)
        self.layout = "rows"  # which is what this product reads
        self._mixed = (threshold, fixed)

    def _mixed_repr(self) -> str:
        if self._mixed is None:
            return ""
        threshold, columns = self._mixed
        fixed = "" if columns is None else f" ({len(columns)} fixed columns)"
        return f", llm_int8_threshold={threshold:g}{fixed}"


def set_llm_int8(
    model: nn.Module, threshold: float | None = 6.0, calibration: Iterable[Any] | None = None
) -> dict[str, int | None]:
    """Have every `int8-row` product of a model computed as LLM.int8() (arXiv 2208.07339).

    Args:
        model: any module; its packed layers and tied heads of format `int8-row` (`int8-row-dq`,
            `int8-tensor`) are set, wherever they sit.
        threshold: columns of activations with a larger magnitude are multiplied in float; None switches all
            back to what their `accuracy` says.
        calibration: batches, each a tensor, or a tuple or dict of arguments, that the model is called with
            (without gradients). Where given, the columns that exceeded the threshold in any of them are fixed
            for good: nothing is searched for later, and a row's result does not depend on its batch.

    Returns:
        How many columns were fixed, by name of the layer; None for layers that search in each batch.

    Raises:
        ValueError: there is no such layer, a negative threshold, or no batch.
        TypeError: texts or lists; for text call the tokenizer first.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8))
        >>> _ = bitfold.quantize(model, "int8-row", progress=False)
        >>> set_llm_int8(model, threshold=6.0)
        {'0': None, '1': None}
        >>> set_llm_int8(model, threshold=6.0, calibration=[torch.zeros(4, 64)])
        {'0': 0, '1': 0}
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MixesProducts) and suits_llm_int8(module.format)
    }
    if not layers:
        msg = "set_llm_int8(): the model has no packed layer of format int8-row, int8-row-dq or int8-tensor"
        raise ValueError(msg)
    for layer in layers.values():
        layer.set_llm_int8(threshold)
    if threshold is None or calibration is None:
        return dict.fromkeys(layers)
    with _recording(layers, threshold) as seen, torch.no_grad():
        for batch in read_batches(calibration, "set_llm_int8(): calibration", model):
            batch.run(model)
    unseen = [name for name in layers if name not in seen]
    if unseen:
        warnings.warn(
            f"set_llm_int8(): calibration never reached {', '.join(unseen[:5])}"
            f"{f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''}: their columns are searched for in "
            "each batch",
            stacklevel=2,
        )
    counts: dict[str, int | None] = dict.fromkeys(layers)
    for name, above in seen.items():
        columns = above.nonzero().flatten().tolist()
        layers[name].set_llm_int8(threshold, columns)
        counts[name] = len(columns)
    return counts


@contextmanager
def _recording(layers: Mapping[str, Any], threshold: float) -> Iterator[dict[str, Tensor]]:
    """Per layer, bool `[in]`: which columns of its input exceeded the threshold (or were NaN) so far."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            above = ~(x.detach().abs() <= threshold).reshape(-1, x.shape[-1]).all(dim=0)
            seen[name] = above | seen[name] if name in seen else above

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_for(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
