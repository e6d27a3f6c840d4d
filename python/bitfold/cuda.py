"""The library with the ops for GPUs: built or not, loaded or not, and why.

`_ops_cuda.so` is there where bitfold was compiled with nvcc, and is of use only where torch sees a GPU.
Asking torch for that costs what starting CUDA costs, and forbids forks afterwards; so nothing is asked on
import: the library is loaded when torch itself starts CUDA, before the first CUDA tensor exists.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_ops_cuda.so")
_problem: str | None = None
_loaded = False


def built() -> bool:
    """Whether this installation has ops for GPUs.

    Example:
        >>> isinstance(built(), bool)
        True
    """
    return _LIBRARY.exists()


def loaded() -> bool:
    """Whether they are registered by now: from the first use of CUDA on.

    Example:
        >>> loaded() <= built()
        True
    """
    return _loaded


def problem() -> str | None:
    """Why they could not be loaded, or None."""
    return _problem


def load_with_cuda() -> None:
    """Have the library loaded as soon as torch starts CUDA: at once where it has done so."""
    if torch.version.cuda is None or not built():
        return
    # What torch's own seeding of devices goes through: called when CUDA starts, under its lock.
    torch.cuda._lazy_call(_load)


def _load() -> None:
    global _loaded, _problem
    if _loaded:
        return
    try:
        torch.ops.load_library(str(_LIBRARY))
        _loaded = True
    except (OSError, RuntimeError) as error:  # raised here, it would end CUDA for the whole process
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        _problem = str(cause)
        warnings.warn(
            f"bitfold's ops for GPUs cannot be loaded ({_problem}); folded weights work on the CPU only",
            RuntimeWarning,
            stacklevel=2,
        )
