"""A transformers model built from its config alone: every tensor on the meta device, no memory, no weights.

It tells what the config promises: which modules are embeddings and which linears, which weights are tied, and
the name, shape and dtype that `from_pretrained` would give to every tensor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bitfold.errors import PackedDataError

__all__ = ["build", "model_class", "read_config", "tied_groups"]


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint as an object.

    Raises:
        PackedDataError: it is missing, is not JSON, or does not say which model it describes.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        message = f"{path}: missing; expected the config.json that save_pretrained writes beside the weights"
        raise PackedDataError(message) from None
    except (ValueError, RecursionError) as error:
        message = f"{path}: not valid JSON ({error})"
        raise PackedDataError(message) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        message = f"{path}: no model_type, expected the name of an architecture such as 'bert' or 'llama'"
        raise PackedDataError(message)
    return config


def build(
    directory: Path, fallback_dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[Any, torch.dtype]:
    """The model that `directory`'s config describes, in eval mode, on meta, with the dtypes of a real load.

    Args:
        directory: a checkpoint; only config.json (and its Python files, if trusted) is read.
        fallback_dtype: the dtype of the model where the config does not name one.
        trust_remote_code: run Python files that came with the checkpoint.

    Returns:
        The model and its dtype, as `from_pretrained(directory, dtype="auto")` would choose it.

    Raises:
        PackedDataError: the config cannot be turned into a model; the message has transformers' reason.
    """
    import transformers

    raw = read_config(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        dtype = getattr(config, "dtype", None) or fallback_dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        cls = _model_class(raw, config, directory, trust_remote_code)
        with torch.device("meta"), _RealScalars():
            model = cls._from_config(config, dtype=dtype)
        _apply_dtypes(model, dtype)
    except (
        Exception
    ) as error:  # whatever transformers, or the checkpoint's own code, raises about this config
        reason = f"{type(error).__name__}: {error}"
        message = f"{directory / 'config.json'}: no model can be built from it. {reason}"
        raise PackedDataError(message) from error
    return model.eval(), dtype


class _RealScalars(TorchFunctionMode):
    """Makes `torch.tensor(3.5)` a real tensor inside `torch.device("meta")`.

    Some modules keep a factor only there (Gemma's scaled embedding under transformers 4), and it is needed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], int | float):
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def model_class(directory: Path, trust_remote_code: bool = False) -> Any:
    """The class that was saved in `directory`: the one named in `architectures`, else the base model's."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    return _model_class(read_config(directory), config, directory, trust_remote_code)


def _model_class(raw: dict[str, Any], config: Any, directory: Path, trust_remote_code: bool) -> Any:
    """The class named in `architectures`, from the checkpoint's own code where it has some."""
    import transformers

    names = raw.get("architectures") or []
    auto_map = raw.get("auto_map") or {}
    remote = {reference.split(".")[-1]: reference for key, reference in auto_map.items() if "Model" in key}
    if remote:
        if not trust_remote_code:
            message = "it brings its own Python code; pass trust_remote_code (--trust-remote-code) to run it"
            raise ValueError(message)
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        reference = remote.get(names[0] if names else "", next(iter(remote.values())))
        return get_class_from_dynamic_module(reference, str(directory))
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    if names:
        message = f"transformers {transformers.__version__} has no class {names[0]}"
        raise ValueError(message)
    return transformers.MODEL_MAPPING[type(config)]


def _apply_dtypes(model: Any, dtype: torch.dtype) -> None:
    """Give parameters that an architecture keeps in fp32 that dtype, as loading in half precision does."""
    if hasattr(model, "_get_dtype_plan"):
        patterns = [name.replace("*", ".*") for name in model._get_dtype_plan(dtype)]
    else:  # transformers 4.57
        kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        patterns = [rf"(^|\.){name}($|\.)" for name in kept] if dtype != torch.float32 else []
    if not patterns:
        return
    fp32 = re.compile("|".join(patterns))
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and fp32.search(name):
            parameter.data = parameter.data.to(torch.float32)


def tied_groups(model: nn.Module) -> list[set[str]]:
    """Sets of two or more names that are one and the same parameter or buffer, or those of one shared
    module.
    """
    names: dict[int, set[str]] = {}
    for tensors in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        for name, tensor in tensors:
            names.setdefault(id(tensor), set()).add(name)
    return [group for group in names.values() if len(group) > 1]
