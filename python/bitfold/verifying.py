"""Is an export what it promises? Every stored tensor is looked at, one at a time; no model is built here.

`bitfold.hf.verifying` adds what needs transformers: the tensors that the model's own class expects, a load in
a fresh process, and a comparison with the source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitfold import manifest
from bitfold.formats import Format
from bitfold.inspecting import summarize
from bitfold.io.safetensors_file import TensorInfo
from bitfold.io.safetensors_writer import TensorSpec
from bitfold.io.shards import Checkpoint
from bitfold.nn._base import OUTLIER_INDEX
from bitfold.outliers import outlier_problem
from bitfold.summarizing import Summary

__all__ = ["Problem", "Verification", "check_outliers", "check_ratio", "check_tensors", "expected_packed"]

# An export may be larger than promised by this much (names, alignment, small modules) before it counts as a
# lie.
MIN_SHARE_OF_PROMISE = 0.8
# Weights in any other spelling lying beside the export count as bytes of the export.
_STRAY = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.safetensors")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: which tensor (or file), what was found, what was expected."""

    name: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: found {self.found}, expected {self.expected}"


@dataclass
class Verification:
    """What `bitfold verify` found out. It passed if there are no problems."""

    path: Path
    summary: Summary
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    promised: dict[str, float] = field(default_factory=dict)
    real: dict[str, float] = field(default_factory=dict)
    comparison: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "problems": [vars(problem) for problem in self.problems],
            "notes": self.notes,
            "promised_ratio": self.promised,
            "real_ratio": self.real,
            "comparison": self.comparison,
            **self.summary.to_dict(),
        }


