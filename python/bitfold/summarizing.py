"""bitfold.summary: what a model's tensors take, by class, before and after folding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.nn._base import tensor_key
from bitfold.tables import Table, scaled

ORDER = ("linear", "conv1d", "embedding", "float matrices", "norms", "biases", "other", "buffers, not saved")


@dataclass
class Row:
    """One class of tensors; bytes."""

    name: str
    modules: int = 0
    weights: int = 0
    before: int = 0
    disk: int = 0
    resident: int = 0

    @property
    def ratio(self) -> float:
        """Bytes before / bytes on disk."""
        return self.before / self.disk if self.disk else float("nan")

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per logical weight."""
        return 8 * self.disk / self.weights if self.weights else float("nan")


@dataclass
class Summary:
    """The table of `bitfold.summary`: prints as text, shows as HTML in Jupyter, `to_dict()` for JSON."""

    rows: list[Row]
    formats: dict[str, int]
    tied: list[str]
    float_matrices: list[tuple[str, tuple[int, ...], int]]
    weights_by_bits: dict[int, int] = field(default_factory=dict)  # bits of the codes -> folded weights

    @property
    def total(self) -> Row:
        """Sum of all rows."""
        return _sum("whole model", self.rows)

    @property
    def folded(self) -> Row:
        """Sum of the packed classes: what was folded, metadata included."""
        packed = [row for row in self.rows if row.name in ("linear", "conv1d", "embedding")]
        return _sum("folded matrices", packed)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; sizes in bytes, NaN as None."""

        def as_dict(row: Row) -> dict[str, Any]:
            return {
                "modules": row.modules,
                "weights": row.weights,
                "before_bytes": row.before,
                "disk_bytes": row.disk,
                "resident_bytes": row.resident,
                "ratio": row.ratio if row.disk else None,
                "bits_per_weight": row.bits_per_weight if row.weights else None,
            }

        return {
            "classes": {row.name: as_dict(row) for row in self.rows},
            "folded": as_dict(self.folded),
            "total": as_dict(self.total),
            "formats": dict(self.formats),
            "weights_by_bits": {str(bits): count for bits, count in sorted(self.weights_by_bits.items())},
            "tied": list(self.tied),
            "float_matrices": [
                {"name": name, "shape": list(shape), "bytes": nbytes}
                for name, shape, nbytes in self.float_matrices
            ],
        }

    def _cells(self) -> list[list[str]]:
        size, unit = scaled(self.total.before)
        sizes = [f"before {unit}", f"on disk {unit}", f"resident {unit}"]
        head = ["class", "tensors", "weights", *sizes, "ratio", "bits/weight"]
        cells = [head]
        for row in [*self.rows, self.folded, self.total]:
            cells.append(
                [
                    row.name,
                    f"{row.modules:,}",
                    f"{row.weights:,}",
                    f"{row.before / size:.2f}",
                    f"{row.disk / size:.2f}",
                    f"{row.resident / size:.2f}",
                    f"{row.ratio:.2f}x" if row.disk else "-",
                    f"{row.bits_per_weight:.3f}" if row.weights and row.disk else "-",
                ]
            )
        return cells

    def _notes(self) -> list[str]:
        notes = []
        if self.formats:
            notes.append("formats: " + ", ".join(f"{name} ({count})" for name, count in self.formats.items()))
        if len(self.weights_by_bits) > 1:
            total = sum(self.weights_by_bits.values())
            shares = [
                f"{bits}-bit {count / total:.1%}" for bits, count in sorted(self.weights_by_bits.items())
            ]
            notes.append("folded weights by bits: " + ", ".join(shares))
        if self.tied:
            notes.append("tied, no bytes of their own: " + ", ".join(self.tied))
        if self.float_matrices:
            largest = self.float_matrices[:5]
            more = len(self.float_matrices) - len(largest)
            listed = ", ".join(f"{name} {list(shape)}" for name, shape, _ in largest)
            notes.append(f"matrices in float: {listed}" + (f" and {more} more" if more > 0 else ""))
        return notes

    def table(self) -> Table:
        """The table itself."""
        return Table(self._cells(), self._notes(), totals=2)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def summary(model: nn.Module) -> Summary:
    """Count the bytes of `model` by class of tensor; nothing is computed, nothing is changed.

    "before" takes folded matrices in the float dtype they had when they were folded, and all else as it is
    now. "on disk" is what `state_dict` holds, "resident" adds buffers that are not saved. Tensors that
    are shared count once.

    Example:
        >>> import bitfold, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 64))
        >>> print(summary(bitfold.quantize(model, "int8-row", progress=False)).total.weights)
        16448
    """
    rows = {name: Row(name) for name in ORDER}
    formats: dict[str, int] = {}
    by_bits: dict[int, int] = {}
    tied: list[str] = []
    matrices: list[tuple[str, tuple[int, ...], int]] = []
    seen: set[Any] = set()
    for name, module in model.named_modules():
        if isinstance(module, TiedHead | TiedEmbedding):
            tied.append(name)
        packed: set[str] = set()
        if isinstance(module, PackedModule):
            packed = set(module.packed_names)
            row = rows[module.kind]
            row.modules += 1
            row.weights += module.shape[0] * module.shape[1]
            row.before += module.original_nbytes()
            row.disk += module.packed_nbytes()
            row.resident += module.packed_nbytes()
            formats[str(module.format)] = formats.get(str(module.format), 0) + 1
            bits = module.format.bits
            by_bits[bits] = by_bits.get(bits, 0) + module.shape[0] * module.shape[1]
        for attribute, tensor, saved in _own_tensors(module):
            key = tensor_key(tensor)
            if attribute in packed or key in seen:
                continue
            seen.add(key)
            kind = _kind(module, attribute, tensor) if saved else "buffers, not saved"
            if kind == "float matrices":
                matrices.append(
                    (f"{name}.{attribute}".removeprefix("."), tuple(tensor.shape), _nbytes(tensor))
                )
            row = rows[kind]
            row.modules += 1
            row.weights += tensor.numel() if saved else 0
            row.before += _nbytes(tensor) if saved else 0
            row.disk += _nbytes(tensor) if saved else 0
            row.resident += _nbytes(tensor)
    matrices.sort(key=lambda item: -item[2])
    return Summary([row for row in rows.values() if row.modules], formats, tied, matrices, by_bits)


def _sum(name: str, rows: Iterable[Row]) -> Row:
    total = Row(name)
    for row in rows:
        total.modules += row.modules
        total.weights += row.weights
        total.before += row.before
        total.disk += row.disk
        total.resident += row.resident
    return total


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor, bool]]:
    tensors: list[tuple[str, Tensor, bool]] = [
        (n, p, True) for n, p in module._parameters.items() if p is not None
    ]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            tensors.append((name, buffer, name not in module._non_persistent_buffers_set))
    return tensors


def _kind(module: nn.Module, attribute: str, tensor: Tensor) -> str:
    if tensor.ndim >= 2 and tensor.is_floating_point():
        return "float matrices"
    if "norm" in type(module).__name__.lower():
        return "norms"
    return "biases" if attribute.endswith("bias") else "other"


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize
