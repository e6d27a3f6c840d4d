"""Lying safetensors files are refused in words, never with a crash or a huge allocation.

`HOSTILE_FILES` maps a name to the bytes of a file and a regular expression that the error must match.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from bitfold.errors import PackedDataError
from bitfold.io.safetensors_file import SafetensorsFile


def entry(dtype: str, shape: list[Any], begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file from a header (an object, or raw bytes) and data; `length` overrides the stated header
    length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("I8", [4], 16, 20)}
GOOD_DATA = bytes(20)


def one(name: str, **changes: Any) -> bytes:
    header = {key: dict(value) for key, value in GOOD.items()}
    header[name].update(changes)
    return pack(header, GOOD_DATA)


HOSTILE_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes long"),
    "seven bytes": (b"\0" * 7, "7 bytes long"),
    "header length beyond the file": (pack(GOOD, GOOD_DATA, length=10_000), "header length says 10000"),
    "header length beyond any sense": (
        pack(GOOD, GOOD_DATA, length=2**63 + 5),
        "header length says 9223372036854775813",
    ),
    "header length too short": (pack(GOOD, GOOD_DATA, length=20), "not valid JSON"),
    "zero header": (pack(b"", b""), "header starts with b''"),
    "not a header": (b"PK\x03\x04" + bytes(100), "header length says|header starts"),
    "header is a list": (pack(b"[1, 2]", b""), r"header starts with b'\['"),
    "header is not text": (pack(b'{"\xff\xfe": 1}', b""), "not valid JSON"),
    "header nested to death": (
        pack(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b""),
        "not valid JSON|described by",
    ),
    "metadata is not strings": (pack({"__metadata__": {"format": 3}}, b""), "__metadata__ must map strings"),
    "tensor twice in one header": (
        pack(
            b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "tensor 'a' is described twice",
    ),
    "entry is a number": (pack({"a": 5}, b""), "tensor 'a' is described by 5"),
    "entry lacks offsets": (pack({"a": {"dtype": "I8", "shape": [1]}}, b"1"), "tensor 'a' is described by"),
    "unknown dtype": (one("a", dtype="F31"), "tensor 'a' has dtype 'F31', expected one of"),
    "dtype is a list": (one("a", dtype=["F32"]), r"tensor 'a' has dtype \['F32'\]"),
    "wrong dtype": (one("a", dtype="F16"), "tensor 'a' has data_offsets .*expected 8 bytes for F16"),
    "wrong shape": (one("a", shape=[2, 3]), "tensor 'a' has data_offsets .*expected 24 bytes"),
    "negative shape": (one("a", shape=[-2, -2]), "tensor 'a' has shape .*integers >= 0"),
    "fractional shape": (one("a", shape=[2.0, 2]), "tensor 'a' has shape"),
    "shape product overflows": (one("a", shape=[2**40, 2**40]), "tensor 'a' has data_offsets .*expected"),
    "boolean shape": (one("a", shape=[True, 4]), "tensor 'a' has shape"),
    "offsets backwards": (one("a", data_offsets=[16, 0]), "tensor 'a' has data_offsets"),
    "negative offsets": (one("a", data_offsets=[-16, 0]), "tensor 'a' has data_offsets"),
    "offsets beyond the end": (one("b", data_offsets=[2**50, 2**50 + 4]), "tensor 'b' starts at .*hole"),
    "overlap": (one("b", data_offsets=[12, 16]), "tensor 'b' starts at data byte 12, expected 16: overlaps"),
    "hole": (
        pack({"a": GOOD["a"], "b": entry("I8", [4], 18, 22)}, bytes(22)),
        "tensor 'b' starts at data byte 18, expected 16: leaves a hole",
    ),
    "truncated": (pack(GOOD, GOOD_DATA[:-1]), "tensor 'b' ends at data byte 20, but the file has 19"),
    "bytes after the end": (pack(GOOD, GOOD_DATA + b"tail"), "4 bytes follow the last tensor"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    content, words = HOSTILE_FILES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(PackedDataError, match=words) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_model_of_them_all_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(GOOD, GOOD_DATA))
    with SafetensorsFile(path) as file:
        assert file.read("a").equal(torch.zeros(2, 2))


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(GOOD, GOOD_DATA))
    with SafetensorsFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(len(pack(GOOD, GOOD_DATA)) - 2)
        with pytest.raises(PackedDataError, match="tensor 'b': the file ended after 2 of 4 bytes"):
            file.read("b")


@pytest.mark.parametrize("seed", range(300))
def test_random_damage_is_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    content = bytearray(pack(GOOD, GOOD_DATA))
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as file:
            for info in file:
                assert tuple(file.read(info.name).shape) == info.shape
    except PackedDataError:
        pass
