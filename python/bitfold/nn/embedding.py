"""QuantEmbedding: nn.Embedding with its table packed; only the rows looked up are ever decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitfold.errors import WeightError
from bitfold.formats import Format
from bitfold.nn._base import PackedModule, carry_over, check_finite, check_float_weight, embedding

if TYPE_CHECKING:
    from bitfold.methods import Solution


class QuantEmbedding(PackedModule, nn.Embedding):
    """Look-up in a packed table `[num_embeddings, embedding_dim]`.

    The output has the float type that the model runs in: `dtype` at construction, then whatever `.half()`,
    `.to(torch.bfloat16)` and the like make of it. `padding_idx` is kept (it only ever concerned gradients).

    Args:
        num_embeddings, embedding_dim: sizes, at least 1.
        padding_idx: kept as an attribute.
        format, device, dtype, original_dtype: as for QuantLinear.
        scale: factor on the output, for the scaled word embeddings of Gemma, BART and others.
        round_scale: round `scale` to the output dtype first, as Gemma does.
    """

    kind = "embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: Format | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        original_dtype: torch.dtype | None = None,
        scale: float = 1.0,
        round_scale: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would make the float weight
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self.max_norm = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False
        self.scale = float(scale)
        self.round_scale = bool(round_scale)
        self._set_up((num_embeddings, embedding_dim), format, device, dtype, original_dtype)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether `module` is an `nn.Embedding`."""
        return isinstance(module, nn.Embedding)

    @classmethod
    def from_float(
        cls,
        module: nn.Embedding,
        fmt: Format | str,
        method: str | None = None,
        *,
        solution: Solution | None = None,
    ) -> QuantEmbedding:
        """Fold an `nn.Embedding` (or a known scaled one), or take a `solution` made elsewhere.

        `module` is left unchanged.

        Raises WeightError for a table that is not a finite float matrix, or one with `max_norm`, which
        rewrites rows of the table at each look-up.
        """
        cls._check_source(module)
        check_float_weight(module.weight, f"{type(module).__name__}.weight")
        check_finite(module.weight, f"{type(module).__name__}.weight")
        new = cls._like(module, fmt, torch.device("meta"), None, None)
        new._fill(module.weight, method, solution)
        return new

    @classmethod
    def empty_like(
        cls,
        module: nn.Embedding,
        fmt: Format | str,
        original_dtype: torch.dtype | None = None,
        stored_scale: tuple[float, bool] | None = None,
    ) -> QuantEmbedding:
        """An unfilled twin of a float module, also on meta.

        `stored_scale` is taken where the module's own factor is not known.
        """
        return cls._like(module, fmt, module.weight.device, original_dtype, stored_scale)

    @classmethod
    def _like(
        cls,
        module: nn.Embedding,
        fmt: Format | str,
        device: torch.device,
        original_dtype: torch.dtype | None,
        stored_scale: tuple[float, bool] | None,
    ) -> QuantEmbedding:
        if module.max_norm is not None:
            msg = (
                f"{type(module).__name__}: max_norm={module.max_norm} rewrites rows at each look-up, which "
                "packed rows cannot do; leave this module in float with skip=[…]"
            )
            raise WeightError(msg)
        scale, round_scale = scale_or_stored(module, stored_scale)
        new = cls(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            format=fmt,
            device=device,
            dtype=module.weight.dtype,
            original_dtype=original_dtype or module.weight.dtype,
            scale=scale,
            round_scale=round_scale,
        )
        carry_over(module, new)
        return new

    def reset_parameters(self) -> None:
        """Do nothing: packed bytes have no random initial state."""

    def forward(self, input: Tensor) -> Tensor:
        """Take integer indices `[...]` -> `[..., embedding_dim]` in `self.dtype`."""
        rows = embedding(input, self.operands(), self._spec, self.dtype)
        return apply_scale(rows, self.scale, self.round_scale)

    def manifest_entry(self) -> dict[str, Any]:
        """JSON for `bitfold.manifest`."""
        entry = super().manifest_entry()
        if self.padding_idx is not None:
            entry["padding_idx"] = self.padding_idx
        if self.scale != 1.0:
            entry |= {"scale": self.scale, "round_scale": self.round_scale}
        return entry

    def extra_repr(self) -> str:
        """Sizes, format, bytes and ratio."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        scale = "" if self.scale == 1.0 else f", scale={self.scale:g}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}{scale}, {self._size_repr()}"


def apply_scale(rows: Tensor, scale: float, round_scale: bool) -> Tensor:
    """`rows * scale`, the factor rounded to the rows' dtype first where `round_scale` says so."""
    if scale == 1.0:
        return rows
    if round_scale:
        return rows * torch.full((), scale, dtype=rows.dtype, device=rows.device)
    return rows * scale


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether `module` is one of transformers' word embeddings that only multiply by `embed_scale`."""
    cls = type(module)
    return (
        isinstance(module, nn.Embedding)
        and cls.__name__.endswith("ScaledWordEmbedding")
        and cls.__module__.startswith("transformers.models.")
        and hasattr(module, "embed_scale")
    )


def embedding_scale(module: nn.Module) -> tuple[float, bool] | None:
    """(factor, whether it is rounded to the output dtype) of an embedding, (1.0, False) for a plain one.

    None where the factor is a tensor on the meta device.
    """
    if not is_scaled_embedding(module):
        return 1.0, False
    value: Any = module.embed_scale
    # Gemma's kind keeps the factor twice: a tensor (on meta while loading) and the Python number it came from
    scalar = getattr(module, "scalar_embed_scale", None)
    if scalar is not None:
        return float(scalar), True
    if isinstance(value, Tensor):
        return None if value.is_meta else (float(value), True)
    return (1.0 if value is None else float(value)), False


def scale_or_stored(module: nn.Module, stored: tuple[float, bool] | None) -> tuple[float, bool]:
    """The module's own factor, or `stored` where it is not known; WeightError where neither is."""
    scale = embedding_scale(module) or stored
    if scale is None:
        msg = f"{type(module).__name__}: embed_scale is on the meta device, its value is not known"
        raise WeightError(msg)
    return scale
