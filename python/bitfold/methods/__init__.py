"""How codes are chosen for a Format. One file per method; each registers itself under its name."""

from bitfold.methods import gptq as _gptq
from bitfold.methods import round as _round
from bitfold.methods import search as _search
from bitfold.methods.base import (
    Method,
    Solution,
    Statistics,
    fold_weight,
    get,
    is_calibrated,
    names,
    register,
)

__all__ = [
    "Method",
    "Solution",
    "Statistics",
    "fold_weight",
    "get",
    "is_calibrated",
    "names",
    "register",
]

del _gptq, _round, _search  # imported for their registration only
