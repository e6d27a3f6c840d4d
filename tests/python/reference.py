"""docs/format.md read by a second implementation: numpy alone, nothing of bitfold.

`dequantize` computes in float32 one rounding per operation (then it must equal bitfold bit for bit) or in
float64 (the oracle of error bounds).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

CODES = {  # code: (bits, family, grouping, zero, dq)
    **dict.fromkeys(("nf4", "fp4", "log4"), (4, "fixed", "g64", "", True)),
    "nf3": (3, "fixed", "g64", "", True),
    "nf2": (2, "fixed", "g64", "", True),
    "int8": (8, "integer", "row", "sym", False),
    "int4": (4, "integer", "g64", "zp", False),
    "int3": (3, "integer", "g64", "zp", False),
    "int2": (2, "integer", "g64", "midrise", False),
    **{f"kmeans{b}": (b, "learned", "row", "", False) for b in (4, 3, 2)},
}
LEVELS = {
    "nf4": "-1 -0.6961928 -0.52507305 -0.3949175 -0.28444138 -0.18477343 -0.091050036 0 "
    "0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1",
    "nf3": "-1 -0.47862917 -0.21714182 0 0.16093017 0.33791518 0.56261694 1",
    "nf2": "-1 0 0.33791518 1",
    "fp4": "0 0.0052083335 0.6666667 1 0.33333334 0.5 0.16666667 0.25 "
    "0 -0.0052083335 -0.6666667 -1 -0.33333334 -0.5 -0.16666667 -0.25",
    "log4": "-1 -0.70710677 -0.5 -0.35355338 -0.25 -0.1767767 -0.125 0 "
    "0.08838835 0.125 0.1767767 0.25 0.35355338 0.5 0.70710677 1",
}
BLOCK = 256


@dataclass
class Parsed:
    code: str
    bits: int
    family: str
    grouping: str
    zero: str
    dq: bool
    outliers: int

    def groups(self, cols: int) -> int:
        return -(-cols // int(self.grouping[1:])) if self.grouping.startswith("g") else 1

    def group_size(self, cols: int) -> int:
        return int(self.grouping[1:]) if self.grouping.startswith("g") else cols

    def scale_rows(self, rows: int) -> int:
        return 1 if self.grouping == "tensor" else rows

    def outlier_count(self, rows: int, cols: int) -> int:
        return -(-rows * cols * self.outliers // 1000)


def parse(text: str) -> Parsed:
    code, *options = text.split("-")
    bits, family, grouping, zero, dq = CODES[code]
    dq_given, outliers = False, 0
    for option in options:
        if re.fullmatch(r"g[1-9]\d*|row|tensor", option):
            grouping = option
        elif option in ("sym", "zp", "fz", "midrise"):
            zero = option
        elif option in ("dq", "nodq"):
            dq, dq_given = option == "dq", True
        elif match := re.fullmatch(r"outliers([1-9]\d*)?", option):
            outliers = int(match[1] or 10)
        else:
            raise ValueError(option)
    if grouping == "tensor" and not dq_given:
        dq = False
    return Parsed(code, bits, family, grouping, zero, dq, outliers)


def dense(fmt: str) -> str:
    """The format without its outliers."""
    return re.sub(r"-outliers\d*", "", fmt)


def row_bytes(n: int, bits: int) -> int:
    return {8: n, 4: -(-n // 2), 2: -(-n // 4), 3: -(-n // 4) + -(-n // 8)}[bits]


def _plane(rows: np.ndarray, n: int, bits: int) -> np.ndarray:
    """uint8 [r, bytes] -> the first n codes of `bits` bits of each row, high bits first."""
    single = np.unpackbits(rows, axis=1).reshape(len(rows), -1, bits)[:, :n]
    return (single << np.arange(bits - 1, -1, -1, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)


def unpack(data: np.ndarray, bits: int, rows: int, cols: int) -> np.ndarray:
    """Flat bytes to codes, uint8 [rows, cols]."""
    table = np.asarray(data).view(np.uint8).reshape(rows, row_bytes(cols, bits))
    if bits == 3:
        low = -(-cols // 4)
        return _plane(table[:, :low], cols, 2) | _plane(table[:, low:], cols, 1) << 2
    return _plane(table, cols, bits)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes, uint8 [rows, cols], to flat bytes (uint8)."""
    if bits == 3:
        planes = [pack(codes & 3, 2), pack(codes >> 2, 1)]
        rows = len(codes)
        return np.concatenate([p.reshape(rows, p.size // max(rows, 1)) for p in planes], axis=1).reshape(-1)
    single = codes[:, :, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1
    return np.packbits(single.reshape(len(codes), codes.shape[1] * bits), axis=1).reshape(-1)


def dynamic_map() -> np.ndarray:
    """Section 8.3: float32 [256], ascending."""
    f = np.float32
    entries = [f(0), f(1)]
    for e in range(7):
        n = 2**e + 1
        step = f(f(1) - f(0.1)) / f(n - 1)
        points = [
            f(float(f(0.1)) + float(step) * k) if k < n // 2 else f(1 - float(step) * (n - 1 - k))
            for k in range(n)
        ]
        for a, b in pairwise(points):
            entry = f(10.0 ** (e - 6)) * (f(a + b) / f(2))
            entries += [entry, -entry]
    return np.sort(np.array(entries, dtype=f))


def buffers(fmt: str, shape: tuple[int, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Section 3: (suffix, dtype, shape) in order."""
    f, (rows, cols) = parse(fmt), shape
    if f.outliers:
        count = f.outlier_count(rows, cols)
        column = "int16" if cols <= 65536 else "int32"
        return [
            *buffers(dense(fmt), shape),
            ("_outlier_value", "int16", (count,)),
            ("_outlier_column", column, (count,)),
            ("_outlier_row", "int32", (rows + 1,)),
            ("_outlier_exponent", "int8", (1,)),
        ]
    f, (rows, cols) = parse(fmt), shape
    s, g = f.scale_rows(rows), f.groups(cols)
    table: list[tuple[str, str, tuple[int, ...]]] = [("", "int8", (rows * row_bytes(cols, f.bits),))]
    if f.family == "learned":
        return [*table, ("_codebook", "int16", (s, 2**f.bits)), ("_exponent", "int8", (1,))]
    if f.dq:
        table += [("_scale", "int8", (s, g)), ("_scale_absmax", "int32", (-(-s * g // BLOCK),))]
        table += [("_scale_offset", "int32", (1,))]
    elif f.family == "integer":
        table += [("_scale", "int16", (s, g)), ("_exponent", "int8", (1,))]
    else:
        table += [("_scale", "int32", (s, g))]
    if f.zero == "zp":
        table += [("_zero", "int8", (s * row_bytes(g, f.bits),))]
    elif f.zero == "fz":
        table += [("_zero", "int16", (s, g))]
    return table


def sparse(packed: list, fmt: str, shape: tuple[int, int], precision: type = np.float64) -> np.ndarray:
    """Section 10: the outliers alone as a matrix [out, in]; `packed` as for `dequantize`."""
    matrix = np.zeros(shape, dtype=precision)
    if parse(fmt).outliers:
        values, columns, starts, exponent = (np.asarray(tensor) for tensor in packed[-4:])
        columns = columns.view(np.uint16 if columns.dtype == np.int16 else np.int32)
        rows = np.repeat(np.arange(shape[0]), np.diff(starts))
        matrix[rows, columns] = values.view(np.float16).astype(precision) * precision(2.0) ** int(exponent[0])
    return matrix


def dequantize(packed: list, fmt: str, shape: tuple[int, int], precision: type = np.float64) -> np.ndarray:
    """The weight [out, in] behind `packed` (anything numpy can read, in the order of `buffers`)."""
    f, (rows, cols) = parse(fmt), shape
    if f.outliers:
        checked = [(np.asarray(t).dtype, np.asarray(t).shape) for t in packed[-4:]]
        assert checked == [(dtype, size) for _, dtype, size in buffers(fmt, shape)[-4:]]
        codes = dequantize(packed[:-4], dense(fmt), shape, precision)
        return codes + sparse(packed, fmt, shape, precision)
    stored = {}
    for (suffix, dtype, size), tensor in zip(buffers(fmt, shape), packed, strict=True):
        array = np.asarray(tensor)
        assert array.dtype == dtype, (suffix, array.dtype)
        assert array.shape == size, (suffix, array.shape)
        stored[suffix] = array
    codes = unpack(stored[""], f.bits, rows, cols)
    s, groups = f.scale_rows(rows), f.groups(cols)
    factor = precision(2.0) ** int(stored["_exponent"][0]) if "_exponent" in stored else precision(1)
    row = np.zeros(rows, dtype=int) if s == 1 and f.grouping == "tensor" else np.arange(rows)
    if f.family == "learned":
        levels = stored["_codebook"].view(np.float16).astype(precision) * factor
        return levels[row[:, None], codes]
    if f.dq:
        level = dynamic_map().astype(precision)[stored["_scale"].view(np.uint8)].reshape(-1)
        block = stored["_scale_absmax"].view(np.float32).astype(precision)[np.arange(level.size) // BLOCK]
        scale = (level * block + precision(stored["_scale_offset"].view(np.float32)[0])).reshape(s, groups)
    elif f.family == "integer":
        scale = stored["_scale"].view(np.float16).astype(precision) * factor
    else:
        scale = stored["_scale"].view(np.float32).astype(precision)
    group = np.arange(cols) // f.group_size(cols)
    scale = scale[row][:, group]
    if f.family == "fixed":
        return np.array(LEVELS[f.code].split(), dtype=np.float32).astype(precision)[codes] * scale
    if f.zero == "zp":
        zero = unpack(stored["_zero"], f.bits, s, groups).astype(precision)
    elif f.zero == "fz":
        zero = stored["_zero"].view(np.float16).astype(precision)
    else:
        zero = np.full((s, groups), 2 ** (f.bits - 1) - (0.5 if f.zero == "midrise" else 0), dtype=precision)
    return (codes.astype(precision) - zero[row][:, group]) * scale
