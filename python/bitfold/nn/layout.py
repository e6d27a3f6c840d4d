"""How the codes of packed modules lie in memory: in rows, as stored, or in panels, as CPUs like them best.

Like the accuracy of products a property of running: state dicts, saved models and other devices have rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.formats import Format

LAYOUTS = ("rows", "panels")
_changing = threading.Lock()  # one layout at a time: threads may ask for state dicts of one model


def layout_name(layout: Any) -> str:
    """`layout` itself where it is one, else ValueError."""
    if layout not in LAYOUTS:
        msg = f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}"
        raise ValueError(msg)
    return str(layout)


def lies_in_panels(codes: Tensor) -> bool:
    """Whether these codes of a module are in panels: three dimensions, where rows have one."""
    return codes.ndim == 3


def to_panels(codes: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """Codes in rows, int8 `[n]` -> the same bytes in panels, int8 `[out / 16, n / 4 / out, 64]`.

    A panel is sixteen rows: 32 bits of the first, of the second, … of the last, then the next 32 of each
    (`csrc/core/layout.h`). 3-bit codes: so the plane of the low bits, after it the other by 16 bits.
    """
    rows = _aligned(codes).view(shape[0] // 16, 16, -1)
    planes = [
        plane.contiguous().view(piece).transpose(1, 2).reshape(len(rows), -1).view(torch.int8)
        for plane, piece in zip(rows.split(_plane_bytes(fmt, shape), dim=-1), _PIECES, strict=False)
    ]
    return _joined(planes).view(len(rows), -1, 64)


def to_rows(panels: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_panels`."""
    planes = _aligned(panels).flatten(1).split([16 * size for size in _plane_bytes(fmt, shape)], dim=1)
    rows = [
        plane.contiguous().view(piece).view(len(panels), -1, 16).transpose(1, 2).contiguous().view(torch.int8)
        for plane, piece in zip(planes, _PIECES, strict=False)
    ]
    return _joined(rows).view(-1)


_PIECES = (torch.int32, torch.int16)  # of the first plane, and of the second of 3-bit codes


def _plane_bytes(fmt: Format, shape: tuple[int, int]) -> list[int]:
    """Bytes of a row in each of its planes."""
    return [shape[1] // 4, shape[1] // 8] if fmt.bits == 3 else [shape[1] * fmt.bits // 8]


def _aligned(codes: Tensor) -> Tensor:
    """`codes`, copied if they cannot be read by words: a mapped file may begin anywhere."""
    return codes.clone() if codes.storage_offset() % 4 or codes.data_ptr() % 4 else codes


def _joined(planes: list[Tensor]) -> Tensor:
    return planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)


