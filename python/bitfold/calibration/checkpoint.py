"""State on disk after each stage, so that a run that died goes on where it was.

A directory holds

    fingerprint.json             what the run was started with; another run is refused
    stage-0003.safetensors       the packed matrices of stage 3, and their lines of the report
    stream-0003-0.safetensors    what the blocks finished last returned, of rank 0's share of the data

Each file appears whole or not at all. A stage counts once its packed file is there, which is written after
the streams; the streams of the stage before go last. There is no state of random generators: each matrix
seeds its own.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bitfold.calibration.fingerprint import differences
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
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: DirectoryLock | None = None
        try:
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

    def save(
        self,
        number: int,
        solutions: dict[str, Solution],
        lines: list[dict[str, Any]],
        changed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the packed matrices of stage `number`, and other changed values: from here on it counts."""
        tensors = {f"{name}:value": tensor for name, tensor in (changed or {}).items()}
        for name, solution in solutions.items():
            tensors |= {f"{name}:{i}": tensor for i, tensor in enumerate(solution.packed)}
            if solution.bias_shift is not None:
                tensors[f"{name}:shift"] = solution.bias_shift
        metadata = {"lines": json.dumps(lines), "names": json.dumps(list(solutions))}
        with self._told(f"stage {number}"):
            _write(self._stage(number), tensors, metadata)

    def load(self, number: int) -> tuple[dict[str, Solution], list[dict[str, Any]], dict[str, Tensor]]:
        """The packed matrices, report lines and other changed parameters of stage `number`."""
        path = self._stage(number)
        try:
            with SafetensorsFile(path) as file:
                names = json.loads(file.metadata["names"])
                lines = json.loads(file.metadata["lines"])
                solutions = {}
                for name in names:
                    parts = sorted(
                        int(found.rpartition(":")[2])
                        for found in file.tensors
                        if found.rpartition(":")[0] == name and found.rpartition(":")[2].isdigit()
                    )
                    shift = f"{name}:shift"
                    solutions[name] = Solution(
                        [file.read(f"{name}:{i}") for i in parts],
                        {},
                        file.read(shift) if shift in file.tensors else None,
                    )
                changed = {
                    found.removesuffix(":value"): file.read(found)
                    for found in file.tensors
                    if found.endswith(":value")
                }
                return solutions, lines, changed
        except (PackedDataError, KeyError, ValueError) as error:
            msg = f"{path}: damaged ({error}); delete {self.path} to start anew"
            raise CheckpointError(msg) from error

    def save_streams(self, number: int, streams: dict[str, Stream]) -> None:
        """Write the cached outputs of this rank, unless a block returns objects that are no data.

        Without them, going on runs the finished blocks again.
        """
        tensors: dict[str, Tensor] = {}
        trees: dict[str, str] = {}
        for kind, stream in streams.items():
            for block, outputs in stream.outputs.items():
                for batch, tree in enumerate(outputs):
                    leaves, spec = pytree.tree_flatten(tree)
                    try:
                        structure = pytree.treespec_dumps(spec)
                    except NotImplementedError:  # a class of the model's own, such as a namedtuple
                        return
                    path = f"{kind}:{block}:{batch}"
                    plain: list[Any] = []
                    for i, leaf in enumerate(leaves):
                        if isinstance(leaf, Tensor):
                            tensors[f"{path}:{i}"] = leaf
                            plain.append("tensor")
                        elif leaf is None or isinstance(leaf, int | float):
                            plain.append([leaf])
                        else:
                            return
                    trees[path] = json.dumps([structure, plain])
        with self._told(f"the stream of stage {number}"):
            _write(self._stream(number), tensors, trees)

    def load_streams(self, number: int, streams: dict[str, Stream]) -> bool:
        """Fill `streams`; False where they are not there or not readable."""
        filled: dict[str, dict[str, dict[int, Any]]] = {kind: {} for kind in streams}
        try:
            with SafetensorsFile(self._stream(number)) as file:
                for path, text in file.metadata.items():  # in any order
                    kind, _, place = path.partition(":")
                    block, _, batch = place.rpartition(":")
                    spec, plain = json.loads(text)
                    leaves = [
                        file.read(f"{path}:{i}") if leaf == "tensor" else leaf[0]
                        for i, leaf in enumerate(plain)
                    ]
                    tree = pytree.tree_unflatten(leaves, pytree.treespec_loads(spec))
                    filled[kind].setdefault(block, {})[int(batch)] = tree
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
        shutil.rmtree(self.path, ignore_errors=True)

    def _stage(self, number: int) -> Path:
        return self.path / f"stage-{number:04}.safetensors"

    def _stream(self, number: int) -> Path:
        return self.path / f"stream-{number:04}-{self._rank}.safetensors"

    def _told(self, what: str) -> _Told:
        return _Told(self.path, what)


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    with atomic_file(path) as temporary, SafetensorsWriter(temporary, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


class _Told:
    """Words an OSError of writing a checkpoint: which part, what is kept, what to do."""

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, CheckpointError):
            return
        full = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            full = f"; {shutil.disk_usage(self._path).free:,} bytes are free there"
        msg = (
            f"checkpoint, {self._what}: {error.strerror or error}{full}. What was finished before is kept: "
            "make room and run again, or give checkpoint=<another directory> or checkpoint=False"
        )
        raise OSError(error.errno, msg, str(self._path)) from error
