"""Atomic files and directories: failures, kills, fall-backs, leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bitfold.io import atomic
from bitfold.io.atomic import atomic_directory, atomic_file, recover


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_file_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), atomic_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_replacement_keeps_the_mode_and_follows_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.bin"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = tmp_path / "link.bin"
    link.symlink_to(target)
    with atomic_file(link) as temporary:
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.fixture(params=["exchange", "fallback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "fallback":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_directory_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_directory(target) as temporary:
            (temporary / text).write_text(text)
            (temporary / "sub").mkdir()
            (temporary / "sub" / "x").write_text(text)
        assert names(target) == sorted([text, "sub"])
        assert names(tmp_path) == ["out"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_directory_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(error), atomic_directory(target) as temporary:
        (temporary / "half").write_text("half")
        raise error
    assert names(target) == ["old"]
    assert names(tmp_path) == ["out"]


def test_marker_tells_what_may_be_replaced(tmp_path: Path) -> None:
    target = tmp_path / "home"
    target.mkdir()
    (target / "photo").write_text("precious")
    with pytest.raises(FileExistsError, match="no config"), atomic_directory(target, marker="config.json"):
        pytest.fail("the block must not run")
    assert names(target) == ["photo"]
    (target / "config.json").write_text("{}")
    with atomic_directory(target, marker="config.json") as temporary:
        (temporary / "a").write_text("a")
    assert names(target) == ["a"]


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_file(tmp_path / "out") as temporary:
        temporary.touch(mode=0o600)  # as safetensors does
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_overwrite_false_refuses_what_is_there_and_what_appears(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with atomic_directory(target, overwrite=False) as temporary:  # empty: nothing is lost
        (temporary / "a").write_text("a")
    with pytest.raises(FileExistsError, match="out"), atomic_directory(target, overwrite=False):
        pytest.fail("the block must not run")
    late = tmp_path / "late"
    with pytest.raises(FileExistsError), atomic_directory(late, overwrite=False) as temporary:
        late.mkdir()
        (late / "other").write_text("other")
    assert names(late) == ["other"]
    assert names(tmp_path) == ["late", "out"]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NotADirectoryError, match="out"), atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_very_long_names(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 120)
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("a")
    assert names(target) == ["a"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"
    stale = tmp_path / f".out.bitfold-new-{atomic._host()}-{dead_pid()}-0123abcd"
    alive = tmp_path / f".out.bitfold-new-{atomic._host()}-{os.getppid()}-0123abcd"
    elsewhere = tmp_path / f".out.bitfold-new-00000000-{dead_pid()}-0123abcd"
    for directory in (stale, alive, elsewhere):
        directory.mkdir()
        (directory / "x").write_text("x")
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("a")
    assert names(tmp_path) == sorted([alive.name, elsewhere.name, "out"])


def test_a_directory_set_aside_by_the_dead_is_put_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.bitfold-old-{atomic._host()}-{dead_pid()}-0123abcd"
    aside.mkdir()
    (aside / "precious").write_text("precious")
    assert recover(tmp_path / "out")
    assert names(tmp_path / "out") == ["precious"]
    assert not recover(tmp_path / "out")


KILLED = """
import os, signal, sys
from pathlib import Path
from bitfold.io import atomic
places = {"rename": Path, "replace": Path, "fsync": os}
real = {name: getattr(place, name) for name, place in places.items()}
left = int(sys.argv[2])
def step(name):
    def run(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments, **named)
    return run
for name, place in places.items():
    setattr(place, name, step(name))
if sys.argv[3] == "fallback":
    atomic._exchange = lambda a, b: False
remove = atomic._remove
def killed_in_removal(path):
    global left
    left -= 1
    if left < 0:
        next(iter(Path(path).iterdir())).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    remove(path)
atomic._remove = killed_in_removal
with atomic.atomic_directory(sys.argv[1]) as temporary:
    for name in ("a", "b"):
        (temporary / name).write_text("new")
"""


@pytest.mark.parametrize("way", ["exchange", "fallback"])
def test_kill_at_every_step_leaves_a_whole_directory(tmp_path: Path, way: str) -> None:
    killed = 0
    for steps in range(20):
        target = tmp_path / f"out{steps}"
        target.mkdir()
        for name in ("a", "b"):
            (target / name).write_text("old")
        package = str(Path(atomic.__file__).parents[2])
        code = textwrap.dedent(KILLED)
        done = subprocess.run(
            [sys.executable, "-c", code, str(target), str(steps), way],
            env={**os.environ, "PYTHONPATH": package},
            check=False,
        )
        if way == "exchange":
            assert target.exists()
        recover(target)
        contents = {(target / name).read_text() for name in ("a", "b")}
        assert contents in ({"old"}, {"new"}), f"torn after {steps} steps"
        assert names(target) == ["a", "b"]
        assert [n for n in names(tmp_path) if f"out{steps}.bitfold" in n] == []
        if done.returncode == 0:
            assert contents == {"new"}
            break
        assert done.returncode == -signal.SIGKILL
        killed += 1
    else:
        pytest.fail("never ran to the end")
    assert killed >= 5
