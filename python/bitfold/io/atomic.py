"""Files and directories that appear whole or not at all.

Everything is written to a temporary sibling (same file system, so that the last step is one rename), flushed
to the disk, and renamed. Whatever happens in between, a Ctrl-C, an exception, `kill -9`, a power cut, the
path holds either what it held before or the complete new content.

A temporary is called ``.<name>.bitfold-<role>-<host>-<pid>-<random>``; role ``new`` is content being written,
role ``old`` a directory set aside while its successor takes its place. Those left by processes that died are
removed (or, for ``old`` without a successor, put back) the next time the same path is written or `recover` is
called.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_directory", "atomic_file", "recover"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What kernels and file systems answer that do not know renameat2 or one of its flags.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `path` when the block ends well.

    Args:
        path: the file to create or replace; its directory must exist. A symbolic link is followed.

    Yields:
        Path of the temporary. The block must create a file there.

    Raises:
        OSError: the file cannot be written or renamed. `path` is then as it was.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp()) / "a.txt"
        >>> with atomic_file(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    recover(target)
    temporary = _sibling(target, "new")
    mode = _mode_of_new_file(temporary)
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else mode)
        _fsync(temporary)
        temporary.replace(target)
    except BaseException:
        _remove(temporary)
        raise
    _fsync(target.parent)


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], overwrite: bool = True, marker: str | None = None
) -> Iterator[Path]:
    """Give a temporary empty directory to fill, which becomes `path` when the block ends well.

    A directory that is already there is replaced as a whole (nothing of it is merged into the new one). Where
    the system can exchange two names in one step (Linux, most file systems), there is no moment without a
    whole directory at `path`; elsewhere the old one is set aside for an instant and `recover` puts it back
    should the process die then.

    Args:
        path: the directory to create or replace; missing parents are created. A symbolic link is followed.
        overwrite: False refuses a directory that already has something in it.
        marker: a file by which a directory is known as one that may be replaced; one that has other things in
            it, but not this, is somebody's work and is refused. None replaces any.

    Yields:
        Path of the temporary directory.

    Raises:
        FileExistsError: `path` exists and is not empty, and `overwrite` is False or `marker` is not in it.
        NotADirectoryError: `path` is a file.
        OSError: writing or renaming failed. `path` is then as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    _check_replaceable(target, overwrite, marker)
    temporary = _sibling(target, "new")
    try:
        temporary.mkdir()
        yield temporary
        _fsync_tree(temporary)
        _check_replaceable(target, overwrite, marker)  # it may have appeared while the block ran
        _take_place(temporary, target)
    except BaseException:
        _remove(temporary)
        raise
    _fsync(target.parent)


def recover(path: str | os.PathLike[str]) -> bool:
    """Tidy up after processes that died while writing `path`; True where a set-aside directory was put
    back.
    """
    target = Path(os.path.realpath(path))
    pattern = re.compile(rf"\.{re.escape(_stem(target))}\.bitfold-(new|old)-{_host()}-(\d+)-[0-9a-f]+")
    restored = False
    try:
        siblings = sorted(target.parent.iterdir())
    except FileNotFoundError:
        return False
    for sibling in siblings:
        match = pattern.fullmatch(sibling.name)
        if match is None or _alive(int(match[2])):
            continue
        if match[1] == "old" and not target.exists():
            sibling.rename(target)
            restored = True
        else:
            _remove(sibling)
    return restored


def _mode_of_new_file(path: Path) -> int:
    """The permissions that an ordinary new file gets here. Writers such as safetensors make private ones."""
    path.touch(exist_ok=False)
    try:
        return stat.S_IMODE(path.stat().st_mode)
    finally:
        path.unlink()


def _check_replaceable(target: Path, overwrite: bool, marker: str | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "a directory is to be written here, but this is a file", str(target)
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            errno.EEXIST,
            "directory exists and is not empty; choose another or ask for overwriting",
            str(target),
        )
    if marker is not None and not (target / marker).exists():
        reason = f"has no {marker}, so it is no earlier export; it will not be overwritten, choose another"
        raise FileExistsError(errno.EEXIST, reason, str(target))


def _take_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, removing the directory that was there."""
    if not target.exists():
        temporary.rename(target)
        return
    shutil.copymode(target, temporary)
    if not any(target.iterdir()):
        temporary.rename(target)  # POSIX lets a directory replace an empty one
        return
    if _exchange(temporary, target):
        _remove(temporary)  # this name holds the old directory now; if we die here, it is a stale temporary
        return
    aside = _sibling(target, "old")
    target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    _remove(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _stem(target: Path) -> str:
    # Keeps the whole name within 255 bytes, even where a character takes three.
    name = target.name
    return name if len(name) <= 60 else name[:40] + hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def _host() -> str:
    # A process number means something on its own machine only; shared file systems show temporaries of
    # others.
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _sibling(target: Path, role: str) -> Path:
    name = f".{_stem(target)}.bitfold-{role}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return target.with_name(name)


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it exists and belongs to somebody else
    return True


def _remove(path: Path) -> None:
    try:
        is_directory = stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if is_directory:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot flush a directory; the rename itself is still
        # atomic.
        if error.errno not in (*_UNSUPPORTED, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            file = Path(directory, name)
            if not file.is_symlink():
                _fsync(file)
        _fsync(Path(directory))
