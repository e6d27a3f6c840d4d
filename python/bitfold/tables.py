"""Tables that print as text and show as HTML in Jupyter."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Table", "scaled"]


@dataclass(frozen=True)
class Table:
    """A head, rows of cells, of which the last `totals` are sums, and lines of text below.

    Example:
        >>> print(Table([["layer", "bytes"], ["fc", "8"], ["all", "8"]], ["one layer"], totals=1))
        layer  bytes
        ------------
        fc         8
        ------------
        all        8
        one layer
    """

    cells: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)
    totals: int = 0

    def __str__(self) -> str:
        widths = [max(len(line[i]) for line in self.cells) for i in range(len(self.cells[0]))]

        def text(line: Sequence[str]) -> str:
            return "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()

        rule = "-" * len(text(self.cells[0]))
        body = len(self.cells) - self.totals
        lines = [text(self.cells[0]), rule, *map(text, self.cells[1:body])]
        if self.totals:
            lines += [rule, *map(text, self.cells[body:])]
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self.cells
        top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        rows = []
        for i, line in enumerate(body):
            tag = "th" if i >= len(body) - self.totals else "td"
            rows.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}"


def scaled(largest: int) -> tuple[int, str]:
    """A unit in which `largest` bytes read well, and its name: `(1048576, "MiB")` or `(1024, "KiB")`."""
    return (2**20, "MiB") if largest >= 2**20 else (2**10, "KiB")
