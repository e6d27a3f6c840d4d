"""What a run was started with, as JSON, so that another start can be told from the same one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bitfold.nn import PackedModule, TiedEmbedding, TiedHead
from bitfold.outputs import Batch

_WORDS = {
    "model": "the model",
    "calibration": "the calibration data",
    "plan": "the plan",
    "options": "options or settings",
    "processes": "the number of processes",
    "versions": "versions of libraries",
}


# Of a config: what says nothing of what the model computes, or changes when it is folded.
_VOLATILE = {"quantization_config", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}


def of_model(model: nn.Module) -> dict[str, str]:
    """Digest of each float tensor, by name; classes of modules, with what they say of themselves; config.

    Matrices that are folded already do not say what they were.
    """
    folded = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PackedModule | TiedHead | TiedEmbedding)
    )
    tensors = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    found = {name: digest(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    found |= {
        f"{name}.class": _text(f"{type(module).__qualname__} {module.extra_repr()}")
        for name, module in model.named_modules()
    }
    found = {name: value for name, value in found.items() if not name.startswith(folded or "\0")}
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return found | {
        f"config.{name}": _text(json.dumps(value, sort_keys=True, default=str))
        for name, value in values.items()
        if name not in _VOLATILE
    }


def of_batches(batches: list[Batch]) -> dict[str, Any]:
    """Number of batches, and one digest over all their tensors, other arguments and how they are nested."""
    parts: list[Any] = []
    for batch in batches:
        leaves, structure = pytree.tree_flatten((batch.args, sorted(batch.kwargs.items())))
        values = [digest(leaf) if isinstance(leaf, Tensor) else _text(repr(leaf)) for leaf in leaves]
        parts.append([str(structure), values])
    whole = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    return {"batches": len(batches), "digest": whole}


def _text(value: str) -> str:
    """Without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", value)


def digest(tensor: Tensor) -> str:
    """Of dtype, shape and bytes."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    head = f"{tensor.dtype} {tuple(tensor.shape)} "
    return hashlib.blake2b(raw.data, digest_size=16, key=hashlib.sha256(head.encode()).digest()).hexdigest()


def key(fingerprint: Mapping[str, Any]) -> str:
    """A short name for the run."""
    text = json.dumps(fingerprint, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what differs; empty where it is the same run.

    Of the model only those tensors are compared that both know: an interrupted run in the same process has
    folded some.
    """
    found = []
    for part, words in _WORDS.items():
        old, new = stored.get(part), now.get(part)
        if old == new:
            continue
        if not isinstance(old, Mapping) or not isinstance(new, Mapping):
            found.append(f"{words}: {old!r} before, {new!r} now")
            continue
        names = set(old) & set(new) if part == "model" else set(old) | set(new)
        changed = sorted(name for name in names if old.get(name) != new.get(name))
        if part == "model":
            changed += sorted(set(new) - set(old))
        if changed:
            shown = ", ".join(_shown(name, old, new, part) for name in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            found.append(f"{words} ({shown}{more})")
    return found


def _shown(name: str, old: Mapping[str, Any], new: Mapping[str, Any], part: str) -> str:
    if part == "model" or name == "digest":
        return name
    return f"{name}: {old.get(name)!r} before, {new.get(name)!r} now"
