"""Is what was stored exactly what the formats say? Asked of the files before, and of the model after a load.

transformers 5.0 to 5.22 assign tensors of any shape to a quantized model, every version casts a float tensor
to the integer type that a buffer declares, and missing tensors are filled with whatever memory held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from bitfold.errors import PackedDataError
from bitfold.io.safetensors_file import SafetensorsFile
from bitfold.nn import PackedModule
from bitfold.nn._base import OUTLIER_INDEX, dtype_name
from bitfold.outliers import outlier_problem

__all__ = ["check_files", "check_loaded", "check_missing", "float_shapes", "folded_modules"]


def folded_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """`(name, module)` of every module that owns a packed matrix, each once."""
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            yield name, module


def check_files(
    files: Iterable[str | Path], expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
) -> None:
    """Check the headers of safetensors files; no tensor is read.

    Args:
        files: the shards of one checkpoint. Files of other kinds are passed over.
        expected: `{tensor name: (dtype, shape)}` as `bitfold.manifest.tensors` gives it. A tensor found under
            such a name must fit; one that is absent may have another name in the file (transformers renames)
            and is judged after the load.

    Raises:
        PackedDataError: a file that is truncated or no safetensors file, or a tensor that does not fit.
    """
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with SafetensorsFile(file) as opened:
            for info in opened:
                want = None if expected is None else expected.get(info.name)
                have = (dtype_name(info.torch_dtype), info.shape)
                if want is not None and have != want:
                    found, wanted = (f"{dtype} {list(shape)}" for dtype, shape in (have, want))
                    msg = f"{info.name} in {file}: found {found}, expected {wanted}; {_REMEDY}"
                    raise PackedDataError(msg)


_REMEDY = "the file or config.json was damaged or edited: restore them, or fold the float model again"


def check_missing(model: nn.Module, missing: Iterable[str], complete: bool) -> None:
    """Raise PackedDataError for tensors without which the model would compute with leftovers of memory.

    Args:
        model: the model being loaded, with its packed modules in place.
        missing: names that the checkpoint did not have.
        complete: whether the checkpoint was saved from this very class, so that nothing may be missing;
            otherwise a new head (drawn at random, with a warning by transformers) is what the user asked for.
    """
    missing = set(missing)
    aliases: dict[int, list[str]] = {}  # a module that hangs in several places is stored under one name
    for name, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(id(module), []).append(f"{name}." if name else "")
    lost = []
    for _, module in model.named_modules():
        names = aliases[id(module)]
        for tensor in (*module._parameters, *module._buffers):
            if all(alias + tensor in missing for alias in names) and (
                complete or isinstance(module, PackedModule)
            ):
                lost.append(names[0] + tensor)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        msg = (
            f"{', '.join(lost[:5])}{more}: not in the checkpoint, expected one tensor for each; "
            "a shard is missing or was edited: restore it, or fold the float model again"
        )
        raise PackedDataError(msg)


def float_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the float parameters that a checkpoint is about to fill, for `check_loaded`."""
    return {name: p.shape for name, p in model.named_parameters() if p.is_floating_point()}


def check_loaded(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise PackedDataError unless every packed buffer holds data of the dtype and shape of its format.

    Float parameters must have kept the shapes that they had before the load, and still be floats: with any
    quantizer at work, transformers before 5.23 puts what the file holds in their place, be it the packed
    bytes of a module that config.json does not name.
    """
    for name, parameter in model.named_parameters():
        expected = shapes.get(name)
        if expected is not None and (parameter.shape != expected or not parameter.is_floating_point()):
            found = f"{dtype_name(parameter.dtype)} {list(parameter.shape)}"
            msg = f"{name}: found {found}, expected a float tensor {list(expected)}; {_REMEDY}"
            raise PackedDataError(msg)
    offloaded = "disk" in {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    for name, module in folded_modules(model):
        for suffix, dtype, shape in module.format.buffers(module.shape):
            key = f"{name}.weight{suffix}"
            tensor = getattr(module, f"weight{suffix}")
            found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            if found != f"{dtype} {list(shape)}":
                msg = (
                    f"{key}: found {found}, expected {dtype} {list(shape)} "
                    f"(format {module.format}, matrix {list(module.shape)}); {_REMEDY}"
                )
                raise PackedDataError(msg)
            if tensor.is_meta and not offloaded:
                msg = f"{key}: was not loaded (still on the meta device); {_REMEDY}"
                raise PackedDataError(msg)
        if module.format.outliers:
            stored = {suffix: getattr(module, f"weight{suffix}") for suffix in OUTLIER_INDEX}
            problem = outlier_problem(f"{name}.weight", stored, module.format, module.shape)
            if problem:
                raise PackedDataError(f"{problem}; {_REMEDY}")  # noqa: EM102
