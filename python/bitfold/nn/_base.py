"""What the packed modules have in common: buffers by Format, dtype rules, loading, repr."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitfold import ops
from bitfold.errors import PackedDataError, WeightError
from bitfold.formats import Format, as_format
from bitfold.nn.layout import HoldsCodes
from bitfold.outliers import outlier_problem

if TYPE_CHECKING:
    from bitfold.methods import Solution

OUTLIER_INDEX = ("_outlier_row", "_outlier_column")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# The ops take 16- and 32-bit floats. float64 is served through float32, so that `.double()` models run; the
# packed values are far coarser than float32 anyway.


def linear(x: Tensor, packed: list[Tensor], spec: list[int], bias: Tensor | None, accuracy: int) -> Tensor:
    """`ops.linear` in x's dtype, float64 included."""
    if x.dtype == torch.float64:
        return ops.linear(x.float(), packed, spec, None if bias is None else bias.float(), accuracy).double()
    return ops.linear(x, packed, spec, bias, accuracy)


def linear_mixed(
    x: Tensor,
    packed: list[Tensor],
    spec: list[int],
    bias: Tensor | None,
    threshold: float,
    columns: list[int] | None,
) -> Tensor:
    """`ops.linear_mixed` in x's dtype, float64 included."""
    if x.dtype == torch.float64:
        narrow = None if bias is None else bias.float()
        return ops.linear_mixed(x.float(), packed, spec, narrow, threshold, columns).double()
    return ops.linear_mixed(x, packed, spec, bias, threshold, columns)


def bias_of(module: nn.Module) -> Tensor | None:
    """`module.bias`, past nn.Module's attribute look-up, which costs half a microsecond per call."""
    parameters = module._parameters
    if "bias" in parameters:
        return parameters["bias"]
    return module.bias  # type: ignore[return-value]  # parametrized, or flattened by a wrapper


def embedding(indices: Tensor, packed: list[Tensor], spec: list[int], dtype: torch.dtype) -> Tensor:
    """`ops.embedding` in `dtype`, float64 included."""
    if dtype == torch.float64:
        return ops.embedding(indices, packed, spec, torch.float32).double()
    return ops.embedding(indices, packed, spec, dtype)


