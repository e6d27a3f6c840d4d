"""bitfold.compare: how far a folded model is from the float one, layer by layer and at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.comparison import Comparison, Deviation, LayerComparison
from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.outputs import Batch, check_rows, final_output, kl_divergence, only_tensor, read_batches

__all__ = ["Comparison", "Deviation", "LayerComparison", "compare"]


def compare(
    float_model: nn.Module, quant_model: nn.Module, batches: Iterable[Any], *, per_layer: bool = True
) -> Comparison:
    """Run both models on the same batches and measure how far the folded one is from the float one.

    Memory beyond the models: the outputs of the folded layers for one batch. Padding (by the batch's
    attention mask) is left out. Both models are run in evaluation mode, and left as they were.

    Args:
        float_model: the model before folding.
        quant_model: the same architecture, folded in part or whole.
        batches: iterable, read once, of dicts of forward arguments, tensors, or tuples of arguments.
        per_layer: also compare the outputs of every folded module.

    Raises:
        ValueError: the models do not fit together (named: module, shapes), nothing is folded, no batches.
        TypeError: batches of another kind.
        ActivationError: NaN or infinity in the outputs of a model; names the first such layer.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> folded = bitfold.quantize(copy.deepcopy(model), "int8-row", progress=False)
        >>> compare(model, folded, [torch.randn(4, 64)]).final.cosine > 0.999
        True
    """
    pairs = _pairs(float_model, quant_model)
    layers = {name: LayerComparison(name, str(quant.format)) for name, (_, quant) in pairs.items()}
    ends = _Ends()
    with _evaluating(float_model), _evaluating(quant_model):
        for batch in read_batches(batches, "compare(): batches", float_model):
            if per_layer:
                before: dict[str, list[Tensor]] = {}
                watch = {
                    twin: _float_hook(name, quant, batch, layers[name], before)
                    for name, (twin, quant) in pairs.items()
                }
                with _hooks(watch):
                    reference = batch.run(float_model)
                watch = {
                    quant: _quant_hook(name, batch, layers[name], before)
                    for name, (_, quant) in pairs.items()
                }
                with _hooks(watch):
                    other = batch.run(quant_model)
            else:
                reference, other = batch.run(float_model), batch.run(quant_model)
            ends.add(batch, reference, other, float_model)
    ran = [layer for layer in layers.values() if layer.isolated.rows] if per_layer else []
    return Comparison(
        layers=ran,
        output=ends.name,
        final=ends.deviation,
        batches=ends.batches,
        kl=ends.kl / ends.deviation.rows if ends.name == "logits" else None,
        top1=ends.same / ends.deviation.rows if ends.name == "logits" else None,
        perplexity=ends.perplexity(),
    )


class _Ends:
    """Sums over the final outputs."""

    def __init__(self) -> None:
        self.name = ""
        self.batches = 0
        self.deviation = Deviation()
        self.kl = 0.0
        self.same = 0
        self.targets = 0
        self.losses = [0.0, 0.0]

    def add(self, batch: Batch, reference: Any, other: Any, model: nn.Module) -> None:
        self.name, expected = final_output(reference)
        name, found = final_output(other)
        if (name, found.shape) != (self.name, expected.shape):
            msg = (
                f"compare(): the float model puts out {self.name} {list(expected.shape)}, the folded one "
                f"{name} {list(found.shape)}; expected two models of one architecture"
            )
            raise ValueError(msg)
        rows, other_rows = batch.rows(expected), batch.rows(found)
        check_rows(rows, f"compare(): the float model: {self.name}")
        check_rows(other_rows, f"compare(): the folded model: {self.name}")
        other_rows = other_rows.to(rows.device)
        self.batches += 1
        self.deviation.add(rows, other_rows)
        if self.name == "logits":
            self.kl += float(kl_divergence(rows, other_rows).sum())
            self.same += int((rows.argmax(-1) == other_rows.argmax(-1)).sum())
            targets = _targets(batch, expected, model)
            if targets is not None:
                keep = targets >= 0
                self.targets += int(keep.sum())
                for i, logits in enumerate((expected, found)):
                    kept = logits[:, : targets.shape[1]][keep.to(logits.device)].float()
                    loss = nn.functional.cross_entropy(kept, targets[keep].to(kept.device), reduction="sum")
                    self.losses[i] += float(loss)

    def perplexity(self) -> tuple[float, float] | None:
        if not self.targets:
            return None
        first, second = (math.exp(min(loss / self.targets, 700.0)) for loss in self.losses)
        return first, second


def _targets(batch: Batch, logits: Tensor, model: nn.Module) -> Tensor | None:
    """The token that each row of logits `[batch, length, classes]` should predict, -100 for none; or None.

    Labels where the batch has them, else the input ids of a causal language model; causal models predict
    the next token, so that the last row is without one.
    """
    kind = type(model).__name__
    causal = ("CausalLM" in kind or "LMHead" in kind) and not getattr(
        getattr(model, "config", None), "is_encoder_decoder", False
    )
    targets = batch.kwargs.get("labels")
    mask: Any = None
    if targets is None and causal:
        targets = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
        mask = batch.kwargs.get("attention_mask")
    if not isinstance(targets, Tensor) or logits.ndim != 3 or targets.shape != logits.shape[:2]:
        return None
    if isinstance(mask, Tensor) and mask.shape == targets.shape:
        targets = targets.masked_fill(~mask.bool(), -100)
    return targets[:, 1:] if causal else targets


def _pairs(float_model: nn.Module, quant_model: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """Folded modules and their float twins, by name."""
    if float_model is quant_model:
        msg = "compare(): both models are the same object (quantize folds in place); pass a copy made before"
        raise ValueError(msg)
    twins = dict(float_model.named_modules())
    pairs: dict[str, tuple[nn.Module, Any]] = {}
    for name, module in quant_model.named_modules():
        if not isinstance(module, PackedModule | TiedHead | TiedEmbedding):
            continue
        twin: Any = twins.get(name)
        if twin is None or isinstance(twin, PackedModule | TiedHead | TiedEmbedding):
            found = "no such module" if twin is None else f"a folded {type(twin).__name__}"
            msg = f"{name}: folded in the second model, the first has {found}; expected the float model first"
            raise ValueError(msg)
        shape = tuple(twin.weight.shape) if isinstance(getattr(twin, "weight", None), Tensor) else ()
        if shape not in (module.shape, module.shape[::-1]):
            msg = (
                f"{name}: the float model has {type(twin).__name__} {list(shape)}, the folded one "
                f"{list(module.shape)}; expected two models of one architecture"
            )
            raise ValueError(msg)
        pairs[name] = (twin, module)
    if not pairs:
        msg = "compare(): nothing is folded in the second model; expected (float model, folded model)"
        raise ValueError(msg)
    return pairs


def _float_hook(
    name: str, quant: nn.Module, batch: Batch, layer: LayerComparison, before: dict[str, list[Tensor]]
) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensor = only_tensor(output)
        if tensor is None or not tensor.numel():  # an expert that no token was sent to
            return
        rows = batch.rows(tensor)
        check_rows(rows, f"compare(): the float model: {name}")
        device = next(quant.buffers()).device if list(quant.buffers()) else tensor.device
        args, kwargs = (
            _moved(args, device),
            dict(zip(kwargs, _moved(tuple(kwargs.values()), device), strict=True)),
        )
        alone = only_tensor(quant.forward(*args, **kwargs))
        assert alone is not None
        alone_rows = batch.rows(alone)
        check_rows(alone_rows, f"compare(): the folded {name}, on the float model's inputs")
        layer.isolated.add(rows, alone_rows.to(rows.device))
        before.setdefault(name, []).append(tensor.detach())

    return hook


def _quant_hook(
    name: str, batch: Batch, layer: LayerComparison, before: dict[str, list[Tensor]]
) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        tensor = only_tensor(output)
        if tensor is None or not before.get(name):
            return
        reference = before[name].pop(0)  # freed as soon as it is counted
        if reference.shape == tensor.shape:
            rows = batch.rows(tensor)
            check_rows(rows, f"compare(): the folded model: {name}")
            layer.accumulated.add(batch.rows(reference), rows.to(reference.device))

    return hook


def _moved(values: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


@contextmanager
def _hooks(hooks: dict[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
