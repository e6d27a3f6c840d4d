"""One process at a time in a directory, until it lets go or dies."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
