"""What a checkpoint on disk is made of, told from its headers alone: no tensor is read, no model is built."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold import manifest
from bitfold.errors import PackedDataError
from bitfold.formats import Format
from bitfold.io.safetensors_file import TensorInfo
from bitfold.io.shards import Checkpoint
from bitfold.summarizing import ORDER, Row, Summary

__all__ = ["Inspection", "inspect", "read_manifest", "summarize"]


@dataclass
class Inspection:
    """What `bitfold inspect` shows.

    Attributes:
        path: directory or file.
        manifest: the description of the folded modules, or None where nothing is folded.
        summary: bytes by class of tensor. "before" takes folded matrices in their float dtype.
        files: weight files and their bytes.
        model: class named in config.json, if any.
    """

    path: Path
    manifest: dict[str, Any] | None
    summary: Summary
    files: dict[str, int]
    model: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        modules = (self.manifest or {}).get("modules", {})
        return {
            "path": str(self.path),
            "model": self.model,
            "folded_modules": sum("format" in entry for entry in modules.values()),
            "files": self.files,
            **self.summary.to_dict(),
        }


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read config and headers of a checkpoint directory, or of one safetensors file.

    Raises:
        PackedDataError: damaged files, or a manifest that does not make sense.
        FileNotFoundError: nothing is there.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> safetensors.torch.save_file({"fc.weight": torch.zeros(4, 8)}, path)
        >>> inspect(path).summary.total.disk
        128
    """
    path = Path(path)
    with Checkpoint(path) as checkpoint:
        description = read_manifest(path, checkpoint.metadata)
        infos = dict(checkpoint.tensors)
        if description is not None:
            _check_headers(path, infos, description)
        files = {file.path.name: file.size for file in checkpoint.files}
    config = _config(path)
    names = config.get("architectures") or [None]
    return Inspection(path, description, summarize(infos, description), files, names[0])


def _check_headers(path: Path, infos: Mapping[str, TensorInfo], description: Mapping[str, Any]) -> None:
    """Refuse to count by a manifest that the headers contradict; absent names may be spelled otherwise."""
    for name, (dtype, shape) in manifest.tensors(description).items():
        info = infos.get(name)
        if info is None:
            continue
        found = str(info.torch_dtype).removeprefix("torch.")
        if (found, info.shape) != (dtype, shape):
            message = (
                f"{path}: tensor {name!r} is {found} {list(info.shape)}, "
                f"expected {dtype} {list(shape)} from the manifest; one of the two was damaged or edited"
            )
            raise PackedDataError(message)


def read_manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The manifest of a directory (in config.json) or of a plain file (in its metadata); None where there is
    none.

    Raises:
        PackedDataError: it is there and does not make sense.
    """
    found: Any = _config(path).get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") != manifest.QUANT_METHOD:
        found = None  # somebody else's
    if found is None and "bitfold" in metadata:
        try:
            found = json.loads(metadata["bitfold"])
        except (ValueError, RecursionError) as error:
            message = f"{path}: the bitfold entry of the metadata is not valid JSON ({error})"
            raise PackedDataError(message) from None
    if found is not None:
        try:
            manifest.check(found)
        except PackedDataError as error:
            message = f"{path}: {error}"
            raise PackedDataError(message) from error
    return found


def summarize(infos: Mapping[str, TensorInfo], description: Mapping[str, Any] | None) -> Summary:
    """Count bytes by class of tensor.

    Args:
        infos: what the headers say, by the names that the manifest uses.
        description: the manifest, or None.
    """
    rows = {name: Row(name) for name in ORDER}
    formats: dict[str, int] = {}
    by_bits: dict[int, int] = {}
    tied: list[str] = []
    matrices: list[tuple[str, tuple[int, ...], int]] = []
    packed: dict[str, str] = {}
    for name, entry in ((description or {}).get("modules") or {}).items():
        if "format" not in entry:
            tied.append(name)
            continue
        row = rows[entry["kind"]]
        row.modules += 1
        row.weights += math.prod(entry["shape"])
        row.before += math.prod(entry["shape"]) * original_itemsize(entry)
        formats[entry["format"]] = formats.get(entry["format"], 0) + 1
        bits = Format(entry["format"]).bits
        by_bits[bits] = by_bits.get(bits, 0) + math.prod(entry["shape"])
        packed[name] = entry["kind"]
    for info in infos.values():
        owner, _, attribute = info.name.rpartition(".")
        if owner in packed and attribute.startswith("weight"):
            row = rows[packed[owner]]
        else:
            row = rows[_kind(info)]
            row.modules += 1
            row.weights += math.prod(info.shape)
            row.before += info.nbytes
            if row.name == "float matrices":
                matrices.append((info.name, info.shape, info.nbytes))
        row.disk += info.nbytes
        row.resident += info.nbytes
    matrices.sort(key=lambda item: -item[2])
    return Summary([row for row in rows.values() if row.modules], formats, tied, matrices, by_bits)


def original_itemsize(entry: Mapping[str, Any]) -> int:
    """Bytes per weight that a folded matrix had before; float32 where the manifest does not say."""
    dtype = getattr(torch, str(entry.get("dtype", "float32")), torch.float32)
    return int(dtype.itemsize)


def _kind(info: TensorInfo) -> str:
    if len(info.shape) >= 2 and info.torch_dtype.is_floating_point:
        return "float matrices"
    if "norm" in info.name.lower() or ".ln_" in info.name.lower():
        return "norms"
    return "biases" if info.name.endswith("bias") else "other"


def _config(path: Path) -> dict[str, Any]:
    """config.json beside the weights, or an empty object where there is none."""
    file = path / "config.json"
    if not path.is_dir() or not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"{file}: not valid JSON ({error})"
        raise PackedDataError(message) from None
    if not isinstance(config, dict):
        message = f"{file}: is a {type(config).__name__}, expected an object"
        raise PackedDataError(message)
    return config
