"""Where runs keep their checkpoints if nobody says where, and for how long."""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.calibration.checkpoint import MARK, remove_directory
from bitfold.calibration.fingerprint import differences, key
from bitfold.io.locking import holder

_ABANDONED = 30 * 24 * 3600  # seconds


def default_directory(fingerprint: dict[str, Any]) -> Path:
    """`$XDG_CACHE_HOME/bitfold/calibration/<key>`, `~/.cache` where the variable is not set.

    The key is that of the whole fingerprint, so another model, other data or another plan get another
    directory.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "bitfold" / "calibration" / key(fingerprint)


# Where the runs of this process over a model keep their state: an interrupted one has changed the model, so
# its directory would not be found by the fingerprint.
_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, Path] = weakref.WeakKeyDictionary()


def remove_abandoned(root: Path, but: Path) -> None:
    """Remove the checkpoints below `root` that nobody has touched for 30 days, all except `but`."""
    for directory in root.iterdir() if root.is_dir() else ():
        if directory == but or not (directory / MARK).is_file():
            continue
        with contextlib.suppress(OSError):
            touched = max(path.stat().st_mtime for path in [directory, *directory.iterdir()])
            if time.time() - touched > _ABANDONED and holder(directory) is None:
                remove_directory(directory)


def directory_for(model: nn.Module, fingerprint: dict[str, Any]) -> Path:
    """The default directory, or that of an interrupted run of this process over the same model and data."""
    earlier = _OF_MODEL.get(model)
    if earlier is not None:
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads((earlier / MARK).read_text())
            if not differences(stored, fingerprint):
                return earlier
    _OF_MODEL[model] = default_directory(fingerprint)
    return _OF_MODEL[model]
