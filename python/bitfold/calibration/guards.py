"""What is done to a model for the time of a calibration, and undone afterwards."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfold.nn._places import Places


class Originals:
    """The stage in work as it was, and modules folded without data: to be run for a moment, or put back.

    What is half folded, or prepared and not folded, cannot be gone on with, so it is put back as a whole.
    """

    def __init__(self) -> None:
        self._swapped: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._values: list[tuple[nn.Parameter, Tensor]] = []
        self._kept = 0

    def remember(self, places: Places, swaps: Mapping[nn.Module, nn.Module]) -> None:
        """Hold the keys of `swaps`, which are about to be replaced by their values."""
        for old, new in swaps.items():
            self._swapped += [(parent, attribute, old, new) for parent, attribute in places.of(old)]

    def keep_values(self, block: nn.Module) -> None:
        """Copy the parameters of `block`, which is about to be prepared."""
        self._values = [(parameter, parameter.detach().clone()) for parameter in block.parameters()]

    def keep(self) -> None:
        """Never forget the modules that are there by now: every pass runs through them."""
        self._kept = len(self._swapped)

    def forget(self) -> None:
        """Release all others."""
        del self._swapped[self._kept :]
        self._values = []

    @torch.no_grad()
    def restore(self) -> None:
        """Put all that is remembered back for good."""
        for parent, attribute, old, _ in self._swapped:
            parent._modules[attribute] = old
        for parameter, value in self._values:
            parameter.copy_(value)

    @contextlib.contextmanager
    def view(self) -> Iterator[None]:
        """The float model, as far as it is remembered."""
        for parent, attribute, old, _ in self._swapped:
            parent._modules[attribute] = old
        try:
            yield
        finally:
            for parent, attribute, _, new in self._swapped:
                parent._modules[attribute] = new


def refuse_inference_tensors(model: nn.Module) -> None:
    """ValueError where a parameter or buffer was made under `torch.inference_mode()`."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            msg = (
                f"quantize(): {name} was made under torch.inference_mode(), so what happens to it cannot be "
                "followed; load the model outside of inference mode (the call itself may be inside)"
            )
            raise ValueError(msg)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no key-value cache; all as before afterwards, also in modules put in place."""
    training = {name: module.training for name, module in model.named_modules()}
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for config in caching:
            config.use_cache = True
        for name, module in model.named_modules():
            if name in training:
                module.training = training[name]


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Random numbers that depend on nothing but the seed and the matrix; the caller's are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed ^ zlib.crc32(name.encode()))
        yield
