"""One process at a time in a directory, until it lets go or dies."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from bitfold.io import locking
from bitfold.io.locking import DirectoryLock, HeldError, holder

HOLD = """
import sys
from bitfold.io.locking import DirectoryLock
lock = DirectoryLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_is_held_until_its_holder_dies(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        assert holder(tmp_path) == other.pid
        with pytest.raises(HeldError, match=f"process {other.pid} works in") as caught:
            DirectoryLock(tmp_path)
        assert caught.value.file.exists()
        assert len(list(tmp_path.iterdir())) == 1  # nothing of the one that was refused
    finally:
        other.kill()
        other.communicate()
    DirectoryLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_once_per_process(tmp_path):
    lock = DirectoryLock(tmp_path)
    with pytest.raises(HeldError, match=f"process {os.getpid()} works in"):
        DirectoryLock(tmp_path)
    lock.release()
    again = DirectoryLock(tmp_path)
    (tmp_path / "sub").mkdir()
    DirectoryLock(tmp_path / "sub").release()
    again.release()


def test_a_file_left_by_a_process_that_had_our_number_holds_nothing(tmp_path):
    lock = DirectoryLock(tmp_path)
    (left,) = tmp_path.iterdir()
    lock.release()
    left.touch()
    DirectoryLock(tmp_path).release()


def test_of_two_threads_one_gets_it(monkeypatch, tmp_path):
    """Also where both come before either has looked for others."""
    both, got = threading.Barrier(2), []

    def looking(directory):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return holder(directory)

    def take():
        try:
            got.append(DirectoryLock(tmp_path))
        except HeldError:
            got.append(None)

    monkeypatch.setattr(locking, "holder", looking)
    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (lock,) = (found for found in got if found is not None)
    lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_holds_nothing_of_its_parent(tmp_path):
    code = f"""
import os, sys
from bitfold.io.locking import DirectoryLock, HeldError
first = DirectoryLock({str(tmp_path / "own")!r})
child = os.fork()
if child == 0:
    first.release()  # not ours: does nothing
    try:
        DirectoryLock({str(tmp_path / "own")!r})
    except HeldError as error:
        os._exit(0 if error.pid == os.getppid() else 2)
    os._exit(1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    (tmp_path / "own").mkdir()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
