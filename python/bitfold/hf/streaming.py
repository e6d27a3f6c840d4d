"""Fold a checkpoint on disk into another one without ever holding the model: shard in, shard out.

The model is built on meta from its config, and folded there by `bitfold.quantize` itself, so that what is
folded, what stays in float, what is tied and what is refused is decided by the same code as in memory. Then
each tensor is read, folded and written by itself. Memory: the largest tensor (twice at most, when it must
change dtype), and Python.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitfold import manifest, methods
from bitfold.errors import PackedDataError, WeightError
from bitfold.formats import Format, as_format
from bitfold.hf import checkpoint_keys, meta_model, side_files
from bitfold.hf.conversions import keep_packed_on_save
from bitfold.io.atomic import atomic_directory
from bitfold.io.safetensors_writer import TensorSpec
from bitfold.io.shards import Checkpoint, ShardedWriter, parse_size
from bitfold.nn._base import check_finite
from bitfold.planning import Plan
from bitfold.quantizing import quantize

__all__ = ["StreamPlan", "fold_directory", "plan_directory"]

_METADATA = {"format": "pt"}
Progress = Callable[[str, int, int], None]


@dataclass
class StreamPlan:
    """What folding a directory will do, known before a single weight is read.

    Attributes:
        model: the folded model, on meta.
        manifest: what goes into `config.json` as `quantization_config`.
        specs: every tensor to be written.
        source_bytes: bytes of the weight files read.
        weights_bytes: bytes of the weight files that will be written; exact.
        side_bytes: bytes of the other files that will be copied.
        unused: tensors of the source for which the model has no place.
    """

    source: Path
    model: Any
    manifest: dict[str, Any]
    specs: dict[str, TensorSpec]
    units: list[checkpoint_keys.Unit]
    max_shard_size: int
    method: str | None
    methods: Mapping[str, str]
    source_bytes: int
    weights_bytes: int
    side_bytes: int
    unused: list[str]
    _floats: dict[str, TensorSpec] = field(repr=False)
    _homes: dict[str, str] = field(repr=False)
    _dtypes: dict[str, torch.dtype] = field(repr=False)

    @property
    def ratio(self) -> float:
        """Bytes of the source's weight files per byte of the export's."""
        return self.source_bytes / self.weights_bytes


def plan_directory(
    source: str | os.PathLike[str],
    format: str | Plan,
    *,
    embeddings: str | None = "int8-g64",
    skip: Sequence[str] = (),
    rules: Mapping[str, str | None] | None = None,
    method: str | None = None,
    max_shard_size: str | int = "5GB",
    trust_remote_code: bool = False,
) -> StreamPlan:
    """Read config and headers, and work out every tensor of the export.

    Args:
        source: a directory as `save_pretrained` writes it, in safetensors.
        format: format of the linear layers, or a `bitfold.Plan`, which says all that `embeddings`, `skip`
            and `rules` would.
        embeddings: format of the embeddings; None leaves them in float.
        skip: modules that stay in float, as for `bitfold.quantize`.
        rules: regular expression → format, as for `bitfold.quantize`.
        method: how codes are chosen; None for each format's own.
        max_shard_size: bytes, or text such as ``"5GB"``.
        trust_remote_code: run Python files that came with the checkpoint.

    Raises:
        FormatError: unknown format.
        ValueError: unknown method or size, or a pattern of `skip` or `rules` that matches nothing.
        CoverageError: float weights that nothing covers and nothing names.
        PackedDataError: a damaged or incomplete checkpoint, pickles, a config that does not fit the tensors.
        FileNotFoundError: nothing is there.
    """
    source = Path(source)
    if methods.is_calibrated(method):
        message = (
            f"method {method!r} needs calibration data, which runs through the whole model; load it and call "
            "bitfold.quantize(model, format, method=…, calibration=…), or choose a method such as 'search'"
        )
        raise ValueError(message)
    for text in [format, embeddings, *(rules or {}).values()]:
        if isinstance(text, str):
            as_format(text)  # before anything slow
    shard_size = parse_size(max_shard_size)
    with Checkpoint(source) as checkpoint:
        config = meta_model.read_config(source)
        _refuse_quantized(source, config)
        infos = dict(checkpoint.tensors)
        source_bytes = checkpoint.nbytes
    floats = [info.torch_dtype for info in infos.values() if info.torch_dtype.is_floating_point]
    model, _ = meta_model.build(source, floats[0] if floats else torch.float32, trust_remote_code)
    expected = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    groups = meta_model.tied_groups(model)
    total_names = set(expected)

    units, unused = checkpoint_keys.plan_units(model, infos)
    realized = [unit.realize(lambda key: torch.empty(infos[key].shape, device="meta")) for unit in units]
    _check_shapes(realized, expected, source)
    provided = {name for tensors in realized for name in tensors}
    for group in groups:
        if provided & group:
            provided |= group
    _check_missing(total_names - provided, model, source)

    quantize(model, format, embeddings=embeddings, skip=skip, rules=rules, method=method, progress=False)
    description = manifest.describe(model)
    keep_packed_on_save(model)
    homes = _homes(model, description["modules"], expected, groups)
    specs = _specs(model, realized, homes)
    side = sum((source / name).stat().st_size for name in side_files.side_files(source))
    return StreamPlan(
        source=source,
        model=model,
        manifest=description,
        specs=specs,
        units=units,
        max_shard_size=shard_size,
        method=method,
        methods=format.methods if isinstance(format, Plan) else {},
        source_bytes=source_bytes,
        weights_bytes=ShardedWriter.predict(specs, shard_size, _METADATA),
        side_bytes=side,
        unused=unused,
        _floats=expected,
        _homes=homes,
        _dtypes=_dtypes(units, realized, expected),
    )


def fold_directory(
    plan: StreamPlan,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Carry out a plan. `out` appears whole at the end, or not at all.

    Args:
        plan: from `plan_directory`.
        out: directory to write. With `overwrite`, an earlier export there is replaced, as a whole and at the
        end.
        overwrite: replace what is there, provided that it is a checkpoint (it has a config.json).
        progress: called with (tensor name, source bytes done, source bytes in all).

    Returns:
        Bytes of the weight files written.

    Raises:
        WeightError: NaN or Inf in a weight; names the tensor.
        PackedDataError: the source changed or broke while it was read.
        FileExistsError: `out` is there and may not be replaced.
        OSError: the disk is full; checked before anything is written.
    """
    target = Path(out)
    check_target(plan, target, overwrite)
    _check_space(plan, target)
    replaced = atomic_directory(target, overwrite, marker="config.json")
    with Checkpoint(plan.source) as checkpoint, replaced as directory:
        side_files.copy_side_files(plan.source, directory)
        total = plan.model.num_parameters() + _logical_parameters(plan.manifest)
        with ShardedWriter(directory, plan.specs, plan.max_shard_size, _METADATA, total) as writer:
            _stream(plan, checkpoint, writer, progress)
        _write_config(plan, directory)
        return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _stream(
    plan: StreamPlan, checkpoint: Checkpoint, writer: ShardedWriter, progress: Progress | None
) -> None:
    total = sum(info.nbytes for info in checkpoint)
    order = {info.name: number for number, info in enumerate(checkpoint)}  # as the bytes lie on the disk
    homes = list(plan._homes.values())
    shared = {home for home in homes if homes.count(home) > 1} if len(set(homes)) < len(homes) else set()
    digests: dict[str, str] = {}
    done = 0
    for unit in sorted(plan.units, key=lambda unit: order[unit.sources[0]]):
        outputs: dict[str, torch.Tensor] = {}
        tensors = unit.realize(lambda key: checkpoint.read(key, plan._dtypes.get(key)))
        for name in list(tensors):
            tensor = tensors.pop(name).to(plan._floats[name].dtype)
            home = plan._homes[name]
            if home in shared and not _first_of_group(home, name, tensor, digests):
                continue
            outputs |= _outputs(plan, home, tensor)
            del tensor
        for name, tensor in checkpoint_keys.saved_as(plan.model, outputs).items():
            writer.write(name, tensor)
        done += sum(checkpoint.tensors[key].nbytes for key in unit.sources)
        if progress is not None:
            progress(unit.sources[0], done, total)


