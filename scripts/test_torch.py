"""Run one built bitfold under several torches: `python scripts/test_torch.py 2.11.0 2.13.0 2.15.0`.

With `--build`, compile it against the headers of each, for the CPU and one GPU architecture, and run that.

Each torch is unpacked without its requirements into a cache outside the repository and put in front of the
interpreter's own, so the binaries under test are the very same files. torch from the index is a CUDA build
that wants a dozen NVIDIA libraries at import, GPU or not; they are fetched one by one as the loader names
them, each version once: torches share those that they state alike or not at all.

The interpreter that runs this must have bitfold and pytest (bitfold installed, or PYTHONPATH=python after
`make dev`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfold" / "torch"

# Library that the loader misses -> package that holds it (names since CUDA 13).
NVIDIA_PACKAGES = {
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
    "libcudart": "nvidia-cuda-runtime",
    "libcudnn": "nvidia-cudnn-cu13",
    "libcufft": "nvidia-cufft",
    "libcufile": "nvidia-cufile",
    "libcupti": "nvidia-cuda-cupti",
    "libcurand": "nvidia-curand",
    "libcusolver": "nvidia-cusolver",
    "libcusparse": "nvidia-cusparse",
    "libcusparseLt": "nvidia-cusparselt-cu13",
    "libnccl": "nvidia-nccl-cu13",
    "libnvJitLink": "nvidia-nvjitlink",
    "libnvToolsExt": "nvidia-nvtx",
    "libnvrtc": "nvidia-cuda-nvrtc",
    "libnvshmem_host": "nvidia-nvshmem-cu13",
}

SMOKE_TEST = """
import torch, bitfold
from bitfold import ops
print("torch", torch.__version__, "bitfold", bitfold.__version__, "from", bitfold.__file__)
torch.manual_seed(0)
weight, x = torch.randn(48, 200), torch.randn(3, 200)
for text in ("nf4", "nf4-nodq", "int8-row", "int4-g64"):
    fmt = bitfold.Format(text)
    packed = ops.quantize(weight, fmt)
    dense = ops.dequantize(packed, fmt, weight.shape)
    y = ops.linear(x, packed, fmt.spec(tuple(weight.shape)))
    exact = x.double() @ dense.double().T
    error = float((y - exact).norm() / exact.norm())
    assert error < 2e-4, f"{text}: relative error {error:.1e}"  # the bound of docs/kernels.md for float32
    print(f"  {text:10s} ok, relative error {error:.1e}")
"""


def pip_install(target: Path, *requirements: str, env: dict[str, str] | None = None) -> None:
    target.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        target,
        *requirements,
    ]
    subprocess.run(command, env=env, check=True)


def environment(folder: Path | None, nvidia: Path) -> dict[str, str]:
    """The variables under which `import torch` finds the torch in `folder` (None: the interpreter's own)."""
    env = dict(os.environ)
    if folder is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), env.get("PYTHONPATH")]))
        packages = sorted({nvidia / required_version(folder, name) for name in NVIDIA_PACKAGES.values()})
        libraries = [str(path) for package in packages for path in sorted(package.glob("nvidia/*/lib"))]
        env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    return env


def torch_error(folder: Path | None, nvidia: Path) -> str:
    """What `import torch` dies of, or an empty string."""
    command = [sys.executable, "-c", "import torch"]
    result = subprocess.run(
        command, env=environment(folder, nvidia), capture_output=True, text=True, check=False
    )
    return result.stderr.strip() if result.returncode else ""


def required_version(folder: Path, package: str) -> str:
    """The requirement as this torch states it, e.g. `nvidia-nccl-cu13==2.28.9`; unpinned if indirect."""
    for distribution in importlib.metadata.distributions(path=[str(folder)]):
        for requirement in distribution.requires or ():
            match = re.match(rf"{package}\s*==\s*([\w.]+)", requirement)
            if match:
                return f"{package}=={match[1]}"
    return package


def prepare(version: str, cache: Path) -> Path | None:
    """Make torch `version` importable. Returns its folder; None if it is the interpreter's own."""
    if importlib.metadata.version("torch").split("+")[0] == version:
        return None
    folder, nvidia = cache / version, cache / "nvidia"
    if not (folder / "torch").is_dir():
        print(f"fetching torch {version} into {folder}", flush=True)
        pip_install(folder, f"torch=={version}")
    tried: set[str] = set()
    while error := torch_error(folder, nvidia):
        missing = re.search(r"(lib\w+)\.so[.\d]*: cannot open shared object", error)
        package = NVIDIA_PACKAGES.get(missing[1]) if missing else None
        if package is None or package in tried:
            raise SystemExit(f"torch {version} in {folder} cannot be imported:\n{error}")
        tried.add(package)
        requirement = required_version(folder, package)
        print(
            f"torch {version} wants {missing[0].split(':')[0] if missing else ''}: fetching {requirement}",
            flush=True,
        )
        # A folder each, because --target does not merge namespace packages.
        pip_install(nvidia / requirement, requirement)
    return folder


def build(target: Path, env: dict[str, str]) -> dict[str, str]:
    """Compile bitfold against the torch of `env` into `target`; variables under which it is found there."""
    architecture = os.environ.get("BITFOLD_CUDA_ARCHITECTURES", "90a-real")
    with_architecture = {**env, "BITFOLD_CUDA_ARCHITECTURES": architecture}
    pip_install(target, "--no-build-isolation", "--upgrade", str(ROOT), env=with_architecture)
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, [str(target), env.get("PYTHONPATH")]))}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION", help="torch version, e.g. 2.11.0")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where torches are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--tests", nargs="*", default=["tests/python/nn"], help="test files to run under each"
    )
    parser.add_argument(
        "--build", action="store_true", help="compile against each torch (needs scikit-build-core, pybind11)"
    )
    options = parser.parse_args()
    failed = []
    for version in options.versions:
        folder = prepare(version, options.cache)
        env = environment(folder, options.cache / "nvidia")
        if options.build:
            env = build(options.cache / "bitfold" / version, env)
        commands = [[sys.executable, "-c", SMOKE_TEST]]
        if options.tests:
            commands.append([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests])
        if any(subprocess.run(command, env=env, cwd=ROOT, check=False).returncode for command in commands):
            failed.append(version)
    print("torch versions:", ", ".join(f"{v} {'FAILED' if v in failed else 'ok'}" for v in options.versions))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
