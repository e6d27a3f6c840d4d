"""A packed matrix taken apart into codes, scales and zero points, and put together again.

For methods that work on codes in torch. Integer grids and fixed codebooks; `docs/format.md` is the source.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitfold import ops
from bitfold.errors import FormatError
from bitfold.formats import Format


@dataclass
class Grid:
    """`value = (unit(code) - zero) * scale`, unit the code itself or its level in a codebook.

    Args:
        codes: uint8 `[out, in]`.
        scale: float32 `[S, G]`, as stored; S is out, or 1 where one scale serves the tensor.
        zero: float32 `[S, G]`; zeros for codebooks.
        group_size: columns that share a scale.
        levels: float32 `[2^bits]` of a fixed codebook, or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group_size: int
    levels: Tensor | None

    @classmethod
    def unpack(cls, packed: list[Tensor], fmt: Format, shape: tuple[int, int]) -> Grid:
        """Take apart the tensors of `fmt.buffers(shape)`; FormatError for learned codebooks."""
        parts = _parts(packed, fmt, shape)
        codes = ops.unpack_bits(parts[""], fmt.bits, *shape)
        scale = _read_scales(parts)
        groups = scale.shape[1]
        if fmt.zero == "int":
            zero = ops.unpack_bits(parts["_zero"], fmt.bits, scale.shape[0], groups).float()
        elif fmt.zero == "float":
            zero = parts["_zero"].view(torch.float16).float()
        else:
            middle = 2.0 ** (fmt.bits - 1) - (0.5 if fmt.zero == "midrise" else 0.0)
            zero = torch.full_like(scale, 0.0 if fmt.levels is not None else middle)
        levels = None if fmt.levels is None else torch.tensor(fmt.levels)
        return cls(codes, scale, zero, fmt.group_size or shape[1], levels)

    def pack(self, packed: list[Tensor], fmt: Format) -> list[Tensor]:
        """The tensors with these codes and scales; zero points are taken from `packed`, and scales too where
        they are double quantized (each would move with its neighbours).
        """
        parts = _parts(packed, fmt, (self.codes.shape[0], self.codes.shape[1]))
        parts[""] = ops.pack_bits(self.codes, fmt.bits)
        if not fmt.double_quant:
            stored = parts["_scale"]
            if stored.dtype == torch.int32:
                parts["_scale"] = self.scale.contiguous().view(torch.int32)
            else:
                halves = (self.scale / _factor(parts)).clamp(max=65504.0).half()
                parts["_scale"] = halves.contiguous().view(torch.int16)
        return list(parts.values())

    def spread(self, of_groups: Tensor) -> Tensor:
        """Values `[S, G]` of groups as values `[out or 1, in]` of weights; differentiable."""
        columns = self.codes.shape[1]
        return of_groups.repeat_interleave(self.group_size, dim=1)[:, :columns]


def _parts(packed: list[Tensor], fmt: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    suffixes = [suffix for suffix, _, _ in fmt.buffers(shape)]
    if "_codebook" in suffixes:
        msg = f"{fmt} has a learned codebook; only integer grids and fixed codebooks come apart"
        raise FormatError(msg)
    return dict(zip(suffixes, packed, strict=True))


def _factor(parts: dict[str, Tensor]) -> float:
    return 2.0 ** int(parts["_exponent"]) if "_exponent" in parts else 1.0


def _read_scales(parts: dict[str, Tensor]) -> Tensor:
    stored = parts["_scale"]
    if stored.dtype == torch.int8:
        return ops.double_dequantize(stored, parts["_scale_absmax"], parts["_scale_offset"])
    if stored.dtype == torch.int32:
        return stored.view(torch.float32).clone()
    return stored.view(torch.float16).float() * _factor(parts)
