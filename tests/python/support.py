"""Lists that several test files share."""

from __future__ import annotations

from bitfold import Format
from bitfold.errors import FormatError
from bitfold.formats import codes


def _every_format() -> list[str]:
    found: dict[str, None] = {}
    for code in codes():
        for grouping in ("", "-g16", "-g48", "-g64", "-g128", "-row", "-tensor"):
            for zero in ("", "-sym", "-zp", "-fz", "-midrise"):
                for scales in ("", "-dq", "-nodq"):
                    for outliers in ("",) if grouping else ("", "-outliers", "-outliers37"):
                        try:
                            found[str(Format(code + grouping + zero + scales + outliers))] = None
                        except FormatError:
                            continue
    return list(found)


# Every combination that the grammar accepts, for a few group sizes, in canonical spelling.
EVERY_FORMAT = _every_format()

# One of each family, zero point and scale encoding.
SOME_FORMATS = [
    "nf4",
    "nf4-nodq",
    "nf3",
    "nf2",
    "fp4",
    "log4",
    "nf4-tensor",
    "int8-row",
    "int8-g64",
    "int8-tensor-zp",
    "int4-g64",
    "int4-g64-sym",
    "int4-g64-fz",
    "int4-g64-dq",
    "int4-row",
    "int3-g64",
    "int3-g16-sym",
    "int2-g64",
    "int2-g64-zp",
    "int2-g64-fz-dq",
    "kmeans4-row",
    "kmeans3-tensor",
    "kmeans2-row",
    "nf4-outliers",
    "int3-g64-outliers50",
]
