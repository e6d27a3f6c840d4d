"""`bitfold verify` for directories that transformers reads: tensors, bytes, a fresh load, a comparison with
the source.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bitfold import manifest, ops
from bitfold.errors import PackedDataError
from bitfold.formats import Format
from bitfold.hf import checkpoint_keys, meta_model
from bitfold.hf.probe import NOT_RUN
from bitfold.inspecting import read_manifest, summarize
from bitfold.io.safetensors_file import SafetensorsFile
from bitfold.io.safetensors_writer import TensorSpec
from bitfold.io.shards import Checkpoint
from bitfold.verifying import (
    Problem,
    Verification,
    check_outliers,
    check_ratio,
    check_tensors,
    expected_packed,
    verify_file,
    weight_file_bytes,
)

__all__ = ["verify"]

# A fold of the right weights explains most of them even at 2 bits; one of other weights explains nothing
# (error 1.4).
MAX_WEIGHT_ERROR = 0.9


def verify(
    path: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    min_cosine: float | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Check an export in every way that is known.

    Args:
        path: a folded directory, or a plain file written by `bitfold.save`.
        against: the float checkpoint it was made from, to compare weights and outputs with.
        min_cosine: fail where the outputs' cosine to the source's is below this.
        trust_remote_code: run Python files that came with the checkpoint.

    Returns:
        What was found; `passed` says whether all is well.

    Raises:
        PackedDataError: so damaged that it cannot be opened, or not folded at all.
        FileNotFoundError: nothing is there.
        ValueError: a plain file cannot be compared with a source.
    """
    path = Path(path)
    with Checkpoint(path) as checkpoint:
        description = read_manifest(path, checkpoint.metadata)
        if description is None:
            message = (
                f"{path}: is not folded by bitfold (no manifest in config.json or in the file's metadata)"
            )
            if path.is_file() and (path.parent / "config.json").is_file():
                message += f"; to verify the model that it is part of, give {path.parent}"
            raise PackedDataError(message)
        if path.is_file():
            if against is not None or min_cosine is not None:
                message = f"{path}: a plain torch file has no model class to run, so it cannot be compared"
                raise ValueError(message)
            return verify_file(path, checkpoint, description)
        result = Verification(path, summarize(checkpoint.tensors, description))
        names, unused = _check_against_class(result, checkpoint, description, trust_remote_code)
        # What the model has no place for was nothing before; in the files it is waste, of the class of the
        # module that it lies under if there is one.
        folded = description["modules"]
        waste = {name for name in unused if name.rpartition(".")[0] not in folded}
        infos = {names.get(info.name, info.name): info for info in checkpoint if info.name not in waste}
        check_ratio(result, infos, description, weight_file_bytes(path))
        if against is not None and result.passed:
            _compare_weights(result, checkpoint, names, description, Path(against), trust_remote_code)
    if result.passed:
        _run(result, None if against is None else Path(against), min_cosine, trust_remote_code)
    else:
        result.notes.append("the model was not loaded, because of the problems found before")
    return result


def _check_against_class(
    result: Verification, checkpoint: Checkpoint, description: dict[str, Any], trust_remote_code: bool
) -> tuple[dict[str, str], list[str]]:
    """Check every tensor that the model's class expects.

    Returns:
        Name in the file → name in the model; and names in the file for which the model has no place.
    """
    model, dtype = meta_model.build(result.path, torch.float32, trust_remote_code)
    groups = meta_model.tied_groups(model)
    manifest.prepare(model, description)
    groups += meta_model.tied_groups(model)
    expected = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    units, unused = checkpoint_keys.plan_units(model, checkpoint.tensors)
    names: dict[str, str] = {}
    converted: set[str] = set()
    for unit in units:
        realized = unit.realize(lambda key: torch.empty(checkpoint.tensors[key].shape, device="meta"))
        if len(unit.sources) == len(realized) == 1:
            names[unit.sources[0]] = next(iter(realized))
        else:  # split or merged while loading: checked here, since the file has other tensors
            converted |= set(realized)
            for name, tensor in realized.items():
                if name in expected and tuple(tensor.shape) != expected[name].shape:
                    result.problems.append(Problem(name, str(list(tensor.shape)), str(expected[name])))
    stored = set(names.values()) | converted
    for group in groups:
        if stored & group:
            stored |= group
    for name in set(expected) & (stored - set(names.values())):
        del expected[name]  # tied to another one, or converted and checked above
    expected |= {name: spec for name, spec in expected_packed(description).items() if name not in expected}
    parameters = {name for name, _ in model.named_parameters()}
    result.problems += check_tensors(checkpoint, names, expected, parameters)
    result.problems += check_outliers(checkpoint, names, description)
    if unused:
        result.notes.append(
            f"{len(unused)} tensors for which the model has no place: {', '.join(unused[:5])}"
        )
    result.notes.append(f"class {type(model).__name__}, {str(dtype).removeprefix('torch.')}")
    return names, unused