def dtype_from_name(name: str, where: str) -> torch.dtype:
    """The torch dtype called `name` ("float32"); PackedDataError naming `where` if there is none."""
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        msg = f"{where}: unknown dtype {name!r}; expected a torch dtype such as 'float32'"
        raise PackedDataError(msg)
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `"float32"`."""
    return str(dtype).removeprefix("torch.")


def tensor_key(tensor: Tensor) -> Any:
    """Equal for two tensors exactly if they are the same values in memory (on meta: the same object)."""
    if tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def check_float_weight(weight: Any, name: str = "weight") -> None:
    """Raise WeightError unless `weight` is a non-empty real float matrix; reads no values."""
    if not isinstance(weight, Tensor):
        msg = f"{name}: expected a tensor, got {type(weight).__name__}"
        raise WeightError(msg)
    if weight.dtype not in FLOAT_DTYPES:
        allowed = ", ".join(dtype_name(d) for d in FLOAT_DTYPES)
        msg = f"{name}: dtype is {dtype_name(weight.dtype)}, expected one of {allowed}"
        raise WeightError(msg)
    if weight.ndim != 2:
        msg = f"{name}: expected 2 dimensions [out, in], got shape {tuple(weight.shape)}"
        raise WeightError(msg)
    if weight.numel() == 0:
        msg = f"{name}: shape {tuple(weight.shape)} has no elements; there is nothing to fold"
        raise WeightError(msg)


def check_finite(weight: Tensor, name: str = "weight") -> None:
    """Raise WeightError if `weight` holds NaN or Inf. One pass, no copy of the weight."""
    if weight.is_meta:
        return
    low, high = torch.aminmax(weight.detach())  # NaN propagates, Inf is an extreme: both show up here
    # As float32, which is what is folded: a float64 may be finite and still too large.
    if not (math.isfinite(low.float().item()) and math.isfinite(high.float().item())):
        bad = int((~torch.isfinite(weight.detach().float())).sum())
        msg = (
            f"{name}: {bad} of {weight.numel()} values are NaN or Inf, expected finite ones; "
            "mend the checkpoint, or leave this module in float with skip=[…]"
        )
        raise WeightError(msg)


class PackedModule(HoldsCodes):
    """A module whose matrix `[out, in]` lives in plain integer buffers `weight<suffix>`.

    The buffers' names, dtypes and shapes follow from `format` and `shape` (`Format.buffers`); all are
    persistent, so `state_dict` is the whole state. Casting the module (`.half()`, `.to(torch.bfloat16)`)
    leaves them alone and changes only float parameters and `dtype`, the float type that the module works in.
    """

    kind = ""
    _is_hf_initialized = True  # transformers must never draw random numbers into packed bytes

    weight: Tensor  # a buffer: flat int8 codes
    format: Format
    shape: tuple[int, int]
    dtype: torch.dtype
    original_dtype: torch.dtype

    def _set_up(
        self,
        shape: tuple[int, int],
        fmt: Format | str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        original_dtype: torch.dtype | None,
    ) -> None:
        """Register packed buffers for `shape` on `device` (meta included): zeros, to be filled."""
        self.format = as_format(fmt)
        self.shape = (int(shape[0]), int(shape[1]))
        if min(self.shape) < 1:
            msg = f"{type(self).__name__}: shape {self.shape} has no elements; expected [out, in] >= 1"
            raise WeightError(msg)
        self.dtype = dtype or torch.get_default_dtype()
        self.original_dtype = original_dtype or self.dtype
        self._spec = list(self.format.spec(self.shape))
        table = self.format.buffers(self.shape)
        self.packed_names = tuple("weight" + suffix for suffix, _, _ in table)
        for name, (_, type_name, size) in zip(self.packed_names, table, strict=True):
            buffer = torch.zeros(tuple(size), dtype=getattr(torch, type_name), device=device)
            self.register_buffer(name, buffer, persistent=True)

    @staticmethod
    def replaces(module: nn.Module) -> bool:
        """Whether this class can take the place of the float `module`."""
        raise NotImplementedError

    @classmethod
    def _check_source(cls, module: nn.Module) -> None:
        if not cls.replaces(module):
            msg = f"{cls.__name__} cannot take the place of a {type(module).__name__}"
            raise TypeError(msg)

    def packed_nbytes(self) -> int:
        """Bytes of the packed matrix, metadata included: on disk and resident alike."""
        return int(self.format.nbytes(self.shape))

    def original_nbytes(self) -> int:
        """Bytes that the matrix took before folding, in `original_dtype`."""
        return self.shape[0] * self.shape[1] * self.original_dtype.itemsize

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as floats, shape `[out, in]`, a fresh tensor of `out * in * itemsize` bytes."""
        if dtype == torch.float64:
            return self.dequantize(torch.float32).double()
        return ops.dequantize(self.operands(), self.format, self.shape, dtype)

    def _fill(self, weight: Tensor, method: str | None = None, solution: Solution | None = None) -> Solution:
        """Fold `weight` `[out, in]` into the buffers, or put a `solution` made elsewhere there.

        All buffers are swapped only once all are made.
        """
        from bitfold.methods import fold_weight

        if solution is None:
            weight = weight.detach()
            if weight.dtype == torch.float64:
                weight = weight.float()
            solution = fold_weight(weight, self.format, method)
        self._hold(solution.packed)
        return solution

    def _hold(self, packed: Sequence[Tensor]) -> None:
        check_packed(self, packed)
        for name, tensor in zip(self.packed_names, packed, strict=True):
            self._buffers[name] = tensor

    def take(self, solution: Solution, bias: Tensor | None) -> None:
        """Hold the matrix of `solution` instead, and `bias` shifted by what it says."""
        self._hold(solution.packed)
        if solution.bias_shift is not None and bias is not None:
            shifted = bias.detach() + solution.bias_shift.to(bias)  # as in `from_float`
            self.bias = nn.Parameter(shifted, requires_grad=bias.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        def keep_integers(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # `.type(torch.float64)` casts everything it meets: take only its device for packed bytes
            if tensor.is_floating_point() or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        super()._apply(keep_integers, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self._codes().device))
        if probe.is_floating_point():
            self.dtype = probe.dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # In place of torch's version number: codes of equal width look alike, whatever they mean.
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            # Interned: pickle writes equal strings once only if they are one.
            metadata[prefix[:-1]] = {"format": sys.intern(str(self.format))}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = []
        stored_format = local_metadata.get("format", str(self.format))
        if stored_format != str(self.format):
            problems.append(
                f"{prefix}weight: found format {stored_format}, expected {self.format}; fold this module to "
                f"{stored_format} first, or load into a float model"
            )
        for suffix, type_name, size in self.format.buffers(self.shape):
            key = f"{prefix}weight{suffix}"
            if key in state_dict:
                problem = tensor_problem(key, state_dict[key], type_name, size, self.format, self.shape)
                if problem:
                    problems.append(problem)
        stored = {suffix: state_dict.get(f"{prefix}weight{suffix}") for suffix in OUTLIER_INDEX}
        if not problems and all(isinstance(tensor, Tensor) for tensor in stored.values()):
            problem = outlier_problem(f"{prefix}weight", stored, self.format, self.shape)  # type: ignore[arg-type]
            problems += [problem] if problem else []
        if problems:  # nothing of this module is copied, so that it stays whole
            error_msgs.extend(problems)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def manifest_entry(self) -> dict[str, Any]:
        """What `bitfold.manifest` stores about this module: JSON types only."""
        return {
            "kind": self.kind,
            "format": str(self.format),
            "shape": list(self.shape),
            "dtype": dtype_name(self.original_dtype),
        }

    def _size_repr(self) -> str:
        before, after = self.original_nbytes(), self.packed_nbytes()
        dtype = dtype_name(self.original_dtype)
        size = f"{after:,} bytes, {before / after:.2f}x smaller than {dtype}"
        return f"format={self.format}, {size}{self._layout_repr()}"


def tensor_problem(
    name: str, tensor: Any, type_name: str, size: Sequence[int], fmt: Format, shape: tuple[int, int]
) -> str | None:
    """One sentence on why `tensor` cannot be the packed buffer `name`, or None where it can."""
    if not isinstance(tensor, Tensor):
        return f"{name}: expected a tensor, found {type(tensor).__name__}"
    found = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
    expected = f"{type_name} {list(size)} (format {fmt}, matrix {list(shape)})"
    if dtype_name(tensor.dtype) == type_name and list(tensor.shape) == list(size):
        return None
    hint = ""
    if tensor.is_floating_point() and tuple(tensor.shape) == shape:
        hint = "; this is a float weight: load it into the float model and fold that with bitfold.quantize"
    return f"{name}: found {found}, expected {expected}{hint}"


def check_packed(module: PackedModule, packed: Sequence[Tensor]) -> None:
    """Raise PackedDataError unless `packed` are exactly the buffers that `module` needs."""
    table = module.format.buffers(module.shape)
    if len(packed) != len(table):
        msg = f"{module.format}: expected {len(table)} packed tensors, got {len(packed)}"
        raise PackedDataError(msg)
    for (suffix, type_name, size), tensor in zip(table, packed, strict=True):
        problem = tensor_problem("weight" + suffix, tensor, type_name, size, module.format, module.shape)
        if problem:
            raise PackedDataError(problem)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the training flag and the forward hooks of `old`, whose place it takes."""
    new.training = old.training
    for attribute in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        setattr(new, attribute, getattr(old, attribute))
