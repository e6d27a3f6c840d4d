"""Build backend: scikit-build-core, plus finding the torch that bitfold is being installed next to.

An isolated build sees only its own requirements. Asking for torch there would download another torch, often
with gigabytes of CUDA libraries, only to read its headers. So torch's folder is looked up in the environment
that runs pip, whose paths `sysconfig` still names inside the isolated build, and torch becomes a build
requirement only where none is found.

`BITFOLD_TORCH_DIR` (the folder of the package itself, `…/site-packages/torch`) is used before anything else.
Installers that build with an interpreter of their own, as uv does, need it, or `--no-build-isolation`.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from scikit_build_core import build as _skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch>=2.11"
OLDEST_TORCH = (2, 11)
# Only a torch that has this header, the stable ABI, can be compiled against.
STABLE_HEADER = Path("include/torch/csrc/stable/library.h")

Settings = dict[str, str | list[str]]


def find_torch() -> Path | None:
    """The folder of a torch that can be compiled against, or None.

    Raises:
        RuntimeError: `BITFOLD_TORCH_DIR` is set, but names no such folder.
    """
    named = os.environ.get("BITFOLD_TORCH_DIR")
    if named:
        folder = Path(named).expanduser().resolve()
        if not _is_usable(folder):
            msg = (
                f"BITFOLD_TORCH_DIR={named} is not the folder of an installed torch >= 2.11 "
                f"(it must hold version.py and {STABLE_HEADER}); name …/site-packages/torch, or unset it"
            )
            raise RuntimeError(msg)
        return folder
    return next((folder for folder in _candidates() if _is_usable(folder)), None)


def _candidates() -> Iterator[Path]:
    # First what this very process imports: a build without isolation, or one that had to install torch.
    for entry in sys.path:
        yield Path(entry) / "torch"
    for key in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(key)) / "torch"
    if _sees_system_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for key in ("purelib", "platlib"):
            yield Path(sysconfig.get_path(key, vars=base)) / "torch"


def _sees_system_packages() -> bool:
    """True in a virtual environment made with `--system-site-packages`."""
    try:
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return False
    settings = dict(line.replace(" ", "").lower().split("=", 1) for line in text.splitlines() if "=" in line)
    return settings.get("include-system-site-packages") == "true"


def _is_usable(folder: Path) -> bool:
    return (folder / STABLE_HEADER).is_file() and _version(folder) >= OLDEST_TORCH


def _version(folder: Path) -> tuple[int, ...]:
    """(major, minor) as written in torch/version.py, without importing torch; () if unknown."""
    try:
        lines = (folder / "version.py").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    for line in lines:
        if line.startswith("__version__"):
            parts = line.split("=", 1)[1].strip(" '\"").split(".")
            return tuple(int(part) for part in parts[:2] if part.isdigit())
    return ()


def _with_torch(settings: Settings | None) -> Settings:
    folder = find_torch()
    if folder is None:
        msg = (
            "torch >= 2.11 was not found; install it first, "
            "or set BITFOLD_TORCH_DIR to its folder (…/site-packages/torch)"
        )
        raise RuntimeError(msg)
    print(f"bitfold: compiling against the torch in {folder}", flush=True)
    return {"cmake.define.BITFOLD_TORCH_DIR": str(folder), **(settings or {})}


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    """Scikit-build-core's needs (CMake or Ninja where absent), and torch where none is installed."""
    needed = _skbuild.get_requires_for_build_wheel(config_settings)
    return needed if find_torch() else [*needed, TORCH_REQUIREMENT]


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    """As for a wheel."""
    needed = _skbuild.get_requires_for_build_editable(config_settings)
    return needed if find_torch() else [*needed, TORCH_REQUIREMENT]


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel against the torch that was found."""
    name: str = _skbuild.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel against the torch that was found."""
    name: str = _skbuild.build_editable(wheel_directory, _with_torch(config_settings), metadata_directory)
    return name
