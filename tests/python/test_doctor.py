"""`bitfold doctor` must speak where nothing else of bitfold can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bitfold
from bitfold import doctor as doctor_module
from bitfold.doctor import Check, _ask, examine

PACKAGE = Path(bitfold.__file__).parent


def test_a_sound_installation() -> None:
    checks = {check.name: check for check in examine()}
    assert {check.status for check in checks.values()} <= {"ok", "warning"}
    assert "is used" in checks["instruction set"].detail
    assert checks["self-test"].status == "ok"


def test_no_question_ends_the_examination() -> None:
    def question() -> Check:
        message = "boom"
        raise KeyError(message)

    check = _ask("x", question)
    assert (check.status, "KeyError: 'boom'" in check.detail) == ("broken", True)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        ("4.56.2", "pip install 'transformers>=4.57'"),
        ("4.57.0", ""),
        ("5.24.1", ""),
        ("5.25.0.dev0", "pip install 'transformers==5.24.*'"),
        ("6.0.0", "newer than 5.24, the newest that bitfold was tested with"),
    ],
)
def test_versions_of_transformers(version: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_module, "_version", lambda package: version)
    check = doctor_module._transformers()
    assert check.status == ("warning" if advice else "ok")
    assert advice in check.advice


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its native libraries."""
    shutil.copytree(PACKAGE, tmp_path / "bitfold", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def doctor(directory: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "bitfold", "doctor", "--json"],
        env={**os.environ, "PYTHONPATH": str(directory), **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in result["checks"]}


def test_libraries_missing(copy: Path) -> None:
    status, checks = doctor(copy)
    assert status == 1
    assert checks["native files"]["status"] == "broken"
    assert "missing: _C" in checks["native files"]["advice"]
    assert checks["bitfold"]["status"] == "broken"
    assert checks["torch"]["status"] == "ok"
    assert checks["self-test"]["detail"].startswith("not examined")


def test_library_that_cannot_be_loaded(copy: Path) -> None:
    for library in PACKAGE.glob("_C*.so"):
        shutil.copy(library, copy / "bitfold")
    (copy / "bitfold" / "_ops.so").write_bytes(b"not a library")
    status, checks = doctor(copy)
    assert status == 1
    assert checks["_C"]["status"] == "ok"
    assert checks["_ops"]["status"] == "broken"
    assert "_ops.so" in checks["_ops"]["detail"]


def test_use_without_libraries_says_what_to_do(copy: Path) -> None:
    code = "import bitfold\nbitfold.quantize"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(copy)},
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ImportError: bitfold cannot be used" in done.stderr
    assert "bitfold doctor" in done.stderr


def test_impossible_instruction_set() -> None:
    status, checks = doctor(PACKAGE.parent, BITFOLD_ISA="abacus")
    assert status == 1
    assert "abacus" in checks["instruction set"]["detail"]
    assert "BITFOLD_ISA" in checks["instruction set"]["advice"]


def test_forced_instruction_set() -> None:
    status, checks = doctor(PACKAGE.parent, BITFOLD_ISA="portable")
    assert status == 0
    assert checks["instruction set"]["detail"].startswith("portable is used")
