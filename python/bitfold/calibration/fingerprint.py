"""What a run was started with, as JSON, so that another start can be told from the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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


def of_model(model: nn.Module) -> dict[str, str]:
    """Digest of each float tensor, by name. Matrices that are folded already do not say what they were."""
    folded = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PackedModule | TiedHead | TiedEmbedding)
    )
    return {
        name: digest(tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and not name.startswith(folded or "\0")
    }


def of_batches(batches: list[Batch]) -> dict[str, Any]:
    """Number of batches and tensors, and one digest over all."""
    digests = [digest(tensor) for batch in batches for tensor in batch.tensors()]
    names = [sorted(batch.kwargs) for batch in batches]
    whole = hashlib.blake2b(json.dumps([digests, names]).encode(), digest_size=16).hexdigest()
    return {"batches": len(batches), "digest": whole}


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
