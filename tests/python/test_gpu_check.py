"""`scripts/gpu_check.sh` where there is no GPU: its steps, its deadline and what it says of them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="not run from a source tree"),
    pytest.mark.skipif(
        None in map(shutil.which, ("bash", "timeout", "tar")), reason="no bash, timeout or tar"
    ),
]

# A step ends as the variable of its name says.
PYTHON = """#!/usr/bin/env bash
echo "python $*" >>"$CALLS"
case "$*" in
  *"pip install"*) eval "${ON_BUILD:-}" ;;
  *"-m pytest"*) eval "${ON_TESTS:-}" ;;
  *sanitized*) eval "${ON_SANITIZED:-}" ;;
  *gpu.py*) printf 'a table\\n\\ngoals: 1 of 2 met\\nthe goals\\n'; eval "${ON_BENCH:-}" ;;
esac
"""
SANITIZER = """#!/usr/bin/env bash
echo "sanitizer $*" >>"$CALLS"
while [ "$1" != --target-processes ]; do shift; done
shift 2
exec "$@"
"""
Check = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Runs it on a machine of scripts: the exit status, the lines it prints, the calls it makes."""
    tools, tree, calls = tmp_path / "tools", tmp_path / "tree", tmp_path / "calls"
    for folder in (tools, tree / "scripts"):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, tree / "scripts")
    scripts = {
        "python": PYTHON,
        "compute-sanitizer": SANITIZER,
        "nvcc": "#!/bin/sh\n",
        "nvidia-smi": "#!/bin/sh\necho 9.0\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(**variables: str) -> tuple[int, list[str], list[str]]:
        calls.write_text("")
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            "CALLS": str(calls),
            "OUT": str(tmp_path / "out"),
            **variables,
        }
        command = ["bash", tree / "scripts" / "gpu_check.sh"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert not done.stderr
        return done.returncode, done.stdout.splitlines(), calls.read_text().splitlines()

    return run


def states(lines: list[str]) -> dict[str, str]:
    """What the summary says of each step."""
    rows = itertools.dropwhile(lambda line: not line.startswith("== summary"), lines)
    found = [line.split(maxsplit=2) for line in itertools.takewhile(bool, itertools.islice(rows, 1, None))]
    return {name: state for name, _, state in found}


def test_all_steps_and_the_goals_last(check: Check) -> None:
    status, lines, calls = check()
    assert status == 0
    assert states(lines) == dict.fromkeys(("build", "tests", "memcheck", "racecheck", "bench"), "ok")
    assert lines[-2:] == ["goals: 1 of 2 met", "the goals"]
    assert lines.count("the goals") == 1
    assert "a table" in lines
    assert [call.split()[2] for call in calls if call.startswith("sanitizer")] == ["memcheck", "racecheck"]
    assert any("architecture 90a-real" in line for line in lines)


def test_a_failed_step_fails_the_whole_but_keeps_none_from_running(check: Check) -> None:
    status, lines, _ = check(ON_TESTS="exit 3", ON_SANITIZED="exit 9")
    assert status == 1
    failed = {"tests": "FAILED (3)", "memcheck": "FAILED (9)", "racecheck": "FAILED (9)"}
    assert states(lines) == {"build": "ok", **failed, "bench": "ok"}


def test_nothing_follows_a_failed_build(check: Check) -> None:
    status, lines, calls = check(ON_BUILD="echo no such header; exit 1")
    assert status == 1
    assert "no such header" in lines
    assert len(calls) == 1


def test_one_deadline_for_all_steps(check: Check) -> None:
    status, lines, calls = check(BUDGET="2", ON_TESTS="sleep 60")
    assert status == 1
    found = states(lines)
    assert found["build"] == "ok"
    assert found["tests"] == "FAILED (124)"
    assert {found[name] for name in ("memcheck", "racecheck", "bench")} == {"FAILED (no time left of 2 s)"}
    assert not any("gpu.py" in call for call in calls)


def test_chosen_steps(check: Check) -> None:
    status, lines, calls = check(STEPS="tests bench")
    assert status == 0
    assert states(lines) == {"tests": "ok", "bench": "ok"}
    assert len(calls) == 2
    status, lines, calls = check(STEPS="tests benches")
    assert (status, calls) == (2, [])
    assert lines == [
        "STEPS: there is no step benches; there are: build wheels tests memcheck racecheck bench"
    ]