def _compare_weights(
    result: Verification,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    description: Mapping[str, Any],
    source: Path,
    trust_remote_code: bool,
) -> None:
    """Relative error of every folded matrix to the source's, one matrix in memory at a time."""
    files = {model_name: file_name for file_name, model_name in names.items()}
    errors: dict[str, float] = {}
    with Checkpoint(source) as original:
        model, _ = meta_model.build(source, torch.float32, trust_remote_code)
        groups = meta_model.tied_groups(model)
        units, _ = checkpoint_keys.plan_units(model, original.tensors)
        for unit in units:
            for name, weight in unit.realize(original.read).items():
                tied = next((group for group in groups if name in group), {name})
                owner = _owner(tied, description["modules"])
                if owner is not None and owner not in errors:
                    entry = description["modules"][owner]
                    errors[owner] = _weight_error(checkpoint, files, owner, entry, weight)
    for owner, entry in description["modules"].items():
        if "format" in entry and owner not in errors:
            result.problems.append(
                Problem(f"{owner}.weight", "no such tensor in the source", "the float weight")
            )
    for owner, error in errors.items():
        if not error <= MAX_WEIGHT_ERROR:
            found = f"a relative error of {error:.3f} to the source's weight"
            result.problems.append(Problem(f"{owner}.weight", found, f"at most {MAX_WEIGHT_ERROR}"))
    if errors:
        worst = max(errors, key=lambda owner: errors[owner])
        result.comparison |= {
            "weight_error_mean": sum(errors.values()) / len(errors),
            "weight_error_worst": errors[worst],
            "weight_error_worst_name": f"{worst}.weight",
        }


def _owner(tied: set[str], modules: Mapping[str, Any]) -> str | None:
    """The folded module that keeps the matrix known under these names, if any."""
    candidates = (name.removesuffix(".weight") for name in tied if name.endswith(".weight"))
    return next((name for name in candidates if "format" in modules.get(name, {})), None)


def _weight_error(
    checkpoint: Checkpoint,
    files: Mapping[str, str],
    owner: str,
    entry: Mapping[str, Any],
    weight: torch.Tensor,
) -> float:
    """‖W − Ŵ‖ / ‖W‖."""
    shape = (int(entry["shape"][0]), int(entry["shape"][1]))
    matrix = (weight.t() if entry["kind"] == "conv1d" else weight).float()
    if tuple(matrix.shape) != shape:
        return float("inf")
    fmt = Format(entry["format"])
    keys = [f"{owner}.weight{suffix}" for suffix, _, _ in fmt.buffers(shape)]
    unfolded = ops.dequantize([checkpoint.read(files.get(key, key)) for key in keys], fmt, shape)
    norm = float(matrix.norm())
    error = float(unfolded.sub_(matrix).norm())
    return error / norm if norm else error


def _run(
    result: Verification, against: Path | None, min_cosine: float | None, trust_remote_code: bool
) -> None:
    """Load and run export and source, each in a process of its own, and compare what they say."""
    with tempfile.TemporaryDirectory(prefix="bitfold-verify-") as scratch:
        inputs = Path(scratch, "inputs.safetensors")
        ours = _probe(result, result.path, inputs, Path(scratch, "export.safetensors"), trust_remote_code)
        if ours is None:
            return
        kind, outputs, facts = ours
        result.comparison |= {"outputs": kind, "load_seconds": facts["load_seconds"]}
        result.comparison |= {"run_seconds": facts["run_seconds"], "resident_bytes": facts["resident_bytes"]}
        bad = int((~torch.isfinite(outputs)).sum())
        if bad:
            found = f"{bad} of {outputs.numel()} values NaN or Inf"
            result.problems.append(Problem(f"{kind} of the loaded model", found, "finite values"))
        if against is None:
            return
        theirs = _probe(result, against, inputs, Path(scratch, "source.safetensors"), trust_remote_code)
    if theirs is not None and not bad:
        _compare_outputs(result, kind, outputs, theirs[1], theirs[2], min_cosine)


def _probe(
    result: Verification, directory: Path, inputs: Path, outputs: Path, trust_remote_code: bool
) -> tuple[str, torch.Tensor, dict[str, Any]] | None:
    command = [sys.executable, "-m", "bitfold.hf.probe", str(directory), "--inputs", str(inputs)]
    command += ["--outputs", str(outputs)] + ["--trust-remote-code"] * trust_remote_code
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = lines[-1][:600] if lines else "no message"
        if "inputs can be made for" in reason:
            result.notes.append(f"loaded but not run: {reason}")
        else:
            verb = (
                "loaded, but failed to run"
                if done.returncode == NOT_RUN
                else f"exit status {done.returncode}"
            )
            where = f"{directory} in a fresh process"
            result.problems.append(Problem(where, f"{verb}: {reason}", "a model that loads and runs"))
        return None
    with SafetensorsFile(outputs) as file:
        facts = json.loads(file.metadata["facts"])
        return facts["kind"], file.read(facts["kind"]), facts


def _compare_outputs(
    result: Verification,
    kind: str,
    ours: torch.Tensor,
    theirs: torch.Tensor,
    facts: Mapping[str, Any],
    min_cosine: float | None,
) -> None:
    if ours.shape != theirs.shape:
        found, expected = str(list(ours.shape)), f"{list(theirs.shape)} as from the source"
        result.problems.append(Problem(f"{kind} of the loaded model", found, expected))
        return
    a, b = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
    if not bool(torch.isfinite(b).all()):
        result.notes.append(f"the source's own {kind} are not finite; nothing was compared")
        return
    cosines = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
    result.comparison |= {
        "cosine_mean": float(cosines.mean()),
        "cosine_worst": float(cosines.min()),
        "source_resident_bytes": facts["resident_bytes"],
        "source_run_seconds": facts["run_seconds"],
    }
    if kind == "logits":
        result.comparison["same_top_choice"] = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    mean = result.comparison["cosine_mean"]
    if min_cosine is not None and mean < min_cosine:
        found = f"a mean cosine of {mean:.4f} to the source's"
        result.problems.append(Problem(f"{kind} of the loaded model", found, f"at least {min_cosine}"))
