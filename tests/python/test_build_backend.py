"""The build backend finds the torch to compile against, and asks for one only where there is none."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def backend(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "bitfold_build", ROOT / "build_backend" / "bitfold_build.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("BITFOLD_TORCH_DIR", raising=False)
    monkeypatch.chdir(ROOT)  # where a frontend calls it: pyproject.toml is read from there
    return module


def make_torch(site: Path, version: str = "2.13.0+cpu", *, stable: bool = True) -> Path:
    folder = site / "torch"
    header = folder / "include/torch/csrc/stable/library.h"
    (header.parent if stable else folder).mkdir(parents=True)
    if stable:
        header.touch()
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
    )
    return folder


@pytest.fixture
def environment(backend, monkeypatch, tmp_path):
    """An environment whose site-packages is tmp_path/site, seen from an isolated build."""
    prefixes = {name: str(tmp_path) for name in ("prefix", "base_prefix", "base_exec_prefix")}
    monkeypatch.setattr(backend, "sys", SimpleNamespace(path=[], **prefixes))
    site = str(tmp_path / "site")
    monkeypatch.setattr(backend, "sysconfig", SimpleNamespace(get_path=lambda key, vars=None: site))
    return tmp_path / "site"


def test_torch_of_the_target_environment_is_found(backend, environment):
    folder = make_torch(environment)
    assert backend.find_torch() == folder
    assert "torch>=2.11" not in backend.get_requires_for_build_wheel()
    assert "torch>=2.11" not in backend.get_requires_for_build_editable()


def test_torch_is_required_only_where_there_is_none(backend, environment):
    assert backend.find_torch() is None
    assert "torch>=2.11" in backend.get_requires_for_build_wheel()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.1", "2.9.0+cu128", "unknown"])
def test_older_torch_is_passed_over(backend, environment, version):
    make_torch(environment, version)
    assert backend.find_torch() is None


@pytest.mark.parametrize("version", ["2.11.0", "2.15.0+cu132", "2.20.0a0+git1234", "3.0.0"])
def test_newer_torch_is_taken(backend, environment, version):
    assert backend.find_torch() is None
    assert make_torch(environment, version) == backend.find_torch()


def test_torch_without_headers_is_passed_over(backend, environment):
    make_torch(environment, stable=False)
    assert backend.find_torch() is None


def test_named_folder_goes_first(backend, environment, monkeypatch, tmp_path):
    make_torch(environment)
    other = make_torch(tmp_path / "other")
    monkeypatch.setenv("BITFOLD_TORCH_DIR", str(other))
    assert backend.find_torch() == other


def test_named_folder_must_be_torch(backend, environment, monkeypatch, tmp_path):
    make_torch(environment)
    monkeypatch.setenv("BITFOLD_TORCH_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"BITFOLD_TORCH_DIR=.* is not the folder of an installed torch"):
        backend.find_torch()


def test_folder_is_handed_to_cmake(backend, environment, monkeypatch, tmp_path):
    folder = make_torch(environment)
    handed = {}
    monkeypatch.setattr(
        backend._skbuild, "build_wheel", lambda *args: handed.update(settings=args[1]) or "x.whl"
    )
    assert backend.build_wheel(str(tmp_path), {"build.verbose": "true"}) == "x.whl"
    assert handed["settings"] == {"build.verbose": "true", "cmake.define.BITFOLD_TORCH_DIR": str(folder)}


def test_virtual_environment_that_sees_system_packages(backend, environment, monkeypatch, tmp_path):
    system = make_torch(tmp_path / "system")
    monkeypatch.setattr(
        backend,
        "sysconfig",
        SimpleNamespace(get_path=lambda key, vars=None: str(tmp_path / ("system" if vars else "site"))),
    )
    assert backend.find_torch() is None
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert backend.find_torch() == system
