"""QuantLinear: nn.Linear with its weight packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitfold.formats import Format
from bitfold.nn._base import (
    PackedModule,
    bias_of,
    carry_over,
    check_finite,
    check_float_weight,
    linear,
    linear_mixed,
)
from bitfold.nn.accuracy import Multiplies
from bitfold.nn.mixed import MixesProducts

if TYPE_CHECKING:
    from bitfold.methods import Solution


class QuantLinear(Multiplies, MixesProducts, PackedModule, nn.Linear):
    """`y = x @ W.T + bias` where W `[out_features, in_features]` stays packed in RAM and on disk.

    It is an `nn.Linear` to isinstance checks (PEFT's `all-linear` finds it), but `weight` is the flat int8
    tensor of codes, a buffer. The bias stays a float parameter.

    Args:
        in_features, out_features: sizes, at least 1.
        bias: whether there is a bias `[out_features]`.
        format: a `Format` or its string, such as `"nf4"`.
        device: where the packed buffers are made, a matrix of zeros until a state is loaded; `"meta"`
            works. `from_float` folds an existing layer.
        dtype: float type that the model runs in (bias, and what reports name); default torch's default.
        original_dtype: float type the weight had before folding, for reports; default `dtype`.
        accuracy: how exactly products are computed: `"auto"`, `"fp32"` or `"int8"`, see
            `bitfold.ops.linear`. An attribute of that name can be set later; it is never stored.

    Example:
        >>> import torch
        >>> layer = QuantLinear.from_float(torch.nn.Linear(128, 64), "int8-row")
        >>> layer(torch.randn(3, 128)).shape
        torch.Size([3, 64])
    """

    kind = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: Format | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        original_dtype: torch.dtype | None = None,
        accuracy: str | int = "auto",
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the float weight
        self.in_features = in_features
        self.out_features = out_features
        self.accuracy = accuracy
        self._set_up((out_features, in_features), format, device, dtype, original_dtype)
        if bias:
            zeros = torch.zeros(out_features, dtype=self.dtype, device=device)
            self.bias = nn.Parameter(zeros)
        else:
            self.register_parameter("bias", None)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether `module` is an `nn.Linear`."""
        return isinstance(module, nn.Linear)

    @classmethod
    def from_float(
        cls,
        module: nn.Linear,
        fmt: Format | str,
        method: str | None = None,
        *,
        solution: Solution | None = None,
    ) -> QuantLinear:
        """Fold an `nn.Linear`; its bias parameter is taken over as it is, `module` is left unchanged.

        With a `solution` nothing is computed: its packed tensors are taken, and its `bias_shift` is added
        to a copy of the bias, where there is one.

        Raises TypeError for another kind of module, WeightError for a weight that is not a finite float
        matrix, FormatError for a bad format.
        """
        cls._check_source(module)
        weight = cls._matrix(module)
        check_float_weight(weight, f"{type(module).__name__}.weight")
        check_finite(weight, f"{type(module).__name__}.weight")
        new = cls._unfilled(weight, fmt, "meta", weight.dtype)
        shift = new._fill(weight, method, solution).bias_shift
        new.bias = module.bias
        if shift is not None and module.bias is not None:
            shifted = module.bias.detach() + shift.to(module.bias)
            new.bias = nn.Parameter(shifted, requires_grad=module.bias.requires_grad)
        carry_over(module, new)
        return new

    @classmethod
    def empty_like(
        cls, module: nn.Linear, fmt: Format | str, original_dtype: torch.dtype | None = None
    ) -> QuantLinear:
        """An unfilled twin of a float module (also on meta), with the bias parameter taken over."""
        weight = cls._matrix(module)
        new = cls._unfilled(weight, fmt, weight.device, original_dtype)
        new.bias = module.bias
        carry_over(module, new)
        return new

    @classmethod
    def _unfilled(
        cls,
        weight: Tensor,
        fmt: Format | str,
        device: torch.device | str,
        original_dtype: torch.dtype | None,
    ) -> QuantLinear:
        out_features, in_features = weight.shape
        return cls(
            in_features,
            out_features,
            False,
            format=fmt,
            device=device,
            dtype=weight.dtype,
            original_dtype=original_dtype,
        )

    @staticmethod
    def _matrix(module: nn.Module) -> Tensor:
        """The float weight of `module` as `[out, in]`."""
        return module.weight  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Do nothing: packed bytes have no random initial state."""

    def forward(self, x: Tensor) -> Tensor:
        """Take x `[..., in_features]` in any float dtype -> `[..., out_features]` in the same dtype."""
        if self._mixed is not None:
            return linear_mixed(x, self.packed(), self._spec, bias_of(self), *self._mixed)
        return linear(x, self.operands(), self._spec, bias_of(self), self._accuracy)

    def manifest_entry(self) -> dict[str, Any]:
        """JSON for `bitfold.manifest`."""
        return super().manifest_entry() | {"bias": self.bias is not None}

    def extra_repr(self) -> str:
        """Sizes, format, bytes and ratio."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._size_repr()}{self._accuracy_repr()}{self._mixed_repr()}"
        )
