"""Reading safetensors files with doubt: every length is checked before it is believed.

The `safetensors` package maps files into memory, where every page read counts as resident. Streaming a
checkpoint through a small memory needs plain reads of one tensor at a time, and needs errors that name the
tensor at fault, so the header (a length, a JSON object, then the bytes) is read here. Nothing is executed and
nothing is allocated that the file does not really contain.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from bitfold.errors import PackedDataError

__all__ = ["DTYPES", "SafetensorsFile", "TensorInfo", "dtype_name"]

# Same cap as the format's own reader; a header of 100 MB would describe about a million tensors.
_MAX_HEADER_BYTES = 100_000_000
# Elements converted at a time when a tensor is read into another dtype.
_PIECE = 1 << 24

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which safetensors knows a torch dtype, such as ``"BF16"``."""
    try:
        return _NAMES[dtype]
    except KeyError:
        message = f"safetensors has no name for {dtype}; it stores {', '.join(DTYPES)}"
        raise PackedDataError(message) from None


@dataclass(frozen=True)
class TensorInfo:
    """What a header says about one tensor, checked: name, dtype, shape, and where its bytes lie in the
    file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # first byte, counted from the start of the file
    nbytes: int
    path: Path

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own."""
        return DTYPES[self.dtype]


class SafetensorsFile:
    """An open safetensors file whose header has been checked.

    Args:
        path: the file.

    Raises:
        PackedDataError: the file is truncated, has bytes to spare, overlapping tensors, holes, or a header
        that does
            not make sense. The message names the file, the tensor, what was found and what was expected.
        OSError: the file cannot be read.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> path = tempfile.mkdtemp() + "/a.safetensors"
        >>> safetensors.torch.save_file({"x": torch.arange(3)}, path)
        >>> with SafetensorsFile(path) as file:
        ...     file.read("x").tolist()
        [0, 1, 2]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self.path.open("rb", buffering=0)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.tensors = _read_header(self.path, self._file, self.size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def __iter__(self) -> Iterator[TensorInfo]:
        """Tensors in the order of their bytes."""
        return iter(self.tensors.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, copied into memory of its own (no file mapping). Costs one pass over its bytes.

        Args:
            name: of the tensor.
            dtype: what to convert to while reading, piece by piece, so that both dtypes are never whole in
            memory;
                None leaves the tensor as it is stored.
        """
        info = self.tensors.get(name)
        if info is None:
            message = f"{self.path}: no tensor {name!r}; the file has {len(self.tensors)} others"
            raise PackedDataError(message)
        tensor = torch.empty(info.shape, dtype=dtype or info.torch_dtype)
        flat = tensor.reshape(-1)
        if tensor.dtype == info.torch_dtype:
            self._fill(info, flat, 0)
            return tensor
        for start in range(0, flat.numel(), _PIECE):
            piece = torch.empty(min(_PIECE, flat.numel() - start), dtype=info.torch_dtype)
            self._fill(info, piece, start * info.torch_dtype.itemsize)
            flat[start : start + piece.numel()] = piece
        return tensor

    def _fill(self, info: TensorInfo, target: torch.Tensor, offset: int) -> None:
        """Read bytes of a tensor, from `offset` within it, into all of `target` (1-D, contiguous)."""
        view = target.view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            # Reads are cut into pieces because one call moves at most 2 GiB.
            position = info.start + offset + done
            count = os.preadv(self._file.fileno(), [view[done : done + (1 << 30)]], position)
            if count == 0:
                ended = f"the file ended after {offset + done} of {info.nbytes} bytes"
                message = f"{self.path}: tensor {info.name!r}: {ended}"
                raise PackedDataError(message)
            done += count


def _read_header(path: Path, file: Any, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    def refuse(what: str) -> NoReturn:
        message = f"{path}: {what}. The file is truncated, damaged or not a safetensors file; fetch it again"
        raise PackedDataError(message)

    if size < 8:
        refuse(f"{size} bytes long, expected at least the 8 bytes of the header length")
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if length > _MAX_HEADER_BYTES:
        refuse(f"header length says {length} bytes, expected at most {_MAX_HEADER_BYTES}")
    if length > size - 8:
        refuse(f"header length says {length} bytes, but only {size - 8} follow it")
    raw = os.pread(file.fileno(), length, 8)
    if not raw.startswith(b"{"):
        refuse(f"header starts with {raw[:1]!r}, expected b'{{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        refuse(f"tensor {error.args[0]!r} is described twice in the header")
    except (ValueError, RecursionError) as error:
        refuse(f"header is not valid JSON ({error})")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse("__metadata__ must map strings to strings")
    begin = 8 + length
    infos = [_check_entry(name, entry, begin, path, refuse) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    end = begin
    for info in infos:
        if info.start != end:
            fault = "overlaps the one before it" if info.start < end else "leaves a hole before it"
            refuse(
                f"tensor {info.name!r} starts at data byte {info.start - begin}, expected {end - begin}: "
                f"{fault}"
            )
        end += info.nbytes
        if end > size:
            refuse(
                f"tensor {info.name!r} ends at data byte {end - begin}, but the file has {size - begin} "
                "data bytes"
            )
    if end != size:
        refuse(f"{size - end} bytes follow the last tensor, expected none")
    return metadata, {info.name: info for info in infos}


def _check_entry(name: str, entry: Any, begin: int, path: Path, refuse: Any) -> TensorInfo:
    """Check one header entry by itself; whether entries fit together is the caller's to check."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(f"tensor {name!r} is described by {str(entry)[:80]}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(length) for length in shape):
        refuse(f"tensor {name!r} has shape {str(shape)[:80]}, expected a list of integers >= 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        refuse(f"tensor {name!r} has data_offsets {str(offsets)[:80]}, expected two integers >= 0")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        refuse(
            f"tensor {name!r} has data_offsets {offsets} ({offsets[1] - offsets[0]} bytes), "
            f"expected {expected} bytes for {dtype} {shape}"
        )
    return TensorInfo(name, dtype, tuple(shape), begin + offsets[0], expected, path)


class _DuplicateKeyError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
