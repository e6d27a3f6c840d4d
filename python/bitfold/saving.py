"""Files of plain torch models: one safetensors file with the manifest in its metadata.

Metadata `bitfold` is the manifest of `bitfold.manifest` as JSON; where tensors are shared it also holds
`"aliases": {name: name under which the tensor is stored}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitfold import manifest as manifests
from bitfold.errors import PackedDataError
from bitfold.io.safetensors_file import DTYPES
from bitfold.nn import PackedModule
from bitfold.nn._base import OUTLIER_INDEX, dtype_name, tensor_key
from bitfold.nn._places import Places
from bitfold.outliers import outlier_problem

METADATA_KEY = "bitfold"


def save(model: nn.Module, file: str | PathLike[str]) -> None:
    """Write the whole state of `model` to one safetensors file, atomically.

    The file holds the packed bytes as they are in RAM; the same model gives the same file, byte for byte. A
    process killed in the middle leaves a previous file untouched. For transformers models use
    `model.save_pretrained` instead.

    Example:
        >>> bitfold.save(model, "model.safetensors")  # doctest: +SKIP
        >>> bitfold.load_into(MyModel(), "model.safetensors")  # doctest: +SKIP
    """
    from bitfold.io.atomic import atomic_file
    from bitfold.io.safetensors_writer import SafetensorsWriter, TensorSpec

    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            msg = f"save(): {name}: state_dict holds a {type(tensor).__name__}, expected tensors only"
            raise TypeError(msg)
        if tensor.is_meta:
            msg = f"save(): {name}: is on the meta device, there are no values to save"
            raise ValueError(msg)
        key = tensor_key(tensor)
        if key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            stored[name] = tensor
    description = manifests.describe(model)
    if aliases:
        description["aliases"] = aliases
    metadata = {"format": "pt", METADATA_KEY: json.dumps(description)}
    specs = {name: TensorSpec.of(tensor) for name, tensor in stored.items()}
    with atomic_file(Path(file)) as temporary, SafetensorsWriter(temporary, specs, metadata) as writer:
        for name, tensor in stored.items():
            writer.write(name, tensor)


def load_into(model: nn.Module, file: str | PathLike[str]) -> nn.Module:
    """Fill a fresh float model of the saved architecture from a file of `bitfold.save`; returns it.

    The modules that the file has packed are replaced by packed ones. The model may be on meta, then the
    loaded tensors become its own (buffers that are not saved stay on meta, for the caller to fill); else they
    are copied to the devices of the model, floats into its dtypes.
    Names, dtypes and shapes of all tensors are compared with the model before anything changes.

    Raises:
        PackedDataError: truncated or foreign file, or one that does not fit the model: the tensor, what was
            found and what was expected.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(file)
    if not path.is_file():
        msg = f"load_into(): {path} is not a file"
        raise FileNotFoundError(msg)
    try:
        with safe_open(path, framework="pt") as stored:
            description = read_manifest(stored.metadata(), path)
            aliases = _aliases(description, set(stored.keys()), path)
            swaps, _ = manifests.build(model, description)
            Places(model).replace(swaps)
            try:
                _check_tensors(model, aliases, stored, path)
                _check_outliers(model, aliases, stored, path)
            except PackedDataError:
                Places(model).replace({new: old for old, new in swaps.items()})
                raise
            manifests.forget_tied_keys(model)
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        msg = f"{path}: not a whole safetensors file ({error})"
        raise PackedDataError(msg) from error
    state |= {name: state[target] for name, target in aliases.items()}
    on_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(state, assign=on_meta)
    return model


def read_manifest(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    """The manifest in a file's metadata; PackedDataError where there is none or it is not JSON."""
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        msg = f"{path}: no {METADATA_KEY!r} in the metadata, expected a file written by bitfold.save"
        raise PackedDataError(msg)
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f"{path}: metadata {METADATA_KEY!r} is not JSON ({error})"
        raise PackedDataError(msg) from error
    manifests.check(description)
    return description


def _aliases(description: Mapping[str, Any], names: set[str], path: Path) -> dict[str, str]:
    aliases = description.get("aliases", {})
    if not isinstance(aliases, dict):
        msg = f"{path}: aliases is {type(aliases).__name__}, expected an object"
        raise PackedDataError(msg)
    for name, target in aliases.items():
        if target not in names or name in names:
            msg = f"{path}: alias {name!r} of {target!r}: expected a new name for a stored tensor"
            raise PackedDataError(msg)
    return aliases


def _check_tensors(model: nn.Module, aliases: Mapping[str, str], stored: Any, path: Path) -> None:
    """Compare names, dtypes and shapes in the file with what the model, packed modules in place, holds."""
    found = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    found |= {name: found[target] for name, target in aliases.items()}
    needed = model.state_dict()
    for name, tensor in needed.items():
        expected = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        if name not in found:
            msg = f"{path}: {name} is missing, expected {expected}"
            raise PackedDataError(msg)
        code, shape = found[name].get_dtype(), list(found[name].get_shape())
        dtype = DTYPES.get(code)
        both_float = tensor.is_floating_point() and dtype is not None and dtype.is_floating_point
        if shape != list(tensor.shape) or (dtype != tensor.dtype and not both_float):
            has = code if dtype is None else dtype_name(dtype)
            msg = f"{path}: {name} is {has} {shape}, expected {expected}"
            raise PackedDataError(msg)
    for name in found:
        if name not in needed:
            msg = f"{path}: {name} is in the file but not in the model {type(model).__name__}"
            raise PackedDataError(msg)


def _check_outliers(model: nn.Module, aliases: Mapping[str, str], stored: Any, path: Path) -> None:
    """Refuse row starts and columns of sparse outliers that no weight has."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule) and module.format.outliers:
            weight = f"{name}.weight".removeprefix(".")
            keys = {suffix: aliases.get(weight + suffix, weight + suffix) for suffix in OUTLIER_INDEX}
            tensors = {suffix: stored.get_tensor(key) for suffix, key in keys.items()}
            problem = outlier_problem(weight, tensors, module.format, module.shape)
            if problem:
                msg = f"{path}: {problem}"
                raise PackedDataError(msg)