class HoldsCodes(nn.Module):
    """What packed modules know of their codes, the buffer `weight`: how they lie.

    In panels the buffer has another shape than rows, so that nothing takes its bytes for rows unnoticed.
    """

    format: Format
    shape: tuple[int, int]
    packed_names: tuple[str, ...]

    @property
    def layout(self) -> str:
        """`"rows"`, as codes are stored, or `"panels"`, as CPUs multiply them best; see `bitfold.set_layout`.

        Can be set at any time. ValueError where codes cannot lie so: panels are for modules on the CPU with
        `out` a multiple of 16 and `in` of 64, without a codebook for each row (`kmeans4-row`) and without
        LLM.int8(). Whatever hands codes out or replaces them brings rows back: `state_dict()`, saving,
        loading, offloading, moving to another device. Casts, copies and pickles keep panels.
        """
        return "panels" if lies_in_panels(self._codes()) else "rows"

    @layout.setter
    def layout(self, layout: str) -> None:
        wanted = layout_name(layout) == "panels"
        with _changing, torch.inference_mode(False), torch.no_grad():
            codes = self._codes()
            if wanted == lies_in_panels(codes):
                return
            if wanted and (problem := self.panels_problem()):
                msg = f"layout: {problem}"
                raise ValueError(msg)
            change = to_panels if wanted else to_rows
            self._buffers["weight"] = change(codes, self.format, self.shape)

    def panels_problem(self) -> str | None:
        """Why the codes cannot lie in panels, or None where they can."""
        place = self._codes().device.type
        if place != "cpu":
            return f"panels are for the CPU, the module is on {place}"
        if getattr(self, "_mixed", None) is not None:
            return "LLM.int8() reads rows; set_llm_int8(None) switches it off"
        if not self.format.suits_panels(self.shape):
            return (
                f"panels take out a multiple of 16, in of 64 and one codebook at most, got {self.format} "
                f"{list(self.shape)}"
            )
        return None

    def packed(self) -> list[Tensor]:
        """The packed buffers in the order of `Format.buffers`, codes in rows (out of panels: a copy)."""
        codes, *rest = self.operands()
        return [to_rows(codes, self.format, self.shape) if lies_in_panels(codes) else codes, *rest]

    def operands(self) -> list[Tensor]:
        """The packed buffers as they lie, for the ops that multiply, dequantize and look up."""
        # nn.Module's attribute look-up would cost microseconds per call, a comprehension a quarter of one
        packed: list[Tensor] = list(map(self._buffers.__getitem__, self.packed_names))  # type: ignore[arg-type]
        if lies_in_panels(packed[0]) and not packed[0].is_cpu:  # loaded or sent to where only rows are read
            packed[0] = to_rows(packed[0], self.format, self.shape)
        return packed

    def _codes(self) -> Tensor:
        return self._buffers["weight"]  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HoldsCodes:
        if self.layout == "panels" and fn(self._codes().new_empty(0)).device.type != "cpu":
            self.layout = "rows"
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Not a copy: what is written into the tensors of a state dict must arrive here. (Codes on meta are
        # offloaded, and will come back as they were.)
        if not self._codes().is_meta:
            self.layout = "rows"
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            self.layout = "rows"
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _layout_repr(self) -> str:
        return "" if self.layout == "rows" else f", layout={self.layout}"


def set_layout(model: nn.Module, layout: str) -> int:
    """Have the codes of every packed matrix that a model multiplies with lie in another order.

    `"panels"` is for products of 3 to 16 rows of x on a CPU (batches of sentences, speculative decoding,
    short prompts): most take a tenth to a fifth less time with AVX-512 VNNI, from 2 rows on up to half with
    less than that; more rows gain a few per cent. It is not for decoding one token at a time, which may take
    up to two fifths more, nor for training and look-ups in a tied embedding, which decode. docs/kernels.md
    has the figures.

    The bytes are permuted, in place of what was there: some milliseconds and a copy of one matrix at a time.
    Whatever hands codes out or replaces them brings rows back: `state_dict()`, saving, loading (PEFT asks for
    the state dict too when it loads an adapter), offloading, moving to another device. So this call comes
    last, and again after any of these; a state dict taken before no longer shares codes with the model.
    Casts, copies, pickles and exported programs keep panels. Codes that are mapped from a file, shared by
    `share_memory()`, or one tensor in two modules, no longer are. Processes that exchange buffers
    (DistributedDataParallel) need the same layout in each.

    Args:
        model: any module. For `"panels"` its QuantLinear, QuantConv1D and the matrices of tied heads are set
            where they can be (`layer.layout = "panels"` says why one cannot), others are left as they are;
            for `"rows"` all are set.
        layout: `"rows"`, as they are stored, or `"panels"`.

    Returns:
        How many matrices lie so now.

    Raises:
        ValueError: another layout.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> _ = bitfold.quantize(model, "int4-g64", progress=False)
        >>> set_layout(model, "panels")  # the second one has 32 columns
        1
        >>> model[0].layout, model[2].layout
        ('panels', 'rows')
    """
    layout = layout_name(layout)
    found = [_owner_of_codes(module, layout) for module in model.modules()]
    owners = {id(owner): owner for owner in found if owner is not None}
    for owner in owners.values():
        if layout == "rows" or owner.panels_problem() is None:
            owner.layout = layout
    return sum(owner.layout == layout for owner in owners.values())


def _owner_of_codes(module: nn.Module, layout: str) -> HoldsCodes | None:
    """Whose codes `module` uses, where their layout is to be set: panels only where they are multiplied."""
    from bitfold.nn.accuracy import Multiplies

    suits = isinstance(module, Multiplies) and getattr(module, "_mixed", None) is None
    owner = getattr(module, "source", module)
    return owner if isinstance(owner, HoldsCodes) and (suits or layout == "rows") else None
