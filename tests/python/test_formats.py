"""Format: grammar, buffers, exact accounting; docs/format.md agrees with the code, example by example."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitfold
import reference
from bitfold import _C, Format, ops
from bitfold.errors import FormatError
from bitfold.formats import codes
from support import EVERY_FORMAT

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def test_every_format_prints_what_it_parses() -> None:
    assert len(EVERY_FORMAT) > 150
    for text in EVERY_FORMAT:
        fmt = Format(text)
        assert str(fmt) == text
        assert Format(str(fmt)) == fmt == Format.parse(text)
        assert hash(Format(str(fmt))) == hash(fmt)
        assert repr(fmt) == f"Format('{text}')"
        assert pickle.loads(pickle.dumps(fmt)) == fmt
        assert copy.deepcopy(fmt) == fmt == Format(fmt)
    assert len({Format(text) for text in EVERY_FORMAT}) == len(EVERY_FORMAT)


@pytest.mark.parametrize("text", EVERY_FORMAT)
def test_properties_and_buffers_equal_the_second_implementation(text: str) -> None:
    fmt, parsed = Format(text), reference.parse(text)
    assert (fmt.code, fmt.bits, fmt.double_quant) == (parsed.code, parsed.bits, parsed.dq)
    assert fmt.grouping == (parsed.grouping if parsed.grouping in ("row", "tensor") else "group")
    assert fmt.group_size == (int(parsed.grouping[1:]) if fmt.grouping == "group" else None)
    zeros = {"zp": "int", "fz": "float", "midrise": "midrise", "sym": "none", "": "none"}
    assert fmt.zero == zeros[parsed.zero]
    assert (fmt.outliers, str(fmt.dense)) == (parsed.outliers, reference.dense(text))
    for shape in [(1, 1), (3, 17), (5, 64), (7, 197), (300, 65), (1, 100_003)]:
        assert fmt.buffers(shape) == reference.buffers(text, shape)
        assert fmt.outlier_count(shape) == parsed.outlier_count(*shape)


@given(
    st.sampled_from(EVERY_FORMAT),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
)
def test_bits_per_weight_counts_every_byte(text: str, rows: int, cols: int) -> None:
    fmt = Format(text)
    rows = rows % 20_000 + 1 if fmt.outliers else rows  # their number must fit 32 bits
    total = sum(
        int(np.dtype(dtype).itemsize) * int(np.prod(size, dtype=object))
        for _, dtype, size in fmt.buffers((rows, cols))
    )
    assert fmt.nbytes((rows, cols)) == total
    assert fmt.bits_per_weight((rows, cols)) == 8 * total / (rows * cols)


@pytest.mark.parametrize("text", EVERY_FORMAT)
def test_bits_per_weight_of_real_buffers(text: str) -> None:
    for shape in [(1, 1), (5, 3), (2, 197), (9, 128)]:
        packed = ops.quantize(torch.randn(shape), text)
        nbytes = sum(t.numel() * t.element_size() for t in packed)
        assert Format(text).bits_per_weight(shape) == 8 * nbytes / (shape[0] * shape[1])
        for (suffix, dtype, size), tensor in zip(Format(text).buffers(shape), packed, strict=True):
            assert tensor.dtype == getattr(torch, dtype), suffix
            assert tuple(tensor.shape) == size, suffix
            assert tensor.is_contiguous()


def test_known_rates() -> None:
    rate = {
        text: Format(text).bits_per_weight((4096, 4096))
        for text in ("nf4", "nf4-nodq", "int4-g64-sym", "int2-g64", "int3-g64", "int3-g64-outliers")
    }
    assert rate["nf4"] == pytest.approx(4.127, abs=5e-4)
    assert rate["nf4-nodq"] == 4.5
    assert rate["int4-g64-sym"] == pytest.approx(4.25, abs=1e-6)
    assert rate["int2-g64"] == pytest.approx(2.25, abs=1e-6)
    # 32 bits for each of 10 per mille, and where the rows begin
    assert rate["int3-g64-outliers"] - rate["int3-g64"] == pytest.approx(0.32 + 32 / 4096, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nf5", ["'nf5'", "nf4", "kmeans2"]),
        ("", ["''", "known codes"]),
        ("int4-g65", ["65", "multiple of 16"]),
        ("int4-fast", ["'fast'", "allowed", "midrise"]),
        ("int4-g64-row", ["'row'", "second option", "grouping"]),
        ("nf4-zp", ["'zp'", "impossible", "nf4"]),
        ("kmeans4-dq", ["'dq'", "impossible"]),
        ("nf4-tensor-dq", ["'dq'", "'tensor'"]),
        ("int4-g64\n", ["g64"]),
        ("int4-outliers0", ["'outliers0'", "outliersN"]),
        ("nf4-outliers101", ["'outliers101'", "per mille", "1 to 100"]),
    ],
)
def test_bad_strings_name_the_token(text: str, words: list[str]) -> None:
    with pytest.raises(FormatError) as error:
        Format(text)
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


@given(st.text(alphabet="nfitk48g-rowdqsym \0é", max_size=20))
def test_random_text_is_parsed_or_refused(text: str) -> None:
    try:
        fmt = Format(text)
    except FormatError:
        return
    assert Format(str(fmt)) == fmt


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (-1, 3)])
def test_empty_shapes_are_refused(shape: tuple[int, int]) -> None:
    for method in (
        Format("nf4").buffers,
        Format("nf4").nbytes,
        Format("nf4").bits_per_weight,
        Format("nf4").spec,
    ):
        with pytest.raises(FormatError, match="both at least 1"):
            method(shape)


def test_shapes_that_outliers_cannot_count_are_refused() -> None:
    fmt, shape = Format("nf4-outliers"), (2**20, 2**20)
    for method in (fmt.buffers, fmt.nbytes, fmt.bits_per_weight, fmt.spec, fmt.outlier_count):
        with pytest.raises(FormatError, match="too large for nf4-outliers"):
            method(shape)
    assert fmt.dense.nbytes(shape) > 0


def test_properties_cannot_be_set() -> None:
    with pytest.raises(AttributeError):
        Format("nf4").double_quant = False  # type: ignore[misc]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_without_torch(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for cols in (1, 2, 7, 8, 9, 33):
        array = rng.integers(0, 2**bits, (3, cols), dtype=np.uint8)
        packed = _C.pack_bits(array.tobytes(), cols, bits)
        assert packed == reference.pack(array, bits).tobytes()
        assert _C.unpack_bits(packed, cols, bits) == array.tobytes()
    with pytest.raises(ValueError, match="whole rows"):
        _C.pack_bits(b"123", 2, bits)
    with pytest.raises(ValueError, match="bits 2, 3, 4 or 8"):
        _C.pack_bits(b"1234", 2, 5)


# ---- the document ----


def _examples() -> list[tuple[str, dict[str, str]]]:
    found = []
    for fmt, block in re.findall(r"^### 13\.\d+ `([^`]+)`\n.*?```\n(.*?)```", DOCUMENT, re.M | re.S):
        found.append(
            (fmt, dict(re.split(r"\s{2,}", line, maxsplit=1) for line in block.strip().splitlines()))
        )
    return found


@pytest.mark.parametrize(("fmt", "example"), _examples(), ids=[fmt for fmt, _ in _examples()])
def test_worked_bytes(fmt: str, example: dict[str, str]) -> None:
    weight = torch.tensor(ast.literal_eval(example["matrix"]), dtype=torch.float32)
    shape = tuple(weight.shape)
    packed = ops.quantize(weight, fmt, "round")
    names = [f"weight{suffix}" for suffix, _, _ in Format(fmt).buffers(shape)]
    assert names == [name for name in example if name.startswith("weight")]
    stored = []
    for (suffix, dtype, size), tensor in zip(Format(fmt).buffers(shape), packed, strict=True):
        assert tensor.numpy().tobytes().hex(" ") == example[f"weight{suffix}"], suffix
        stored.append(np.frombuffer(bytes.fromhex(example[f"weight{suffix}"]), dtype=dtype).reshape(size))
    printed = np.array(ast.literal_eval(example["read back"]), dtype=np.float32)
    assert np.array_equal(reference.dequantize(stored, fmt, shape, np.float32), printed)
    assert np.array_equal(ops.dequantize(packed, fmt, shape).numpy(), printed)


def test_the_document_has_an_example_of_every_kind_of_buffer() -> None:
    assert len(_examples()) >= 10
    shown = set().union(*(example for _, example in _examples()))
    kinds = {f"weight{suffix}" for text in EVERY_FORMAT for suffix, _, _ in Format(text).buffers((2, 2))}
    assert kinds <= shown
    assert {Format(fmt).bits for fmt, _ in _examples()} == {2, 3, 4, 8}


def _rows_of_table(header: str) -> list[list[str]]:
    lines = DOCUMENT[DOCUMENT.index(header) :].splitlines()[2:]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_level_tables_of_the_document() -> None:
    for column, code in enumerate(("nf4", "fp4", "log4", "nf3", "nf2"), start=1):
        cells = [row[column] for row in _rows_of_table("| code | `nf4` |") if row[column]]
        assert [np.float32(cell) for cell in cells] == [np.float32(level) for level in Format(code).levels]
    assert Format("int4").levels is None


def test_code_table_of_the_document() -> None:
    rows = {row[0].strip("`"): row for row in _rows_of_table("| code | bits | family |")}
    assert set(rows) == set(codes()) == set(reference.CODES)
    for code, row in rows.items():
        fmt = Format(code)
        assert int(row[1]) == fmt.bits
        options = [cell.strip("`") for cell in row[3:6] if cell != "–"]
        assert Format("-".join([code, *options])) == fmt
        assert (fmt.levels is not None) == (row[2] == "fixed levels")


def test_packing_examples_of_the_document() -> None:
    three = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 4]], dtype=torch.uint8)
    assert ops.pack_bits(three, 3).numpy().tobytes().hex(" ") == "6c 6c 00 1e 80"
    assert "`6c 6c 00` and `1e 80`" in DOCUMENT
    five = torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8)
    assert ops.pack_bits(five, 4).numpy().tobytes().hex(" ") == "12 30 10"
    assert ops.pack_bits(five, 2).numpy().tobytes().hex(" ") == "6c 40"
    assert "`12 30 10` in 4 bits and `6c 40` in 2" in DOCUMENT


def test_dynamic_map_of_the_document() -> None:
    """The 256 entries as the library holds them, seen through a scale of 1 and an offset of 0."""
    every = torch.arange(256).to(torch.uint8).view(torch.int8)
    one = torch.ones(1).view(torch.int32)
    entries = ops.double_dequantize(every, one, torch.zeros(1, dtype=torch.int32)).numpy()
    assert np.array_equal(entries, reference.dynamic_map())
    assert (entries[127], entries[255]) == (0, 1)
    exact = [0.0, 1.0]
    for e in range(7):
        points = np.linspace(0.1, 1, 2**e + 1)
        exact += [
            *(10.0 ** (e - 6) * (points[1:] + points[:-1]) / 2),
            *(-(10.0 ** (e - 6)) * (points[1:] + points[:-1]) / 2),
        ]
    exact = np.sort(np.array(exact))
    off = np.abs(entries - exact) / np.maximum(np.abs(exact), 1e-30)
    assert off.max() <= 2e-7
    assert (entries != exact.astype(np.float32)).sum() == int(
        re.search(r"last digit of (\d+) entries", DOCUMENT)[1]
    )


def test_manifest_of_the_document() -> None:
    from bitfold import manifest

    stored = json.loads(re.search(r"```json\n(.*?)```", DOCUMENT, re.S)[1])
    assert manifest.check(stored) == stored["modules"]
    assert f"format version {manifest.FORMAT_VERSION}" in DOCUMENT.splitlines()[0]
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(128, 64), "embed": torch.nn.Embedding(1000, 128)})
    bitfold.quantize(model, "nf4", embeddings="int8-g64", progress=False)
    described = manifest.describe(model)["modules"]
    assert described == {name: stored["modules"][name] for name in ("fc", "embed")}
