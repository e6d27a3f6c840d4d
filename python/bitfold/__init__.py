"""bitfold makes torch models small for real: weights folded to 2-8 bits, on disk, in RAM, and computed with
in that form.

import bitfold
from transformers import AutoModel

model = AutoModel.from_pretrained("model")
bitfold.quantize(model, "nf4")              # in place, layer by layer
print(bitfold.summary(model))               # bytes before and after
model.save_pretrained("model-nf4")          # packed on disk
model = AutoModel.from_pretrained("model-nf4")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bitfold.errors import BitfoldError

# Where the native libraries cannot be loaded, importing still succeeds, so that `bitfold doctor` can say why,
# and every use of bitfold raises (see __getattr__).
_import_error: Exception | None = None
try:
    from bitfold import nn
    from bitfold.formats import Format
    from bitfold.hf.registration import install as _install_hf
    from bitfold.nn import set_accuracy, set_layout, set_llm_int8
    from bitfold.quantizing import quantize
    from bitfold.summarizing import summary
except (ImportError, OSError, RuntimeError) as _error:
    _import_error = _error

if TYPE_CHECKING:
    from bitfold import calibration
    from bitfold.comparing import compare
    from bitfold.hf.config import BitfoldConfig
    from bitfold.hf.loading import load, save_pretrained
    from bitfold.planning import Plan, plan
    from bitfold.saving import load_into, save

# Names that need an extra (safetensors, transformers) or that few programs use: imported when asked for.
_LAZY = {
    "BitfoldConfig": "bitfold.hf.config",
    "Plan": "bitfold.planning",
    "compare": "bitfold.comparing",
    "load": "bitfold.hf.loading",
    "load_into": "bitfold.saving",
    "plan": "bitfold.planning",
    "save": "bitfold.saving",
    "save_pretrained": "bitfold.hf.loading",
}

__all__ = [
    "BitfoldConfig",
    "BitfoldError",
    "Format",
    "Plan",
    "calibration",
    "compare",
    "load",
    "load_into",
    "nn",
    "plan",
    "quantize",
    "save",
    "save_pretrained",
    "set_accuracy",
    "set_layout",
    "set_llm_int8",
    "summary",
]

if _import_error is None:
    _install_hf()


def __getattr__(name: str) -> Any:
    if _import_error is not None and name in __all__:
        reason = f"{type(_import_error).__name__}: {_import_error}"
        message = f"bitfold cannot be used: {reason}; `bitfold doctor` says more"
        raise ImportError(message) from _import_error
    if name == "calibration":
        return import_module("bitfold.calibration")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("bitfold")
        except PackageNotFoundError:  # used from a source tree
            from bitfold import _C

            return _C.build_info()["version"]
    msg = f"module 'bitfold' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
