"""BitfoldQuantizer: what transformers calls while it loads or saves a folded model.

Works with transformers 4.57 and 5.x, whose hooks differ in their arguments: every override takes what it
does not need as `*args, **kwargs`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

from bitfold.hf.checks import check_files, check_loaded, check_missing, float_shapes, folded_modules
from bitfold.hf.config import BitfoldConfig
from bitfold.hf.conversions import without_folded
from bitfold.hf.initializing import shield_folded, unshield
from bitfold.hf.registration import resume
from bitfold.hf.ties import release_ties

__all__ = ["BitfoldQuantizer"]

_OLD = int(transformers.__version__.partition(".")[0]) < 5


class BitfoldQuantizer(HfQuantizer):
    """Puts empty packed modules in place before the weights come, and checks every packed tensor after.

    With a recipe (`BitfoldConfig("nf4", …)`) and a float checkpoint it folds the loaded float model instead;
    the peak of memory is then the float model.
    """

    requires_calibration = False

    def __init__(self, quantization_config: BitfoldConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._loading: nn.Module | None = None  # the model between the two hooks
        self._shapes: dict[str, Any] = {}
        if self.pre_quantized and quantization_config.is_recipe:
            msg = (
                "config.json says quant_method 'bitfold' but has no 'modules' in quantization_config: the "
                "model was never folded. Remove quantization_config from config.json, or export the folded "
                "model again"
            )
            raise ValueError(msg)

    # Loading

    def validate_environment(self, *_args: Any, device_map: Any = None, **_kwargs: Any) -> None:
        """Refuse what would harm packed bytes: transformers 4 casts what it offloads to disk to floats."""
        if _OLD and isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            msg = (
                f"transformers {transformers.__version__} cannot offload packed weights to disk (it casts "
                "them to floats); give a device_map without 'disk', or use transformers 5"
            )
            raise ValueError(msg)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> nn.Module:
        if not self.pre_quantized:
            return model
        from bitfold import manifest

        stored = self.quantization_config.to_dict()
        check_files(checkpoint_files or _local_files(model), manifest.tensors(stored))
        # Another class than the saved one (AutoModel on a causal LM, say) may lack some of the modules.
        complete = self._is_complete(model)
        absent = manifest.prepare(model, stored, missing="raise" if complete else "ignore")
        if absent and len(absent) == len(stored["modules"]):
            manifest.prepare(model, stored)  # none fits: raises, naming one
        release_ties(model)
        shield_folded(model)
        self._watch_missing(model)
        self._loading = model
        self._shapes = float_shapes(model)
        return model

    def _watch_missing(self, model: nn.Module) -> None:
        """Have missing and misshapen packed tensors raise, where transformers has no hook for it (5.x)."""
        adjust = getattr(model, "_adjust_missing_and_unexpected_keys", None)
        if adjust is None:
            return

        @functools.wraps(adjust)
        def adjust_and_check(*args: Any, **kwargs: Any) -> Any:
            model.__dict__.pop("_adjust_missing_and_unexpected_keys", None)  # once: the model stays picklable
            result = adjust(*args, **kwargs)
            info: Any = args[0] if args else None
            if hasattr(info, "missing_keys"):  # 4.57 hands over two lists here
                mismatched, info.mismatched_keys = set(info.mismatched_keys), set()
                check_shapes(mismatched)
                check_missing(model, info.missing_keys, self._is_complete(model))
            return result

        model.__dict__["_adjust_missing_and_unexpected_keys"] = adjust_and_check

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], _prefix: str) -> list[str]:
        """Hook of transformers 4.57: raise where a packed tensor is missing."""
        if self.pre_quantized:
            ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
            missing = [key for key in missing_keys if not any(re.search(pattern, key) for pattern in ignored)]
            check_missing(model, missing, self._is_complete(model))
            # What is left are second names of shared modules (T5): to be filled under the first one.
            folded = {id(module) for _, module in folded_modules(model)}
            names = {
                name for name, module in model.named_modules(remove_duplicate=False) if id(module) in folded
            }
            missing_keys = [key for key in missing_keys if key.rpartition(".")[0] not in names]
        return missing_keys

    def _is_complete(self, model: Any) -> bool:
        return type(model).__name__ in (getattr(model.config, "architectures", None) or ())

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Hook of transformers 5: drop conversions that would compute with packed bytes."""
        model = self._loading if model is None else model  # 5.20 and before do not pass it
        return list(weight_conversions) if model is None else without_folded(list(weight_conversions), model)

    def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
        from bitfold import manifest

        self._loading = None
        unshield(model)
        model.__dict__.pop("_adjust_missing_and_unexpected_keys", None)
        if not self.pre_quantized:
            self._fold(model)
        check_loaded(model, self._shapes)
        self.quantization_config = BitfoldConfig(**manifest.describe(model))
        model.config.quantization_config = self.quantization_config
        return model

    def _fold(self, model: nn.Module) -> None:
        from bitfold.quantizing import quantize

        recipe = self.quantization_config
        quantize(
            model,
            recipe.format,
            embeddings=recipe.embeddings,
            skip=recipe.skip,
            rules=recipe.rules,
            method=recipe.method,
        )

    def _dequantize(self, *_args: Any, **_kwargs: Any) -> Any:
        msg = (
            "a folded model is not turned back into floats in place; load the float checkpoint instead "
            "(module.dequantize() gives one matrix as floats)"
        )
        raise NotImplementedError(msg)

    # Saving and what the model can do

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """Packed buffers are plain tensors: `save_pretrained` writes them as they are."""
        return True

    def get_state_dict_and_metadata(self, *_args: Any, **_kwargs: Any) -> tuple[None, dict[str, str]]:
        """Nothing special: the state dict is the model's own."""
        return None, {}

    @property
    def is_trainable(self) -> bool:
        """Adapters and the float parameters train; gradients flow through folded layers."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Packed codes themselves do not train."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Each folded layer is one custom op with a fake kernel."""
        return True


def _local_files(model: Any) -> list[Path]:
    """The shards of a local directory, for transformers 4, which does not tell; none where unsure."""
    name = getattr(model.config, "name_or_path", None)
    directory = Path(name) if name else None
    if directory is None or not directory.is_dir():
        return []
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("model-*-of-*.safetensors"))


def check_shapes(mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise PackedDataError for what transformers 5.23 found to have another shape than the model."""
    from bitfold.errors import PackedDataError

    for name, found, expected in sorted(mismatched, key=lambda item: item[0]):
        msg = (
            f"{name}: found shape {list(found)}, expected {list(expected)}; "
            "the file or config.json was damaged or edited: restore them, or fold the float model again"
        )
        raise PackedDataError(msg)


resume()
