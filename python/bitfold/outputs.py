"""Running a model on batches, and what of its outputs counts: logits or states, padding left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.errors import ActivationError

__all__ = [
    "Batch",
    "check_arguments",
    "check_rows",
    "device_of",
    "final_output",
    "final_rows",
    "kl_divergence",
    "only_tensor",
    "read_batches",
    "row_mask",
]


MASKS = ("attention_mask", "decoder_attention_mask")
_HIDDEN = -1000.0  # what hides a key is -10000 or less, biases by distance are more


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def masks(self) -> list[Tensor]:
        """Bool `[rows, tokens]` each, False for padding: the attention masks among the arguments."""
        found = [_padding_mask(self.kwargs.get(name)) for name in MASKS]
        return [mask for mask in found if mask is not None]

    @property
    def has_unread_mask(self) -> bool:
        """An attention mask is given, but which tokens are padding cannot be told from it."""
        given = [self.kwargs[name] for name in MASKS if self.kwargs.get(name) is not None]
        return any(_padding_mask(mask) is None for mask in given)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        leaves = pytree.tree_leaves((self.args, sorted(self.kwargs.items())))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same with `function` of each tensor."""
        change = lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf  # noqa: E731
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return Batch(args, kwargs)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Any:
        """Call `model`, without gradients, on its own device."""
        here = self.to(device_of(model))
        return model(*here.args, **here.kwargs)

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor` `[..., features]` as `[rows, features]` float32, without the rows of padding tokens."""
        if tensor.ndim == 0:
            return tensor.reshape(1, 1).float()
        flat = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.detach()[None]
        mask = row_mask(tensor, self.masks)
        return (flat if mask is None else flat[mask.to(flat.device)]).float()


def _padding_mask(mask: Any) -> Tensor | None:
    """Bool `[rows, tokens]` of an attention mask; None where it is of another kind.

    Of `[rows, heads, queries, keys]` (or without heads) a token counts if any query may attend to it. Such a
    mask says so by True or 1, or by what it adds to the logits: large negative numbers for what is hidden.
    """
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
        return None
    if mask.ndim == 2:
        return mask.bool()
    if not mask.is_floating_point():
        seen = mask.bool()
    elif bool((mask > 0).any()) and not bool((mask < 0).any()):
        seen = mask > 0
    else:
        seen = mask > _HIDDEN
    return seen.flatten(1, -2).any(dim=1)


def device_of(model: nn.Module) -> torch.device:
    """Where the model is, by its first parameter or buffer."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def row_mask(x: Tensor, masks: list[Tensor]) -> Tensor | None:
    """The mask over the rows of x `[..., n]`, by shape; None where no mask fits.

    Args:
        x: `[rows, tokens, n]`, `[tokens, rows, n]` or `[rows * tokens, n]`.
        masks: bool `[rows, tokens]` each; of several that fit, a token counts if all say so.
    """
    found: Tensor | None = None
    for mask in masks:
        fitting: Tensor | None = None
        if tuple(x.shape[:-1]) == tuple(mask.shape) or (x.ndim == 2 and x.shape[0] == mask.numel()):
            fitting = mask.reshape(-1)
        elif x.ndim == 3 and tuple(x.shape[:2]) == (mask.shape[1], mask.shape[0]):
            fitting = mask.t().reshape(-1)
        if fitting is not None:
            found = fitting if found is None else found & fitting
    return found


def check_arguments(batch: Batch, model: nn.Module, where: str) -> None:
    """Raise ValueError if `model.forward` has no place for what the batch holds, such as labels."""
    if model._forward_pre_hooks:  # they may change the arguments
        return
    takes = inspect.signature(model.forward)
    try:
        takes.bind(*batch.args, **batch.kwargs)
    except TypeError as error:
        held = [_described(value) for value in batch.args]
        held += [f"{name}={_described(value)}" for name, value in batch.kwargs.items()]
        advice = "give what it takes and nothing else"
        if len(batch.args) > 1:
            advice = (
                "the parts of a tuple or list are positional arguments; of (input, label) pairs give the "
                "inputs alone: [x for x, label in pairs]"
            )
        msg = (
            f"{where} holds ({', '.join(held)}), but {type(model).__name__}.forward takes "
            f"({', '.join(takes.parameters)}): {error}; {advice}"
        )
        raise ValueError(msg) from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
    return type(value).__name__


def read_batches(batches: Any, where: str, model: nn.Module) -> Iterator[Batch]:
    """Check and wrap each of `batches`: a dict of forward arguments, a tensor, or a tuple of arguments.

    Raises TypeError for anything else, ValueError where there are none or `model` does not take them.
    """
    if isinstance(batches, str | bytes | Tensor | Mapping) or not isinstance(batches, Iterable):
        msg = (
            f"{where}: expected an iterable of batches (dicts of forward arguments, or tensors), "
            f"got {type(batches).__name__}; for a single batch write [batch]"
        )
        raise TypeError(msg)
    count = 0
    for count, batch in enumerate(batches, 1):
        if isinstance(batch, Mapping):
            made = Batch(kwargs=dict(batch))
        elif isinstance(batch, Tensor):
            made = Batch(args=(batch,))
        elif isinstance(batch, tuple):
            made = Batch(args=batch)
        elif isinstance(batch, Batch):
            made = batch
        else:
            msg = (
                f"{where}: batch {count} is a {type(batch).__name__}, expected a dict of forward arguments, "
                "a tensor or a tuple; for text call the tokenizer with return_tensors='pt' first"
            )
            raise TypeError(msg)
        check_arguments(made, model, f"{where}: batch {count}")
        yield made
    if not count:
        msg = f"{where}: there are no batches; expected at least one (a generator can be read only once)"
        raise ValueError(msg)


def only_tensor(output: Any) -> Tensor | None:
    """The tensor that a module put out, or the first of several; None where there is none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Iterable):
        return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None


def final_output(output: Any) -> tuple[str, Tensor]:
    """What to compare of a model's output: `("logits", …)`, `("last_hidden_state", …)` or `("output", …)`."""
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return name, value
    value = only_tensor(output)
    if value is None:
        msg = f"the model put out a {type(output).__name__} without a float tensor; expected logits or states"
        raise TypeError(msg)
    return "output", value


def final_rows(batch: Batch, model: nn.Module, which: str = "the model") -> tuple[str, Tensor]:
    """Run `model` on `batch`: the name of its output, and its rows `[rows, features]`, finite."""
    name, value = final_output(batch.run(model))
    rows = batch.rows(value)
    check_rows(rows, f"{which}: {name}")
    return name, rows


def check_rows(rows: Tensor, where: str) -> None:
    """ActivationError naming `where` if `rows` has NaN or infinity, ValueError if it is empty."""
    if rows.numel() == 0:
        msg = f"{where}: no rows; is the attention mask of a batch all zeros, or a batch empty?"
        raise ValueError(msg)
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).sum())
        msg = f"{where}: {bad} of {rows.numel()} values are NaN or Inf, expected finite ones"
        raise ActivationError(msg)


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || logits) of each row, in nats; both `[rows, classes]` logits -> float64 `[rows]`.

    In float64, a piece at a time: of an 8-bit layer the divergence is about the rounding error of float32.
    """
    piece = max(1, (1 << 22) // logits.shape[-1])
    found = []
    for a, b in zip(reference.split(piece), logits.split(piece), strict=True):
        p, q = torch.log_softmax(a.double(), -1), torch.log_softmax(b.double(), -1)
        found.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
    return torch.cat(found)