def expected_packed(description: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Dtype and shape of every packed tensor that a manifest promises."""
    promised = manifest.tensors(description)
    return {name: TensorSpec(getattr(torch, dtype), shape) for name, (dtype, shape) in promised.items()}


def check_tensors(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    expected: Mapping[str, TensorSpec],
    parameters: set[str] | None = None,
) -> list[Problem]:
    """Check presence, dtype, shape and values of all tensors.

    Args:
        checkpoint: the export.
        names: name in the file → name in the model.
        expected: by names of the model. Tensors beyond these are only checked for their values.
        parameters: float tensors that must be finite; of others (attention masks hold -inf) only NaN is
        wrong. None
            takes all as parameters.

    Returns:
        Problems, in the order of the model's names, then of the file.
    """
    infos = {names.get(info.name, info.name): info for info in checkpoint}
    problems = []
    bad = set()
    for name, spec in expected.items():
        info = infos.get(name)
        if info is None:
            problems.append(Problem(name, "no such tensor", str(spec)))
        elif info.shape != spec.shape or not _same_kind(info.torch_dtype, spec.dtype):
            bad.add(name)
            found = f"{str(info.torch_dtype).removeprefix('torch.')} {list(info.shape)}"
            problems.append(Problem(name, found, str(spec)))
    for name, info in infos.items():
        if name not in bad:
            problem = _check_values(checkpoint, name, info, name in expected, parameters)
            if problem is not None:
                problems.append(problem)
    return problems


def check_outliers(
    checkpoint: Checkpoint, names: Mapping[str, str], description: Mapping[str, Any]
) -> list[Problem]:
    """Check that row starts and columns of sparse outliers are those of their weights.

    Args:
        checkpoint: the export.
        names: name in the file → name in the model.
        description: the manifest, by names of the model.
    """
    files = {names.get(info.name, info.name): info for info in checkpoint}
    problems = []
    for module, entry in description["modules"].items():
        fmt = Format(entry["format"]) if "format" in entry else None
        if fmt is None or fmt.outliers == 0:
            continue
        name, shape = f"{module}.weight".removeprefix("."), tuple(entry["shape"])
        sizes = {suffix: size for suffix, _, size in fmt.buffers(shape)}
        found = {suffix: files.get(name + suffix) for suffix in OUTLIER_INDEX}
        if any(info is None or info.shape != sizes[suffix] for suffix, info in found.items()):
            continue  # told by `check_tensors`
        stored = {suffix: checkpoint.read(info.name) for suffix, info in found.items() if info is not None}
        problem = outlier_problem(name, stored, fmt, (shape[0], shape[1]))
        if problem:
            tensor, _, rest = problem.partition(": ")
            what, _, expected = rest.partition(", expected ")
            problems.append(Problem(tensor, what, expected))
    return problems


def _same_kind(found: torch.dtype, expected: torch.dtype) -> bool:
    # A model may be stored in another float dtype than its class would choose; packed integers must be exact.
    return found == expected or (found.is_floating_point and expected.is_floating_point)


def _check_values(
    checkpoint: Checkpoint, name: str, info: TensorInfo, known: bool, parameters: set[str] | None
) -> Problem | None:
    tensor = checkpoint.read(info.name)
    what = "finite values"
    if name.endswith(OUTLIER_INDEX):
        return None  # integers that mean themselves: `check_outliers`
    if tensor.dtype in (torch.int16, torch.int32) and known and ".weight_" in f".{name.rpartition('.')[2]}":
        # Scales, zeros and codebooks are stored as the bits of floats.
        tensor = tensor.view(torch.float16 if tensor.dtype == torch.int16 else torch.float32)
        what = f"finite values in these bits of {str(tensor.dtype).removeprefix('torch.')}"
    elif not tensor.is_floating_point():
        return None
    if tensor.itemsize == 1:
        tensor = tensor.to(torch.float32)
    strict = parameters is None or name in parameters or info.torch_dtype != tensor.dtype
    bad = ~torch.isfinite(tensor) if strict else torch.isnan(tensor)
    count = int(bad.sum())
    if count == 0:
        return None
    first = int(bad.reshape(-1).nonzero()[0])
    value = float(tensor.reshape(-1)[first])
    return Problem(
        name, f"{count} of {tensor.numel()} values NaN or Inf (the first, {value}, at {first})", what
    )


def check_ratio(
    result: Verification, infos: Mapping[str, TensorInfo], description: Mapping[str, Any], files: int
) -> None:
    """Recompute bytes by class, and add a problem where they are too many for what the formats promise.

    Args:
        result: where ratios and problems go.
        infos: headers, by names of the model.
        description: the manifest.
        files: bytes of all weight files on disk.
    """
    result.summary = summarize(infos, description)
    promised: dict[str, int] = {}
    for entry in description["modules"].values():
        if "format" in entry:
            size = Format(entry["format"]).nbytes(tuple(entry["shape"]))
            promised[entry["kind"]] = promised.get(entry["kind"], 0) + int(size)
    rest = 0
    for row in result.summary.rows:
        if row.name in promised:
            _judge(result, row.name, row.before, promised[row.name], row.disk)
        else:
            rest += row.disk
    before = result.summary.total.before
    if before:
        _judge(result, "whole model", before, sum(promised.values()) + rest, files)


def _judge(result: Verification, name: str, before: int, promised: int, real: int) -> None:
    result.promised[name] = before / promised if promised else math.inf
    result.real[name] = before / real if real else math.inf
    if result.real[name] < MIN_SHARE_OF_PROMISE * result.promised[name]:
        found = f"{real:,} bytes, a ratio of {result.real[name]:.2f}"
        share = f"at least {MIN_SHARE_OF_PROMISE:.0%} of it"
        expected = f"{promised:,} bytes, a ratio of {result.promised[name]:.2f} ({share})"
        result.problems.append(Problem(name, found, expected))


def weight_file_bytes(path: Path) -> int:
    """Bytes of everything at `path` that holds weights, in whatever format."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in {file for pattern in _STRAY for file in path.glob(pattern)})


def verify_file(path: Path, checkpoint: Checkpoint, description: Mapping[str, Any]) -> Verification:
    """Check a plain torch file: its packed tensors, all values, and the bytes."""
    result = Verification(path, summarize(checkpoint.tensors, description))
    result.problems += check_tensors(checkpoint, {}, expected_packed(description))
    result.problems += check_outliers(checkpoint, {}, description)
    check_ratio(result, checkpoint.tensors, description, weight_file_bytes(path))
    result.notes.append("a plain torch file: it has no model class to load it into, so nothing was run")
    return result
