"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitfold import _C
from bitfold.formats import codes

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cc", ".inc", ".cu", ".cuh"))

# Folder of csrc: folders whose headers it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "solvers": {"core", "cpu", "cuda", "solvers"},
    "cuda": {"core", "cuda"},
    "torch": {"core", "cpu", "cuda", "solvers", "torch"},
    "python": {"core", "cpu"},
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


def folder(path: Path) -> str:
    return path.relative_to(ROOT / "csrc").parts[0]


def test_only_the_bindings_see_torch_and_python() -> None:
    assert SOURCES
    for path in SOURCES:
        for header in includes(path):
            if re.match(r"(torch/(csrc|headeronly|extension)|ATen/|c10/)", header):
                assert folder(path) == "torch", f"{path} includes {header}"
            if header.startswith(("pybind11/", "Python.h")):
                assert folder(path) == "python", f"{path} includes {header}"
            if header in ("omp.h", "thread", "iostream"):
                pytest.fail(f"{path} includes {header}: threads and printing are the caller's")


def test_folders_depend_downward_only() -> None:
    folders = {p.name for p in (ROOT / "csrc").iterdir() if p.is_dir()}
    for path in SOURCES:
        for header in includes(path):
            target = header.split("/")[0]
            if target in folders and (ROOT / "csrc" / header).exists():
                assert target in MAY_INCLUDE[folder(path)], f"{path} includes {header}"


def imported(path: Path) -> set[str]:
    """First names below `bitfold` that a file imports, in functions too, but not for annotations."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "bitfold":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bitfold."):
            found.add(str(node.module).split(".")[1])
        waiting += ast.iter_child_nodes(node)
    return found


def test_python_depends_downward_only() -> None:
    """In the order of the list in docs/architecture.md, which names everything there is."""
    layers: dict[str, int] = {}
    text = (ROOT / "docs" / "architecture.md").read_text()
    for number, line in enumerate(re.findall(r"^python/bitfold/(.*)$", text, re.M)):
        names = re.split(r"\s{2,}", line)[0]
        layers |= dict.fromkeys(re.findall(r"(\w+)(?:\.py|/)(?=\s|$)", names), number)
    package = ROOT / "python" / "bitfold"
    parts = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    parts -= {"__init__", "__main__"}
    assert parts == set(layers)
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        for other in imported(path) & parts if own in parts else ():
            assert layers[own] <= layers[other], f"{path} imports {other}"


def test_wide_targets_include_no_standard_containers() -> None:
    allowed = {"cstdint", "cstring", "immintrin.h"}
    for path in (ROOT / "csrc" / "cpu").rglob("*"):
        if path.parent.name in ("kernels", "vec", "targets"):
            system = {h for h in includes(path) if not (ROOT / "csrc" / h).exists()}
            assert system <= allowed, f"{path}: {system - allowed}"
            assert "std::" not in re.sub(r"//.*", "", path.read_text()), path


def wide_objects() -> list[Path]:
    wide = ("avx2", "avx512", "avx512vnni", "amx")
    return sorted(p for isa in wide for p in (ROOT / "build").glob(f"*/**/targets/{isa}.cc.o"))


@pytest.mark.parametrize("build", sorted({p.relative_to(ROOT).parts[1] for p in wide_objects()}) or ["none"])
def test_wide_targets_define_no_symbol_outside_their_namespace(build: str) -> None:
    if build in ("none", "sanitize"):
        pytest.skip("no optimized objects here")
    for path in wide_objects():
        if path.relative_to(ROOT).parts[1] != build:
            continue
        listed = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", path], capture_output=True, text=True, check=True
        )
        isa = path.name.split(".")[0]
        for line in listed.stdout.splitlines():
            assert f"bitfold::{isa}::" in line, f"{path}: {line}"


def modules_after(statement: str) -> set[str]:
    code = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_bitfold_loads_torch_and_numpy_only() -> None:
    optional = {
        "transformers",
        "accelerate",
        "safetensors",
        "tqdm",
        "rich",
        "peft",
        "bitsandbytes",
        "matplotlib",
        "IPython",
    }
    loaded = modules_after("import bitfold, bitfold.ops, bitfold.formats")
    by_torch = modules_after("import torch, numpy")
    assert not (loaded & optional) - by_torch


def test_instruction_sets_are_best_first_with_portable_last() -> None:
    names = [name for name, _, _ in _C.instruction_sets()]
    assert names[-1] == "portable"
    assert _C.instruction_sets()[-1][2] is True
    assert len(names) == len(set(names))


def test_every_code_is_documented_and_tested() -> None:
    document = (ROOT / "docs" / "format.md").read_text()
    table = (ROOT / "csrc" / "core" / "format_table.inc").read_text()
    for code in codes():
        assert f"| `{code}` |" in document, f"docs/format.md lists no {code}"
        assert f'{{"{code}",' in table


def test_every_cpp_test_file_is_built() -> None:
    listed = (ROOT / "cmake" / "sources.cmake").read_text()
    for path in (ROOT / "tests" / "cpp").rglob("*_test.cc"):
        name = str(path.relative_to(ROOT / "tests" / "cpp")).removesuffix("_test.cc")
        assert re.search(rf"^\s+{name}$", listed, re.M), f"{name} is missing in cmake/sources.cmake"


def test_every_source_file_is_built() -> None:
    listed = (ROOT / "cmake" / "sources.cmake").read_text()
    for path in SOURCES:
        if path.suffix in (".cc", ".cu") and path.parent.name != "targets":
            assert str(path.relative_to(ROOT)) in listed, f"{path} is missing in cmake/sources.cmake"
