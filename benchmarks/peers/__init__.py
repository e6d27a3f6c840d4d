"""Other libraries that multiply by a packed weight: an adapter each, used where the library is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from peers.base import NotMeasured, Peer

# module here -> what pip calls the library
LIBRARIES = {
    "torch_dense": "torch",
    "torch_int4pack": "torch",
    "bnb": "bitsandbytes",
    "ort": "onnxruntime",
    "ggml": "llama-cpp-python",
}


def build(
    weight: torch.Tensor, threads: int, libraries: list[str], missing: dict[str, str]
) -> Iterator[Peer]:
    """The peers for `weight` [n, k], one by one; `missing` gets why the others are not there."""
    for library in libraries:
        try:
            module: Any = importlib.import_module(f"peers.{library}")
        except ImportError as error:
            missing[LIBRARIES[library]] = f"not installed ({error})"
            continue
        for name, builder in module.PEERS.items():
            try:
                yield builder(name, weight, threads)
            except NotMeasured as reason:
                missing[name] = str(reason)


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for name in dict.fromkeys(LIBRARIES.values()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
