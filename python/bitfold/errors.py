"""Every exception of bitfold: children of `BitfoldError` and of a built-in class that callers catch."""

from __future__ import annotations


class BitfoldError(Exception):
    """Base of all errors that bitfold raises on purpose."""


class FormatError(BitfoldError, ValueError):
    """A format string or combination that does not exist; names the token at fault and what is allowed."""


class WeightError(BitfoldError, ValueError):
    """A weight that cannot be folded: NaN or infinity, an integer or complex dtype, no elements."""


class CoverageError(BitfoldError, ValueError):
    """Weights that would stay float without having been named."""


class BudgetError(BitfoldError, ValueError):
    """A number of bytes that no choice of formats can meet; names the smallest that one can."""


class ActivationError(BitfoldError, ValueError):
    """A module put out NaN or infinity where finite numbers were expected; names the module."""


class PackedDataError(BitfoldError, RuntimeError):
    """Stored data that does not fit what was promised: missing, truncated, of another shape or dtype."""
