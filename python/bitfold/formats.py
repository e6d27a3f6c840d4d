"""`Format`: how one matrix is stored. A face of the native table in ``csrc/core/format_table.inc``."""

from __future__ import annotations

from bitfold import _C
from bitfold.errors import FormatError

_C.set_format_error(FormatError)

Format = _C.Format

__all__ = ["Format", "codes"]


def codes() -> dict[str, str]:
    """All element codes with a remark each.

    Example:
        >>> "nf4" in codes()
        True
    """
    return {name: f"{bits} bits: {remark}" for name, bits, remark in _C.codes()}
