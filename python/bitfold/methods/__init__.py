"""How codes are chosen for a Format. One file per method; each registers itself under its name."""

from bitfold.methods import awq as _awq
from bitfold.methods import gptq as _gptq
from bitfold.methods import hqq as _hqq
from bitfold.methods import learned as _learned
from bitfold.methods import round as _round
from bitfold.methods import search as _search
from bitfold.methods.base import (
    BlockView,
    Method,
    Solution,
    Statistics,
    check_options,
    fold_weight,
    get,
    is_calibrated,
    names,
    preparation,
    refinement,
    register,
    suits,
    wants_float_stream,
)

__all__ = [
    "BlockView",
    "Method",
    "Solution",
    "Statistics",
    "check_options",
    "fold_weight",
    "get",
    "is_calibrated",
    "names",
    "preparation",
    "refinement",
    "register",
    "suits",
    "wants_float_stream",
]

del _awq, _gptq, _hqq, _learned, _round, _search  # imported for their registration only
