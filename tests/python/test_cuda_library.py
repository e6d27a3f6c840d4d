"""`_ops_cuda`: what it asks of the loader, and when it is loaded. No GPU is needed here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bitfold import _C, cuda, ops

LIBRARY = Path(cuda.__file__).with_name("_ops_cuda.so")
built = pytest.mark.skipif(not LIBRARY.exists(), reason="bitfold was built without nvcc")


def readelf(*arguments: str) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf here (binutils)")
    command = ["readelf", "--wide", *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@built
def test_names_the_library_that_torch_has_cuda_in() -> None:
    """Without it the loader would bring in nothing that defines the stream's functions."""
    dynamic = readelf("--dynamic")
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch_cuda.so", "libtorch_cpu.so"} <= needed
    # The CUDA runtime is inside, the driver is looked for when a GPU is used.
    assert not {name for name in needed if name.startswith(("libcudart", "libcuda.", "libcublas"))}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@built
def test_gives_away_no_symbol_of_its_cuda_runtime() -> None:
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines()]
    given = [words[-1] for words in symbols if len(words) == 8 and words[4] != "LOCAL" and words[6] != "UND"]
    assert not [name for name in given if name.startswith(("cuda", "__cuda", "_ZN7bitfold"))]


def test_build_information_agrees_with_the_file() -> None:
    assert bool(_C.build_info()["cuda"]) == LIBRARY.exists() == cuda.built()


def test_importing_starts_no_cuda() -> None:
    code = "import torch, bitfold, bitfold.ops\nprint(torch.cuda.is_initialized(), bitfold.cuda.loaded())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_loaded_when_torch_starts_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    queued, opened = [], []
    (tmp_path / "_ops_cuda.so").write_bytes(b"")
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "_ops_cuda.so")
    monkeypatch.setattr(cuda, "_loaded", False)
    monkeypatch.setattr(torch.cuda, "_lazy_call", queued.append)
    monkeypatch.setattr(torch.ops, "load_library", opened.append)
    monkeypatch.setattr(torch.version, "cuda", None)
    cuda.load_with_cuda()
    assert not queued, "a torch without CUDA never starts it"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda.load_with_cuda()
    assert not opened
    queued[0]()
    queued[0]()
    assert (opened, cuda.loaded()) == ([str(tmp_path / "_ops_cuda.so")], True)


def test_a_library_that_cannot_be_loaded_leaves_cuda_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "_ops_cuda.so").write_bytes(b"no library")
    monkeypatch.setattr(cuda, "_LIBRARY", tmp_path / "_ops_cuda.so")
    monkeypatch.setattr(cuda, "_loaded", False)
    monkeypatch.setattr(cuda, "_problem", None)
    with pytest.warns(RuntimeWarning, match="ops for GPUs cannot be loaded"):
        cuda._load()
    assert not cuda.loaded()
    assert "_ops_cuda.so" in str(cuda.problem())


def test_which_formats_are_folded_on_a_gpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.folds_on_gpu("nf4", "search")
        assert ops.folds_on_gpu("int8-tensor", "round")
        assert not ops.folds_on_gpu("int8-tensor", "search")
        assert not ops.folds_on_gpu("nf4-outliers")
        assert not ops.folds_on_gpu("kmeans2-tensor")
