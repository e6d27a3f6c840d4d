"""Writing a safetensors file tensor by tensor, in any order, when names, dtypes and shapes are known
beforehand.

The header precedes the bytes, so a writer that gets tensors one by one must know all sizes first; a folding
plan does.
Memory used is that of the tensor in hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitfold.errors import PackedDataError
from bitfold.io.safetensors_file import dtype_name

__all__ = ["SafetensorsWriter", "TensorSpec", "file_nbytes"]


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor that is going to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor (which may be on the meta device)."""
        return cls(tensor.dtype, tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


# As the format's own library sorts them; a file of the same tensors then has the same size to the byte.
_ORDER = (
    "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
)  # fmt: skip
_RANKS = {name: rank for rank, name in enumerate(_ORDER.split())}


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with its length in front, and where each tensor starts in the file."""
    # Wide elements first, so that every tensor lies on a multiple of its element size: what the format's own
    # writer does too, in this order of dtypes, and what lets readers map the file.
    order = sorted(specs, key=lambda name: (-_RANKS[dtype_name(specs[name].dtype)], name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, position = {}, 0
    for name in order:
        spec = specs[name]
        offsets[name] = position
        entries[name] = {
            "dtype": dtype_name(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: begin + offset for name, offset in offsets.items()}


def file_nbytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> int:
    """Exact size in bytes of the file that `SafetensorsWriter` will write."""
    return len(_header(specs, metadata)[0]) + sum(spec.nbytes for spec in specs.values())


class SafetensorsWriter:
    """A safetensors file being written; a context manager that checks on leaving that every tensor came.

    Args:
        path: the file to create.
        specs: dtype and shape of every tensor, by name.
        metadata: strings for the header's ``__metadata__``.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/a.safetensors"
        >>> x = torch.arange(3)
        >>> with SafetensorsWriter(path, {"x": TensorSpec.of(x)}, {"format": "pt"}) as writer:
        ...     writer.write("x", x)
    """

    def __init__(
        self, path: str | os.PathLike[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.specs = dict(specs)
        self.missing = set(specs)
        header, self._starts = _header(specs, metadata)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._put(memoryview(header), 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor.

        Raises:
            PackedDataError: the tensor was not announced, came twice, or is not what was announced.
            OSError: the disk is full or broken.
        """
        spec = self.specs.get(name)
        if spec is None or name not in self.missing:
            message = (
                f"{self.path}: tensor {name!r} was {'not announced' if spec is None else 'already written'}"
            )
            raise PackedDataError(message)
        found = TensorSpec.of(tensor)
        if found != spec:
            message = f"{self.path}: tensor {name!r} is {found}, expected {spec}"
            raise PackedDataError(message)
        if spec.nbytes:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._put(raw.data, self._starts[name])
        self.missing.discard(name)

    def _put(self, data: memoryview, position: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done : done + (1 << 30)], position + done)

    def close(self) -> None:
        """Close the file without any check."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if kind is None and self.missing:
            names = ", ".join(sorted(self.missing)[:5])
            message = f"{self.path}: {len(self.missing)} announced tensors never came: {names}"
            raise PackedDataError(message)
