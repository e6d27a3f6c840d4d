"""What lies beside the weights of a checkpoint and must travel with them: tokenizer, code, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["copy_side_files", "side_files"]

# Weights in any spelling, and what describes them: the export writes its own.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf",
    ".npz", ".tflite", ".mlmodel", ".ot", ".pkl", ".pickle",
}  # fmt: skip
_OWN_FILES = {"config.json", "quantize_config.json"}
# Folders that hold more than another copy of the weights.
_FOLDERS = {"additional_chat_templates", "custom_generate"}


def side_files(directory: Path) -> Iterator[Path]:
    """Files to copy, relative to `directory`: all but weights at the top, and the folders that belong to the
    model.

    Folders named in sentence-transformers' `modules.json` are taken whole, their own small weights included.
    """
    whole = _module_folders(directory)
    for path in sorted(directory.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_file():
            weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            if not weights and path.name not in _OWN_FILES:
                yield path.relative_to(directory)
        elif path.is_dir() and path.name in whole | _FOLDERS:
            yield from (file.relative_to(directory) for file in sorted(path.rglob("*")) if file.is_file())


def _module_folders(directory: Path) -> set[str]:
    try:
        modules = json.loads((directory / "modules.json").read_text(encoding="utf-8"))
        return {Path(module["path"]).parts[0] for module in modules if module.get("path")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy them (links are followed); returns their names."""
    names = []
    for name in side_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
        names.append(str(name))
    return names
