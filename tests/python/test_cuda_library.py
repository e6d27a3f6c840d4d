"""`_ops_cuda`: what it asks of the loader, and when it is loaded. No GPU is needed here."""

from __future__ import annotations

import json
import shlex
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


with_nvcc = pytest.mark.skipif(
    None in map(shutil.which, ("cmake", "ninja", "nvcc")), reason="no cmake, ninja or nvcc"
)


def configure(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    defined = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-S", root, "-B", folder, "-G", "Ninja", *defined]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@with_nvcc
def test_a_list_of_architectures_is_one_definition(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    done = configure(
        tmp_path,
        CMAKE_EXPORT_COMPILE_COMMANDS="ON",
        BITFOLD_BUILD_PYTHON="ON",
        BITFOLD_CUDA="ON",
        BITFOLD_CUDA_ARCHITECTURES="80-real;90a-real",
        Python_EXECUTABLE=sys.executable,
    )
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    command = next(entry["command"] for entry in commands if entry["file"].endswith("python/module.cc"))
    assert '-DBITFOLD_CUDA_BUILT="80-real,90a-real"' in shlex.split(command)


@with_nvcc
@pytest.mark.parametrize("asked", ["75", "80-real;75-real", "all", "native"])
def test_architectures_without_what_the_kernels_use_are_refused(tmp_path: Path, asked: str) -> None:
    pytest.importorskip("pybind11")
    if asked == "native" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    options = {"BITFOLD_BUILD_PYTHON": "ON", "Python_EXECUTABLE": sys.executable}
    done = configure(tmp_path, BITFOLD_CUDA="ON", BITFOLD_CUDA_ARCHITECTURES=asked, **options)
    assert done.returncode != 0
    old = {"80-real;75-real": "75-real", "native": "none, since there is no GPU here"}.get(asked, asked)
    sentence = (
        f"ARCHITECTURES={asked} asks for {old}; _ops_cuda can be compiled for numbers from 80 (Ampere) on"
    )
    assert sentence in " ".join(done.stderr.split())


@built
def test_gives_away_no_symbol_of_its_cuda_runtime() -> None:
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines()]
    given = [words[-1] for words in symbols if len(words) == 8 and words[4] != "LOCAL" and words[6] != "UND"]
    assert not [name for name in given if name.startswith(("cuda", "__cuda", "_ZN7bitfold"))]


# CUDA kernels with tensors of the CPU: as where only a later or optional tensor is on a GPU, an op
# comes there and must say so before it asks for a device.
_CALLS = """
import ctypes, sys
import torch

if sys.argv[2:]:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
import bitfold
from bitfold import ops

torch.ops.load_library(sys.argv[1])
fmt, shape = bitfold.Format("int4-g32"), (4, 64)
spec = fmt.spec(shape)
weight, eye, x, mask = torch.randn(shape), torch.eye(64), torch.randn(3, 64), torch.ones(3, dtype=torch.bool)
exact, packed, ones = torch.zeros(shape, dtype=torch.uint8), ops.quantize(weight, fmt), torch.ones(64)
calls = {
    "hessian_update": (eye, x, mask, 0),
    "hessian_finish": (eye,),
    "cross_update": (eye, x, x, mask, 0),
    "gptq_quantize": (weight, eye, spec, 0, 0.01, 0, False, 0, 0, eye, 1.0, exact, 64, False),
    "refit_scales": (packed, spec, weight, eye, 0.01, 1),
    "hqq_solve": (weight, bitfold.Format("int4-g32-fz").spec(shape), 0.7, 10.0, 1.01, 10),
    "awq_scale": ([weight], spec, [1], [eye], [torch.arange(64)], [ones], [3], 64),
    "awq_clip": (weight, eye, spec, 1, exact),
    "linear": (x, packed, spec, None, 0),
    "dequantize": (packed, spec, torch.float32),
    "quantize": (weight, spec, 0),
}
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for name, arguments in calls.items():
    try:
        getattr(torch.ops.bitfold, name).default.redispatch(cuda, *arguments)
    except RuntimeError as error:
        print(name, "|", str(error).splitlines()[0])
    else:
        print(name, "| no error")
"""


def torch_cuda(folder: Path) -> list[str]:
    """Next to a CPU build of torch, a library of the name that `_ops_cuda` needs, with nothing behind it."""
    if torch.version.cuda is not None:
        return []
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    names = ["aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_mm_out", "aoti_torch_cuda_addmm_out"]
    source, library = folder / "stub.cc", folder / "libtorch_cuda.so"
    source.write_text("".join(f'extern "C" int {name}() {{ return 1; }}\n' for name in names))
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return [str(library)]


@built
def test_tensors_elsewhere_are_named_before_a_device_is_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CALLS, str(LIBRARY), *torch_cuda(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert set(found) >= {"hessian_update", "cross_update", "gptq_quantize", "refit_scales", "awq_clip"}
    for op, error in found.items():
        assert error.startswith(f"bitfold::{op}: "), error
        assert " must be a" in error, error
        assert "CUDA tensor" in error, error


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
