"""Checkpoints of one or many safetensors shards: opened as a whole, checked as a whole, and written as a
stream.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bitfold.errors import PackedDataError
from bitfold.io.safetensors_file import SafetensorsFile, TensorInfo
from bitfold.io.safetensors_writer import SafetensorsWriter, TensorSpec, file_nbytes

__all__ = ["INDEX_NAME", "Checkpoint", "ShardedWriter", "parse_size", "plan_shards"]

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")


class Checkpoint:
    """All tensors of a directory (or of a single file), opened together. Loads nothing until asked.

    Args:
        path: a directory with ``model.safetensors`` or with shards and ``model.safetensors.index.json``, or
        one
            ``.safetensors`` file.

    Raises:
        PackedDataError: a shard is missing or damaged, a tensor is stored in two shards, the index names
        tensors that
            no shard has or the other way round, or there are only pickles.
        FileNotFoundError: nothing is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files: list[SafetensorsFile] = []
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        names, index = _list_files(self.path)
        try:
            for name in names:
                self._open(name)
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all weight files, headers included."""
        return sum(file.size for file in self.files)

    @property
    def metadata(self) -> dict[str, str]:
        """Header metadata of the first file."""
        return self.files[0].metadata

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in memory of its own, in `dtype` if given; see `SafetensorsFile.read`."""
        if name not in self._file_of:
            message = f"{self.path}: tensor {name!r} is in none of the {len(self.files)} weight files"
            raise PackedDataError(message)
        return self._file_of[name].read(name, dtype)

    def __iter__(self) -> Iterator[TensorInfo]:
        """Tensors in the order in which their bytes lie, file after file."""
        for file in self.files:
            yield from file

    def close(self) -> None:
        """Close all files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        try:
            file = SafetensorsFile(path)
        except FileNotFoundError:
            message = f"{path}: this shard is named in {INDEX_NAME} but is missing; fetch it again"
            raise PackedDataError(message) from None
        self.files.append(file)
        for info in file:
            if info.name in self.tensors:
                other = self.tensors[info.name].path.name
                message = f"{self.path}: tensor {info.name!r} is stored twice, in {other} and in {path.name}"
                raise PackedDataError(message)
            self.tensors[info.name] = info
            self._file_of[info.name] = file

    def _check_index(self, index: dict[str, str]) -> None:
        for name, shard in index.items():
            info = self.tensors.get(name)
            if info is None or info.path.name != Path(shard).name:
                where = "in no shard" if info is None else f"in {info.path.name}"
                message = (
                    f"{self.path}: {INDEX_NAME} says that tensor {name!r} is in {shard}, found it {where}"
                )
                raise PackedDataError(message)
        spare = sorted(set(self.tensors) - set(index))
        if spare:
            message = (
                f"{self.path}: tensor {spare[0]!r} is in {self.tensors[spare[0]].path.name} but not in "
                f"{INDEX_NAME} ({len(spare)} such tensors); the directory mixes files of two checkpoints"
            )
            raise PackedDataError(message)


def _list_files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Weight files of a checkpoint in reading order, and the index's map from tensor to shard if there is
    one.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return [path], None
        if any(path.match(pattern) for pattern in _PICKLES):
            raise _pickle_error(path, [path])
        message = f"{path}: not a .safetensors file; expected one, or a directory that holds some"
        raise PackedDataError(message)
    if not path.is_dir():
        message = f"{path}: no such file or directory"
        raise FileNotFoundError(message)
    if (path / WEIGHTS_NAME).exists():
        return [path / WEIGHTS_NAME], None
    index_path = path / INDEX_NAME
    if index_path.exists():
        index = _read_index(index_path)
        return [path / shard for shard in sorted(set(index.values()))], index
    loose = sorted(path.glob("*.safetensors"))
    if len(loose) == 1:
        return loose, None
    pickles = sorted(
        {file for pattern in _PICKLES for file in path.glob(pattern) if file.name != "training_args.bin"}
    )
    if not loose and pickles:
        raise _pickle_error(path, pickles)
    found = f"{len(loose)} .safetensors files but no index" if loose else "no .safetensors file"
    message = f"{path}: {found}, expected {WEIGHTS_NAME} or {INDEX_NAME} with its shards"
    raise PackedDataError(message) if loose else FileNotFoundError(message)


def _pickle_error(path: Path, files: list[Path]) -> PackedDataError:
    return PackedDataError(
        f"{path}: the weights are in {files[0].name}, a pickle; reading a pickle can run code in it, "
        "and it cannot be read tensor by tensor. Only safetensors is taken: load the model once with its own "
        "library in a place where you trust the file, and save_pretrained it (which writes safetensors)"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        index = content["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        message = f"{path}: not an index of shards, expected a JSON object with weight_map ({error!r})"
        raise PackedDataError(message) from None
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(shard, str) for shard in index.values())
    ):
        message = f"{path}: weight_map must map tensor names to file names and not be empty"
        raise PackedDataError(message)
    for name, shard in index.items():
        # A shard elsewhere (../../x, /etc/x) would make a checkpoint read files that are not its own.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            message = (
                f"{path}: tensor {name!r} is said to be in {shard!r}, "
                "expected a .safetensors file beside the index"
            )
            raise PackedDataError(message)
    return index


def parse_size(text: str | int) -> int:
    """Bytes from ``"5GB"``, ``"200MiB"``, ``"1000"``; decimal units as usual for shard sizes, binary ones
    with an i.
    """
    if isinstance(text, int):
        size = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
        if match is None:
            message = f"size {text!r} not understood, expected a number and a unit such as 5GB, 200MB or 1GiB"
            raise ValueError(message)
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        message = f"size must be positive, got {text!r}"
        raise ValueError(message)
    return size


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_size: int) -> dict[str, dict[str, TensorSpec]]:
    """Deal tensors out to files as the hub's library does: in order, none above `max_shard_size` unless one
    tensor is.

    Returns:
        File name → specs of its tensors. One file is called ``model.safetensors``, more of them
        ``model-00001-of-00003.safetensors`` and so on.
    """
    groups: list[dict[str, TensorSpec]] = []
    current: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in specs.items():
        if spec.nbytes > max_shard_size:
            groups.append({name: spec})
            continue
        if size + spec.nbytes > max_shard_size:
            groups.append(current)
            current, size = {}, 0
        current[name] = spec
        size += spec.nbytes
    if current or not groups:
        groups.append(current)
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


class ShardedWriter:
    """Shards and their index, written tensor by tensor in any order into an existing directory.

    Args:
        directory: where to write.
        specs: dtype and shape of every tensor, in the order in which they are dealt out to shards.
        max_shard_size: bytes.
        metadata: strings for the header of every shard.
        total_parameters: number of weights of the model, for the index.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        specs: Mapping[str, TensorSpec],
        max_shard_size: int,
        metadata: Mapping[str, str],
        total_parameters: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.shards = plan_shards(specs, max_shard_size)
        self._metadata = dict(metadata)
        self._total_parameters = total_parameters
        self._shard_of = {name: shard for shard, group in self.shards.items() for name in group}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = contextlib.ExitStack()

    @staticmethod
    def predict(specs: Mapping[str, TensorSpec], max_shard_size: int, metadata: Mapping[str, str]) -> int:
        """Bytes of all weight files together, headers included, index not."""
        return sum(file_nbytes(group, metadata) for group in plan_shards(specs, max_shard_size).values())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor into its shard; see `SafetensorsWriter.write`."""
        shard = self._shard_of.get(name)
        if shard is None:
            message = f"{self.directory}: tensor {name!r} was not announced"
            raise PackedDataError(message)
        self._writers[shard].write(name, tensor)

    def __enter__(self) -> ShardedWriter:
        with contextlib.ExitStack() as stack:
            for shard, group in self.shards.items():
                writer = SafetensorsWriter(self.directory / shard, group, self._metadata)
                self._writers[shard] = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, value, trace)
        if kind is None and len(self.shards) > 1:
            total = sum(spec.nbytes for group in self.shards.values() for spec in group.values())
            metadata: dict[str, int] = {"total_size": total}
            if self._total_parameters is not None:
                metadata["total_parameters"] = self._total_parameters
            index = {"metadata": metadata, "weight_map": dict(sorted(self._shard_of.items()))}
            (self.directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
