"""State on disk after each stage, so that a run that died goes on where it was.

A directory holds

    fingerprint.json             what the run was started with; another run is refused
    stage-0003.safetensors       the packed matrices of stage 3, their lines of the report, a digest of it all
    stream-0003-0.safetensors    what the blocks finished last returned, of rank 0's share of the data

Each file appears whole or not at all. A stage counts once its packed file is there, which is written after
the streams; the streams of the stage before go last. There is no state of random generators: each matrix
seeds its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bitfold.calibration.fingerprint import differences, digest
from bitfold.calibration.streams import Stream
from bitfold.errors import BitfoldError, PackedDataError
from bitfold.io.atomic import atomic_file
from bitfold.io.locking import DirectoryLock, HeldError
from bitfold.io.safetensors_file import SafetensorsFile
from bitfold.io.safetensors_writer import SafetensorsWriter, TensorSpec
from bitfold.methods import Solution

MARK = "fingerprint.json"  # the file by which a directory is known as a checkpoint


class CheckpointError(BitfoldError, RuntimeError):
    """A checkpoint of another run, or a damaged one."""


@dataclass
class Finished:
    """A stage as it is stored.

    Args:
        solutions: its packed matrices, by name.
        lines: of the report.
        changed: other parameters that were changed, by name.
        known: what its preparation has left for later blocks: dicts and lists of tensors, numbers and texts.
    """

    solutions: dict[str, Solution]
    lines: list[dict[str, Any]]
    changed: dict[str, Tensor] = field(default_factory=dict)
    known: list[Any] = field(default_factory=list)


class Checkpoint:
    """The checkpoint directory of one run, which holds it until `close`.

    Args:
        directory: made if it is not there.
        fingerprint: of the run.
        rank: of this process; rank 0 writes what all have in common.

    Raises:
        CheckpointError: the directory holds another run (the message says what differs), or files that are
            none of ours, or another process works in it.
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: dict[str, Any], rank: int = 0) -> None:
        self.path = Path(directory)
        self._rank = rank
        self._lock: DirectoryLock | None = None
        try:
            with self._told("making its directory"):
                self.path.mkdir(parents=True, exist_ok=True)
                if rank == 0:
                    self._lock = DirectoryLock(self.path)
            self._check(fingerprint)
        except HeldError as error:
            msg = (
                f"{self.path}: process {error.pid} is at work on this checkpoint; wait for its end, or give "
                f"another checkpoint=… (if it is no run of bitfold, delete {error.file})"
            )
            raise CheckpointError(msg) from error
        except BaseException:
            self.close()
            raise

    def _check(self, fingerprint: dict[str, Any]) -> None:
        """Whether the directory is of this run; make it so if it is empty."""
        rank, mark = self._rank, self.path / MARK
        if not mark.exists():
            if rank == 0 and any(not file.name.startswith(".") for file in self.path.iterdir()):
                msg = (
                    f"{self.path}: has files but no fingerprint.json, so it is no checkpoint; choose another"
                )
                raise CheckpointError(msg)
            if rank == 0:
                with self._told("starting"), atomic_file(mark) as temporary:
                    temporary.write_text(json.dumps(fingerprint))
            return
        try:
            stored = json.loads(mark.read_text())
            if not isinstance(stored, dict):
                msg = f"expected a JSON object, found a {type(stored).__name__}"
                raise ValueError(msg)
        except ValueError as error:
            msg = f"{mark}: not readable ({error}); delete {self.path} to start anew"
            raise CheckpointError(msg) from error
        changed = differences(stored, fingerprint)
        if changed:
            msg = (
                f"{self.path}: this checkpoint is of another run; changed: {'; '.join(changed)}. "
                "Undo the change to go on with it, delete it to start anew, or give another checkpoint=…"
            )
            raise CheckpointError(msg)

    def close(self) -> None:
        """Let others work in the directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def finished(self) -> int:
        """How many stages are there, counted from the first."""
        count = 0
        while self._stage(count).exists():
            count += 1
        return count

    def save(self, number: int, finished: Finished) -> None:
        """Write stage `number`: from here on it counts."""
        tensors = {f"{name}:value": tensor for name, tensor in finished.changed.items()}
        for name, solution in finished.solutions.items():
            tensors |= {f"{name}:{i}": tensor for i, tensor in enumerate(solution.packed)}
            if solution.bias_shift is not None:
                tensors[f"{name}:shift"] = solution.bias_shift
        metadata = {"lines": json.dumps(finished.lines), "names": json.dumps(list(finished.solutions))}
        if finished.known:
            metadata["known"] = _flatten("known", finished.known, tensors)
        with self._told(f"stage {number}"):
            _write(self._stage(number), tensors, metadata)

    def load(self, number: int) -> Finished:
        """What `save` wrote of stage `number`."""
        path = self._stage(number)
        try:
            tensors, metadata = _read(path)
            found = Finished({}, json.loads(metadata["lines"]))
            if "known" in metadata:
                found.known = _unflatten("known", metadata["known"], tensors)
            for name in json.loads(metadata["names"]):
                parts = sorted(
                    int(place)
                    for owner, _, place in (key.rpartition(":") for key in tensors)
                    if owner == name and place.isdigit()
                )
                packed = [tensors[f"{name}:{i}"] for i in parts]
                found.solutions[name] = Solution(packed, {}, tensors.get(f"{name}:shift"))
            found.changed = {
                key.removesuffix(":value"): tensor
                for key, tensor in tensors.items()
                if key.endswith(":value")
            }
        except (PackedDataError, KeyError, ValueError) as error:
            msg = f"{path}: damaged ({error}); delete {self.path} to start anew"
            raise CheckpointError(msg) from error
        return found

    def save_streams(self, number: int, streams: dict[str, Stream]) -> None:
        """Write the cached outputs of this rank, unless a block returns objects that are no data.

        Without them, going on runs the finished blocks again.
        """
        tensors: dict[str, Tensor] = {}
        trees: dict[str, str] = {}
        try:
            for kind, stream in streams.items():
                for block, outputs in stream.outputs.items():
                    for batch, tree in enumerate(outputs):
                        path = f"{kind}:{block}:{batch}"
                        trees[path] = _flatten(path, tree, tensors)
        except NotImplementedError:
            return
        with self._told(f"the stream of stage {number}"):
            _write(self._stream(number), tensors, trees)

    def load_streams(self, number: int, streams: dict[str, Stream]) -> bool:
        """Fill `streams`; False where they are not there or not readable."""
        filled: dict[str, dict[str, dict[int, Any]]] = {kind: {} for kind in streams}
        try:
            tensors, trees = _read(self._stream(number))
            for path, text in trees.items():  # in any order
                kind, _, place = path.partition(":")
                block, _, batch = place.rpartition(":")
                filled[kind].setdefault(block, {})[int(batch)] = _unflatten(path, text, tensors)
        except (OSError, PackedDataError, KeyError, ValueError):
            return False
        for kind, stream in streams.items():
            if any(sorted(outputs) != list(range(stream.count)) for outputs in filled[kind].values()):
                return False
        for kind, stream in streams.items():
            stream.outputs = {
                block: [outputs[batch] for batch in range(stream.count)]
                for block, outputs in filled[kind].items()
            }
        return True

    def start_over(self) -> None:
        """Delete all stages, the last first, so that those that are left are always whole."""
        for number in reversed(range(self.finished())):
            self._stage(number).unlink()
            self.forget_streams(number)

    def forget_streams(self, number: int) -> None:
        """Delete the streams of stage `number`, which a later one has replaced."""
        self._stream(number).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the checkpoint: the run is done."""
        remove_directory(self.path)

    def _stage(self, number: int) -> Path:
        return self.path / f"stage-{number:04}.safetensors"

    def _stream(self, number: int) -> Path:
        return self.path / f"stream-{number:04}-{self._rank}.safetensors"

    def _told(self, what: str) -> _Told:
        return _Told(self.path, what)


