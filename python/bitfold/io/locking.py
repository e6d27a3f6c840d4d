"""Who works in a directory, by a file that names the process; a process that died holds nothing.

A holder leaves ``.lock-<host>-<pid>`` there. Each process writes a file of its own and then looks for those
of others, so two that come at once may both be refused, but never both let in, and files of the dead can be
removed by anybody. Process numbers mean something on their own machine only: holders on others are not seen.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from bitfold.io.atomic import _alive, _host

__all__ = ["DirectoryLock", "HeldError", "holder"]

# What each process holds (a forked one inherits the entries of its parent, which are not its own): a file
# with its number may be of an earlier process.
_HERE: set[tuple[int, str]] = set()
_GUARD = threading.Lock()


class HeldError(RuntimeError):
    """Another process works in the directory, or another thread of this one."""

    def __init__(self, pid: int, file: Path) -> None:
        super().__init__(f"process {pid} works in {file.parent}; its lock is {file}")
        self.pid, self.file = pid, file


class DirectoryLock:
    """Holds a directory from its making to `release`, or to the death of the process.

    Args:
        directory: exists.

    Raises:
        HeldError: somebody else holds it.
        OSError: no file can be written there.

    Example:
        >>> import tempfile
        >>> lock = DirectoryLock(tempfile.mkdtemp())
        >>> lock.release()
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = Path(os.path.realpath(directory))
        self._file = path / f".lock-{_host()}-{os.getpid()}"
        self._place = (os.getpid(), str(path))
        with _GUARD:
            if self._place in _HERE:
                raise HeldError(os.getpid(), self._file)
            _HERE.add(self._place)
        try:
            self._file.touch()
            other = holder(path)
            if other is not None:
                raise HeldError(other, self._file.with_name(f".lock-{_host()}-{other}"))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go; the directory may be gone by now. A copy in a forked process holds nothing to let go of."""
        if self._place[0] == os.getpid():
            self._file.unlink(missing_ok=True)
            _HERE.discard(self._place)


def holder(directory: Path) -> int | None:
    """The number of another living process that holds `directory`; the locks of dead ones are removed."""
    pattern = re.compile(rf"\.lock-{_host()}-(\d+)")
    for file in sorted(directory.iterdir()):
        match = pattern.fullmatch(file.name)
        if match is None or int(match[1]) == os.getpid():
            continue
        if _alive(int(match[1])):
            return int(match[1])
        file.unlink(missing_ok=True)
    return None