def _outputs(plan: StreamPlan, home: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored for one tensor of the float model: itself, or the packed tensors of its module."""
    module = home.removesuffix(".weight")
    entry = plan.manifest["modules"].get(module)
    if entry is None or home != f"{module}.weight" or "format" not in entry:
        if (
            tensor.is_floating_point()
            and not bool(torch.isfinite(tensor).all())
            and _is_parameter(plan, home)
        ):
            bad = int((~torch.isfinite(tensor)).sum())
            message = (
                f"{home}: {bad} of {tensor.numel()} values are NaN or Inf, expected finite ones; "
                "mend the checkpoint"
            )
            raise WeightError(message)
        return {home: tensor}
    matrix = tensor.t() if entry["kind"] == "conv1d" else tensor
    check_finite(matrix, home)
    fmt = Format(entry["format"])
    packed = methods.fold_weight(matrix, fmt, plan.methods.get(module, plan.method)).packed
    suffixes = [suffix for suffix, _, _ in fmt.buffers(tuple(entry["shape"]))]
    return {f"{home}{suffix}": part for suffix, part in zip(suffixes, packed, strict=True)}


def _is_parameter(plan: StreamPlan, name: str) -> bool:
    # Buffers such as attention masks hold -inf on purpose.
    owner, _, attribute = name.rpartition(".")
    return attribute in plan.model.get_submodule(owner)._parameters


def _first_of_group(home: str, name: str, tensor: torch.Tensor, digests: dict[str, str]) -> bool:
    """Of several stored copies of a tied weight the first is taken, and the others must equal it."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(raw.data).hexdigest()
    if home not in digests:
        digests[home] = digest
        return True
    if digests[home] != digest:
        message = (
            f"{name}: tied to {home} by the config, but the checkpoint stores two different matrices; "
            "set tie_word_embeddings to false in config.json to keep both"
        )
        raise PackedDataError(message)
    return False


def _homes(
    model: Any, modules: Mapping[str, Any], expected: Mapping[str, TensorSpec], groups: Sequence[set[str]]
) -> dict[str, str]:
    """Where each tensor of the float model goes: its own name, or that of the one it is tied to."""
    from transformers.modeling_utils import _get_tied_weight_keys

    packed = {f"{name}.weight" for name, entry in modules.items() if "format" in entry}
    duplicates = [re.compile(pattern) for pattern in _get_tied_weight_keys(model) or ()]
    state = set(model.state_dict())
    homes = {name: name for name in expected}
    for group in groups:
        owners = sorted(group & packed)
        if not owners:
            # The rule by which save_pretrained chooses which of several names it keeps.
            names = sorted(group & state)
            matching = [name for name in names if any(pattern.search(name) for pattern in duplicates)]
            dropped = set(matching[: len(names) - 1])
            owners = [name for name in names if name not in dropped]
        homes |= dict.fromkeys(group, owners[0])
    return homes


def _specs(
    model: Any, realized: Sequence[Mapping[str, Any]], homes: Mapping[str, str]
) -> dict[str, TensorSpec]:
    """Every tensor to be written, under the name in the file, in natural order."""
    state = model.state_dict()
    specs: dict[str, TensorSpec] = {}
    for tensors in realized:
        outputs: dict[str, torch.Tensor] = {}
        for name in tensors:
            home = homes[name]
            module = home.removesuffix("weight")
            outputs |= {key: state[key] for key in _stored_names(home, module, state)}
        stored = checkpoint_keys.saved_as(model, outputs)
        specs |= {name: TensorSpec.of(tensor) for name, tensor in stored.items()}
    return dict(sorted(specs.items(), key=lambda item: _natural(item[0])))


def _dtypes(
    units: Sequence[checkpoint_keys.Unit],
    realized: Sequence[Mapping[str, Any]],
    expected: Mapping[str, TensorSpec],
) -> dict[str, torch.dtype]:
    """What to convert to while reading, by name in the source, for tensors that are only renamed."""
    return {
        unit.sources[0]: expected[next(iter(tensors))].dtype
        for unit, tensors in zip(units, realized, strict=True)
        if len(unit.sources) == len(tensors) == 1
    }


def _stored_names(home: str, module: str, state: Mapping[str, Any]) -> list[str]:
    if home.endswith("weight") and not state[home].is_floating_point():
        return [key for key in state if key.startswith(f"{module}weight") and "." not in key[len(module) :]]
    return [home]


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _refuse_quantized(source: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        name = (
            quantization.get("quant_method", "something") if isinstance(quantization, dict) else "something"
        )
        message = f"{source}: is already quantized ({name}); folding needs the float checkpoint it came from"
        raise PackedDataError(message)


def _check_shapes(
    realized: Sequence[Mapping[str, torch.Tensor]], expected: Mapping[str, TensorSpec], source: Path
) -> None:
    for tensors in realized:
        for name, tensor in tensors.items():
            if name not in expected:
                message = f"{source}: conversion made tensor {name!r}, which the model does not have"
                raise PackedDataError(message)
            if tuple(tensor.shape) != expected[name].shape:
                message = (
                    f"{source}: tensor {name!r} has shape {list(tensor.shape)}, expected "
                    f"{list(expected[name].shape)} from config.json; one of the two is wrong"
                )
                raise PackedDataError(message)


def _check_missing(missing: set[str], model: Any, source: Path) -> None:
    if missing:
        names = sorted(missing, key=_natural)
        message = (
            f"{source}: no tensor for {', '.join(names[:8])}{' …' if len(names) > 8 else ''} "
            f"({len(names)} in all), which {type(model).__name__} has; transformers would fill them with "
            "random numbers. Is a shard missing, or does architectures in config.json name another class "
            "than the one that was saved?"
        )
        raise PackedDataError(message)


def check_target(plan: StreamPlan, target: Path, overwrite: bool) -> None:
    """Raise FileExistsError where `fold_directory` could not write."""
    source, real = plan.source.resolve(), target.resolve()
    if real == source or real in source.parents:
        message = f"{target}: the source {plan.source} is in there; choose another directory"
        raise FileExistsError(errno.EEXIST, message)
    if not overwrite and real.is_dir() and any(real.iterdir()):
        message = f"{target}: exists and is not empty; choose another directory or pass --overwrite"
        raise FileExistsError(errno.EEXIST, message)


def _check_space(plan: StreamPlan, target: Path) -> None:
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    # An overwritten export stays until the new one is whole, so its bytes do not count as free.
    needed = plan.weights_bytes + plan.side_bytes + (4 << 20)
    if free < needed:
        message = f"{parent}: {free:,} bytes free, {needed:,} needed for the export; nothing was written"
        raise OSError(errno.ENOSPC, message)


def _logical_parameters(manifest: Mapping[str, Any]) -> int:
    shapes = [entry["shape"] for entry in manifest["modules"].values() if "format" in entry]
    return sum(rows * columns for rows, columns in shapes)


def _write_config(plan: StreamPlan, directory: Path) -> None:
    model = plan.model
    config = model.config
    config.architectures = [type(model).__name__]
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if dtypes:
        config.dtype = str(dtypes[0]).removeprefix("torch.")
    if getattr(config, "quantization_config", None) is None:
        config.quantization_config = plan.manifest
    config.save_pretrained(directory)
    if model.can_generate() and not (directory / "generation_config.json").exists():
        model.generation_config.save_pretrained(directory)
