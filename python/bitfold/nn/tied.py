"""Modules without a matrix of their own: they compute with the packed buffers of another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.errors import PackedDataError
from bitfold.nn._base import PackedModule, bias_of, carry_over, embedding, linear, linear_mixed
from bitfold.nn.accuracy import Multiplies
from bitfold.nn.embedding import apply_scale, scale_or_stored
from bitfold.nn.mixed import MixesProducts


class _Tied(nn.Module):
    """Holds a reference to the owner of the packed matrix, outside of the module tree.

    A registered child would appear twice in `state_dict`; a shared buffer would part at the first `.to()`.
    deepcopy and pickle follow the reference, and meet the same object as the tree does.
    """

    kind = ""
    _is_hf_initialized = True
    _source: PackedModule

    def _refer_to(self, source: nn.Module) -> None:
        if not isinstance(source, PackedModule):
            msg = f"{type(self).__name__}: expected a packed module, got {type(source).__name__}"
            raise PackedDataError(msg)
        object.__setattr__(self, "_source", source)

    @property
    def source(self) -> PackedModule:
        """The packed module whose matrix this one uses."""
        return self._source

    @property
    def format(self) -> Any:
        """Format of the shared matrix."""
        return self.source.format

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)` of the shared matrix."""
        return self.source.shape

    @property
    def layout(self) -> str:
        """How the codes of the shared matrix lie; see `QuantLinear.layout`."""
        return self.source.layout

    @layout.setter
    def layout(self, layout: str) -> None:
        self.source.layout = layout

    @property
    def weight(self) -> Tensor:
        """The shared int8 codes as `[out, bytes per row]`.

        For code that reads `.dtype`, `.device` or `.shape[0]`: transformers' `tie_weights` pads the bias of a
        head to `weight.shape[0]`.
        """
        return self.source.packed()[0].view(self.shape[0], -1)  # every row starts on a byte

    @weight.setter
    def weight(self, value: Any) -> None:
        # transformers' `tie_weights` assigns the matrix that is shared already
        source = self.source.weight
        if (
            not isinstance(value, Tensor)
            or value.device != source.device
            or value.data_ptr() != source.data_ptr()
        ):
            msg = (
                f"{type(self).__name__}: shares the packed matrix of another module; its weight cannot be set"
            )
            raise PackedDataError(msg)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The shared matrix as floats, `[out, in]`."""
        return self.source.dequantize(dtype)


def _check_shape(module: nn.Linear | nn.Embedding, source: PackedModule) -> None:
    if tuple(module.weight.shape) != source.shape:
        msg = (
            f"{type(module).__name__}: weight is {list(module.weight.shape)}, "
            f"the packed matrix to share is {list(source.shape)}"
        )
        raise PackedDataError(msg)


class TiedHead(Multiplies, MixesProducts, _Tied):
    """A linear layer that shares the packed matrix of an embedding: `y = x @ E.T + bias`.

    Args:
        source: the packed module (QuantEmbedding or QuantLinear) that owns the matrix `[out, in]`.
        bias: own bias parameter `[out]`, or None.
        bias_owner: `(module, name)` where the bias is a parameter of another module, as in BERT's
            masked-LM head; it is read there at each call, because loaders replace parameters.
    """

    kind = "tied_head"
    bias: nn.Parameter | None
    _bias_owner: tuple[nn.Module, str] | None

    def __init__(
        self,
        source: nn.Module,
        bias: nn.Parameter | None = None,
        bias_owner: tuple[nn.Module, str] | None = None,
    ) -> None:
        super().__init__()
        self._refer_to(source)
        self.register_parameter("bias", bias if bias_owner is None else None)
        object.__setattr__(self, "_bias_owner", bias_owner)
        self.out_features, self.in_features = self.shape

    @classmethod
    def from_float(
        cls, module: nn.Linear, source: PackedModule, bias_owner: tuple[nn.Module, str] | None = None
    ) -> TiedHead:
        """Take the place of the float head `module`, whose weight is the matrix of `source`."""
        _check_shape(module, source)
        new = cls(source, module.bias, bias_owner)
        carry_over(module, new)
        return new

    def forward(self, x: Tensor) -> Tensor:
        """Take x `[..., in]` in any float dtype -> `[..., out]` in the same dtype."""
        bias = bias_of(self)
        if bias is None and self._bias_owner is not None:
            owner, name = self._bias_owner
            bias = getattr(owner, name)
        source = self._source
        if self._mixed is not None:
            return linear_mixed(x, source.packed(), source._spec, bias, *self._mixed)
        return linear(x, source.operands(), source._spec, bias, self._accuracy)

    def manifest_entry(self, names: Mapping[nn.Module, str]) -> dict[str, Any]:
        """JSON for `bitfold.manifest`; `names` gives the modules' names in the model."""
        bias: bool | str = self.bias is not None
        if self._bias_owner is not None:
            owner, attribute = self._bias_owner
            bias = f"{names[owner]}.{attribute}".removeprefix(".")
        return {"kind": self.kind, "tied_to": names[self.source], "bias": bias}

    def extra_repr(self) -> str:
        """Sizes, format, bytes and ratio."""
        has_bias = self.bias is not None or self._bias_owner is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, "
            f"format={self.format}, no bytes of its own (shares the matrix of a {type(self.source).__name__})"
            f"{self.source._layout_repr()}{self._accuracy_repr()}{self._mixed_repr()}"
        )


class TiedEmbedding(_Tied):
    """A look-up in the packed table of another module, as T5's encoder and decoder share theirs."""

    kind = "tied_embedding"

    def __init__(
        self,
        source: nn.Module,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
        round_scale: bool = False,
    ) -> None:
        super().__init__()
        self._refer_to(source)
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = padding_idx
        self.dtype = dtype or self._source.dtype
        self.scale = float(scale)
        self.round_scale = bool(round_scale)

    @classmethod
    def from_float(
        cls, module: nn.Embedding, source: PackedModule, stored_scale: tuple[float, bool] | None = None
    ) -> TiedEmbedding:
        """Take the place of the float embedding `module`, whose table is the matrix of `source`."""
        _check_shape(module, source)
        scale, round_scale = scale_or_stored(module, stored_scale)
        new = cls(source, module.padding_idx, dtype=module.weight.dtype, scale=scale, round_scale=round_scale)
        carry_over(module, new)
        return new

    def manifest_entry(self, names: Mapping[nn.Module, str]) -> dict[str, Any]:
        """JSON for `bitfold.manifest`; `names` gives the modules' names in the model."""
        entry: dict[str, Any] = {"kind": self.kind, "tied_to": names[self.source]}
        if self.scale != 1.0:
            entry |= {"scale": self.scale, "round_scale": self.round_scale}
        return entry

    def forward(self, input: Tensor) -> Tensor:
        """Take integer indices `[...]` -> `[..., embedding_dim]` in `self.dtype`."""
        source = self._source
        rows = embedding(input, source.operands(), source._spec, self.dtype)
        return apply_scale(rows, self.scale, self.round_scale)

    def _apply(self, fn: Any, recurse: bool = True) -> TiedEmbedding:
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.source._codes().device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def extra_repr(self) -> str:
        """Sizes, format, bytes and ratio."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.format}, "
            f"no bytes of its own (shares the table of a {type(self.source).__name__})"
        )
