"""`Format`: how one matrix is stored. A face of the native table in ``csrc/core/format_table.inc``."""

from __future__ import annotations

import re

from bitfold import _C
from bitfold.errors import FormatError

_C.set_format_error(FormatError)

Format = _C.Format

__all__ = ["Format", "as_format", "codes"]


def as_format(fmt: Format | str) -> Format:
    """`fmt` itself, or the Format that the string names (FormatError if it names none)."""
    if isinstance(fmt, Format):
        return fmt
    if not isinstance(fmt, str):
        msg = f"format must be a string such as 'nf4', or a bitfold.Format, got {fmt!r}"  # type: ignore[unreachable]
        raise FormatError(msg)
    try:
        return Format(fmt)
    except FormatError as error:
        msg = f"{error}{_hint(fmt)}"
        raise FormatError(msg) from None


def _hint(text: str) -> str:
    """What may have been meant, where a format is spelled as other libraries do: `NF4`, `int4_g64`."""
    spelled = re.sub(r"[\s_]+", "-", text.strip().lower())
    try:
        Format(spelled)
    except FormatError:
        return ""
    return f"; did you mean {spelled!r}?"


def codes() -> dict[str, str]:
    """All element codes with a remark each.

    Example:
        >>> "nf4" in codes()
        True
    """
    return {name: f"{bits} bits: {remark}" for name, bits, remark in _C.codes()}