def remove_directory(path: Path) -> None:
    """Delete a checkpoint; whatever a kill leaves of it is a checkpoint still, or an empty directory."""
    with contextlib.suppress(OSError):
        # Stages from the last to the first: those that are left are always whole.
        for file in sorted(path.iterdir(), reverse=True):
            if file.name != MARK and not file.name.startswith("."):
                file.unlink()
        (path / MARK).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _flatten(path: str, tree: Any, tensors: dict[str, Tensor]) -> str:
    """`tree` as JSON, its tensors put into `tensors`; NotImplementedError where it holds what is no data."""
    leaves, spec = pytree.tree_flatten(tree)
    structure = pytree.treespec_dumps(spec)  # not of a class of the model's own, such as a namedtuple
    plain: list[Any] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            tensors[f"{path}:{i}"] = leaf
            plain.append("tensor")
        elif leaf is None or isinstance(leaf, int | float | str):
            plain.append([leaf])
        else:
            raise NotImplementedError(type(leaf).__name__)
    return json.dumps([structure, plain])


def _unflatten(path: str, text: str, tensors: Mapping[str, Tensor]) -> Any:
    structure, plain = json.loads(text)
    leaves = [tensors[f"{path}:{i}"] if leaf == "tensor" else leaf[0] for i, leaf in enumerate(plain)]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(structure))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    metadata = {**metadata, "digest": _digest(tensors, metadata)}
    with atomic_file(path) as temporary, SafetensorsWriter(temporary, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `_write` wrote; ValueError where a byte of it has changed."""
    with SafetensorsFile(path) as file:
        tensors = {name: file.read(name) for name in file.tensors}
        metadata = dict(file.metadata)
    if metadata.pop("digest") != _digest(tensors, metadata):
        msg = "its bytes are not those that were written"
        raise ValueError(msg)
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    words = {name: text for name, text in metadata.items() if name != "digest"}
    whole = [sorted(words.items()), sorted((name, digest(tensor)) for name, tensor in tensors.items())]
    return hashlib.blake2b(json.dumps(whole).encode(), digest_size=16).hexdigest()


class _Told:
    """Words an OSError of writing a checkpoint: which part, what is kept, what to do."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, CheckpointError):
            return
        if not self._path.is_dir():
            msg = (
                f"checkpoint, {self._what}: {error.strerror or error}. "
                "Give checkpoint=<another directory>, or checkpoint=False to keep none"
            )
            raise OSError(error.errno, msg, str(self._path)) from error
        full = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"; {shutil.disk_usage(self._path).free:,} bytes are free there"
        msg = (
            f"checkpoint, {self._what}: {error.strerror or error}{full}. What was finished before is kept: "
            "make room and run again, or give checkpoint=<another directory> or checkpoint=False"
        )
        raise OSError(error.errno, msg, str(self._path)) from error
