"""How the codes of packed modules lie in memory: in rows, as stored, or in panels, as CPUs like them best.

Like the accuracy of products a property of running, never stored: `state_dict`, `.to("cuda")` and every
reader of `module.weight` get rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.formats import Format

LAYOUTS = ("rows", "panels")


def to_panels(codes: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """Codes in rows (int8 `[n]`) -> the same bytes in panels, int32 `[out / 16, n * 4 / out]`.

    A panel is sixteen rows: 32 bits of the first, of the second, … of the last, then the next 32 of each
    (`csrc/core/layout.h`). 3-bit codes: so the plane of the low bits, after it the other by 16 bits.
    """
    if codes.storage_offset() % 4:  # a mapped file may begin anywhere
        codes = codes.clone()
    rows = codes.view(shape[0] // 16, 16, -1)
    parts = [
        part.contiguous().view(dtype).transpose(1, 2).reshape(len(rows), -1).view(torch.int32)
        for part, dtype in zip(rows.split(_plane_bytes(fmt, shape), dim=-1), _PIECES, strict=False)
    ]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def to_rows(panels: Tensor, fmt: Format, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_panels`."""
    planes = panels.view(torch.int8).split([16 * size for size in _plane_bytes(fmt, shape)], dim=1)
    parts = [
        plane.contiguous().view(dtype).view(len(panels), -1, 16).transpose(1, 2).contiguous().view(torch.int8)
        for plane, dtype in zip(planes, _PIECES, strict=False)
    ]
    return torch.cat(parts, dim=-1).view(-1)


_PIECES = (torch.int32, torch.int16)  # of the first plane, and of the second of 3-bit codes


def _plane_bytes(fmt: Format, shape: tuple[int, int]) -> list[int]:
    """Bytes of a row in each of its planes."""
    return [shape[1] // 4, shape[1] // 8] if fmt.bits == 3 else [shape[1] * fmt.bits // 8]


class LiesInMemory(nn.Module):
    """Mixin of the modules with packed buffers: where the codes are, and the other buffers beside them.

    In panels the buffer `weight` is a stand-in on the meta device, so that nobody takes bytes in another
    order for codes. Others may stand there for a while, in rows (offloading and `functional_call` do that).
    """

    _panels: Tensor | None = None  # on the class, for modules pickled before there was a choice
    format: Format
    shape: tuple[int, int]
    packed_names: tuple[str, ...]

    @property
    def layout(self) -> str:
        """`"rows"` or `"panels"`: how the codes lie.

        Panels take the place of rows, of the same size; products of 2 to 16 rows of x take up to a quarter
        less time, and dequantizing more. Can be set where the module lies on the CPU, `out` is a multiple of
        16 and `in` of 64, unless each row has a codebook of its own (`kmeans4-row`): else ValueError.
        Moving to another device and loading bring rows back.
        """
        return "rows" if self._codes_in_panels() is None else "panels"

    @layout.setter
    def layout(self, layout: str) -> None:
        if layout not in LAYOUTS:
            msg = f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}"
            raise ValueError(msg)
        if layout == self.layout:
            return
        with torch.inference_mode(False), torch.no_grad():
            if layout == "rows":
                self._replace_codes(self._codes_in_rows())
                return
            problem = self.panels_problem()
            if problem:
                msg = f"layout: {problem}"
                raise ValueError(msg)
            codes = self._codes_in_rows()
            self._panels = to_panels(codes, self.format, self.shape)
            self._buffers["weight"] = torch.empty_like(codes, device="meta")

    def panels_problem(self) -> str | None:
        """Why the codes cannot lie in panels, or None where they can."""
        place = self._codes_in_rows().device.type
        if place != "cpu":
            return f"panels are for the CPU, the module is on {place}"
        if not self.format.suits_panels(self.shape):
            return (
                f"panels take out a multiple of 16, in of 64 and one codebook at most, got {self.format} "
                f"{list(self.shape)}"
            )
        return None

    def packed(self) -> list[Tensor]:
        """The packed buffers in the order of `Format.buffers`, codes in rows (out of panels: a copy)."""
        return [self._codes_in_rows(), *self._beside_codes()]

    def operands(self) -> list[Tensor]:
        """The packed buffers as they lie, for the ops that multiply, dequantize and look up."""
        if self._panels is not None and (panels := self._codes_in_panels()) is not None:
            return [panels, *self._beside_codes()]
        # nn.Module's attribute look-up would cost microseconds per call, a comprehension a quarter of one
        return list(map(self._buffers.__getitem__, self.packed_names))  # type: ignore[arg-type]

    def _beside_codes(self) -> Iterator[Tensor]:
        return map(self._buffers.__getitem__, self.packed_names[1:])  # type: ignore[arg-type]

    def _replace_codes(self, codes: Tensor) -> None:
        """Hold these codes, in rows, from now on."""
        self._buffers["weight"], self._panels = codes, None

    def _codes_in_panels(self) -> Tensor | None:
        codes = self._buffers["weight"]
        return self._panels if codes is not None and codes.is_meta else None

    def _codes_in_rows(self) -> Tensor:
        panels = self._codes_in_panels()
        if panels is None:
            return self._buffers["weight"]  # type: ignore[return-value]
        return to_rows(panels, self.format, self.shape)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._panels is not None:
            return self._codes_in_rows()
        return super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiesInMemory:
        panels = self._codes_in_panels()
        if panels is None or fn(panels.new_empty(0)).device.type != "cpu":
            self.layout = "rows"
            return super()._apply(fn, recurse)
        stand_in = self._buffers["weight"]
        self._buffers["weight"] = None  # which nn.Module passes over
        try:
            super()._apply(fn, recurse)
            self._panels = fn(panels)
        finally:
            self._buffers["weight"] = stand_in
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == "panels":
            destination[f"{prefix}weight"] = self._codes_in_rows()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.layout = "rows"
        super()._load_from_state_dict(*args)

    def _layout_repr(self) -> str:
        return "" if self.layout == "rows" else f", layout={self.layout}"


def set_layout(model: nn.Module, layout: str) -> int:
    """Have the codes of every packed matrix that a model multiplies with lie in another order.

    `"panels"` is for CPUs: products of 3 to 16 rows of x (speculative decoding, small batches, short
    prompts) and those of narrow layers take up to a quarter less time; those of one row of wide layers none,
    or a little more. The bytes are permuted, not copied: memory stays what it was, but for one matrix at a
    time. Saving, `state_dict()` and moving to another device give rows as ever. A checkpoint that is mapped
    into memory is shared with the file only in rows.

    Args:
        model: any module; its QuantLinear, QuantConv1D and the matrices of tied heads are set where they can
            (see `QuantLinear.layout`), others are left as they are.
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
    if layout not in LAYOUTS:
        msg = f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}"
        raise ValueError(msg)
    owners = {id(owner): owner for owner in map(_multiplied, model.modules()) if owner is not None}
    for owner in owners.values():
        if layout == "rows" or owner.panels_problem() is None:
            owner.layout = layout
    return sum(owner.layout == layout for owner in owners.values())


def _multiplied(module: nn.Module) -> LiesInMemory | None:
    """Whose matrix `module` multiplies with at a speed that the layout changes."""
    from bitfold.nn.accuracy import Multiplies

    if not isinstance(module, Multiplies) or getattr(module, "_mixed", None) is not None:
        return None
    owner = getattr(module, "source", module)
    return owner if isinstance(owner, LiesInMemory) else None
