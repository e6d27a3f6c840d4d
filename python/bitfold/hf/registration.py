"""Makes transformers (and PEFT) know bitfold, without importing either.

transformers has no entry points for quantizers: a package must call its registry. Doing so at
`import bitfold` would import transformers, seconds of it, for people who fold plain torch models.
So callbacks wait for the modules concerned, and run at once where those are loaded already.
"""

from __future__ import annotations

import sys
import warnings
from types import ModuleType

from bitfold.hf.postimport import after_import
from bitfold.manifest import QUANT_METHOD

__all__ = ["install", "resume"]

_installed = False
_registering = False


def install() -> None:
    """Register bitfold with transformers and PEFT now, or right after they are imported. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    after_import("transformers.quantizers.auto", _register)
    after_import("transformers.modeling_utils", _guard_resize)
    after_import("peft.tuners.lora.layer", _guard_merge)


def resume() -> None:
    """Register if that had to wait for the module which calls this at its end (see `_register`)."""
    auto = sys.modules.get("transformers.quantizers.auto")
    if auto is not None and QUANT_METHOD not in getattr(auto, "AUTO_QUANTIZER_MAPPING", {QUANT_METHOD: None}):
        _register(auto)


def _register(auto: ModuleType) -> None:
    """Enter the quantizer and its config into the registries of `transformers.quantizers.auto`."""
    global _registering
    if _registering:
        return  # the imports below end in `resume`
    for name, attribute in (("config", "BitfoldConfig"), ("quantizer", "BitfoldQuantizer")):
        module = sys.modules.get(f"bitfold.hf.{name}")
        if module is not None and not hasattr(module, attribute):
            return  # that module's own import of transformers led here: it calls `resume` at its end
    _registering = True
    try:
        from bitfold import quantizing
        from bitfold.hf.config import BitfoldConfig
        from bitfold.hf.conversions import keep_packed_on_save
        from bitfold.hf.model_card import hook_upload
        from bitfold.hf.quantizer import BitfoldQuantizer
        from bitfold.hf.ties import release_ties

        # The registry refuses a second entry under one name; after a reload of bitfold the new class counts.
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
        auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
        auto.register_quantization_config(QUANT_METHOD)(BitfoldConfig)
        auto.register_quantizer(QUANT_METHOD)(BitfoldQuantizer)
        quantizing.AFTER_FOLDING[:] = [keep_packed_on_save, release_ties]
        hook_upload()
    except Exception as error:  # an unknown transformers must still be importable
        _warn("transformers", error)
    finally:
        _registering = False


def _guard_resize(modeling_utils: ModuleType) -> None:
    try:
        from bitfold.hf.resizing import guard_resize

        guard_resize(modeling_utils)
    except Exception as error:  # an unknown transformers must still be importable
        _warn("transformers", error)


def _guard_merge(layer: ModuleType) -> None:
    try:
        from bitfold.hf.peft import guard_merge

        guard_merge(layer)
    except Exception as error:  # an unknown PEFT must still be importable
        _warn("peft", error)


def _warn(package: str, error: Exception) -> None:
    warnings.warn(
        f"bitfold could not register with {package}: {type(error).__name__}: {error}. Folded models will "
        f"not load through {package} in this process; `bitfold doctor` tells which versions are supported",
        RuntimeWarning,
        stacklevel=2,
    )
