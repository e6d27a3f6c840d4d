"""Examine an installation: each question is asked by itself, and none can end the examination.

Nothing of bitfold's own is imported at the top, because the library that cannot be loaded is the usual case.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

__all__ = ["Check", "examine"]

OLDEST_TORCH = (2, 11)
# Versions that the tests run with; the API in between moves, so what lies outside is said to be untried.
OLDEST_TRANSFORMERS = (4, 57)
NEWEST_TRANSFORMERS = (5, 24)
_REBUILD = "reinstall with `pip install --force-reinstall --no-deps bitfold`, or `make dev` in a source tree"
_PACKAGE = Path(__file__).parent


@dataclass
class Check:
    """One answer. `status` is ``"ok"``, ``"warning"`` (something will not work) or ``"broken"`` (nothing
    will).
    """

    name: str
    status: str
    detail: str
    advice: str = ""


def examine() -> list[Check]:
    """Ask everything; never raises."""
    questions: list[tuple[str, Callable[[], Check], tuple[str, ...]]] = [
        ("python", _python, ()),
        ("torch", _torch, ()),
        ("native files", _native_files, ()),
        ("_C", _core_library, ()),
        ("_ops", _ops_library, ("torch",)),
        ("_ops_cuda", _cuda_library, ("torch", "_C", "_ops")),
        ("bitfold", _bitfold, ()),
        ("instruction set", _instruction_set, ("_C", "_ops")),
        ("self-test", _self_test, ("bitfold", "instruction set")),
        ("transformers", _transformers, ()),
        ("registration", _registration, ("bitfold",)),
        ("other packages", _packages, ()),
    ]
    checks: dict[str, Check] = {}
    for name, question, needs in questions:
        missing = [need for need in needs if checks[need].status == "broken"]
        if missing:
            checks[name] = Check(name, "warning", f"not examined, because {' and '.join(missing)} is broken")
        else:
            checks[name] = _ask(name, question)
    return list(checks.values())


def _ask(name: str, question: Callable[[], Check]) -> Check:
    try:
        return question()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Check(name, "broken", f"{type(error).__name__}: {error} ({where})", _REBUILD)


def _root(error: BaseException) -> str:
    """The message of what was behind an error: torch hides the loader's own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _python() -> Check:
    detail = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    return Check("python", "ok", detail)


def _bitfold() -> Check:
    import bitfold

    version = _version("bitfold")
    detail = f"{version or 'not installed, used from a source tree'}, {Path(bitfold.__file__ or '').parent}"
    problem = getattr(bitfold, "_import_error", None)
    if problem is not None:
        return Check("bitfold", "broken", f"{detail}: {type(problem).__name__}: {_root(problem)}", _REBUILD)
    return Check("bitfold", "ok", detail)


def _torch() -> Check:
    version = _version("torch")
    if version is None:
        return Check("torch", "broken", "not installed", "pip install 'torch>=2.11'")
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    device = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    threads = f"{torch.get_num_threads()} threads"
    detail = f"{torch.__version__}, {build}, {device}, {threads}, {Path(torch.__file__).parent}"
    if _numbers(torch.__version__) < OLDEST_TORCH:
        return Check("torch", "broken", detail, "bitfold's library needs torch 2.11 or newer")
    return Check("torch", "ok", detail)


def _native_files() -> Check:
    found = {path.name: path.stat().st_size for path in sorted(_PACKAGE.glob("*.so"))}
    detail = ", ".join(f"{name} ({size:,} bytes)" for name, size in found.items()) or f"none in {_PACKAGE}"
    wanted = [f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "_ops.so"]
    missing = [name for name in wanted if name not in found]
    if missing:
        advice = f"missing: {', '.join(missing)}; built for another Python, or not built; {_REBUILD}"
        return Check("native files", "broken", detail, advice)
    return Check("native files", "ok", detail)


def _core() -> ModuleType:
    """`_C`, loaded by its file, so that it can be asked even where `import bitfold` fails."""
    if "bitfold._C" in sys.modules:
        return sys.modules["bitfold._C"]
    path = _PACKAGE / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("bitfold._C", path)
    if spec is None or spec.loader is None:
        message = f"{path} cannot be loaded"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _core_library() -> Check:
    info = _core().build_info()
    detail = ", ".join(f"{key} {value}" for key, value in info.items())
    installed = _version("bitfold")
    if installed is not None and info.get("version") not in (None, installed):
        return Check(
            "_C", "warning", detail, f"the package says {installed}: a leftover of another build; {_REBUILD}"
        )
    return Check("_C", "ok", detail)


def _ops_library() -> Check:
    import torch

    path = _PACKAGE / "_ops.so"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Check("_ops", "broken", _root(error), f"built against another torch, or damaged; {_REBUILD}")
    names = ["quantize", "dequantize", "linear", "embedding", "pack_bits", "unpack_bits"]
    missing = [name for name in names if not hasattr(torch.ops.bitfold, name)]
    if missing:
        return Check("_ops", "broken", f"loaded, but without {', '.join(missing)}", _REBUILD)
    return Check("_ops", "ok", f"loaded, {path}")


def _cuda_library() -> Check:
    import torch

    path = _PACKAGE / "_ops_cuda.so"
    architectures = str(_core().build_info().get("cuda", "")).replace(";", " ")
    if not path.exists():
        detail = "not built: no ops for GPUs"
        if not torch.cuda.is_available():
            return Check("_ops_cuda", "ok", detail)
        advice = (
            "install nvcc 13 and reinstall bitfold with BITFOLD_CUDA=ON; models on the CPU work as they are"
        )
        return Check("_ops_cuda", "warning", detail, advice)
    detail = f"built for {architectures or 'unknown architectures'}"
    if not torch.cuda.is_available():
        return Check("_ops_cuda", "ok", f"{detail}; torch sees no GPU, so it is not loaded")
    torch.cuda.init()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Check("_ops_cuda", "broken", f"{detail}; {_root(error)}", _REBUILD)
    return Check("_ops_cuda", "ok", f"{detail}; loaded")


def _instruction_set() -> Check:
    import torch

    sets = _core().instruction_sets()
    forced = os.environ.get("BITFOLD_ISA")
    try:
        chosen = sets[int(torch.ops.bitfold.instruction_set())][0]
    except RuntimeError as error:
        advice = "unset BITFOLD_ISA, or set it to a set that this CPU has" if forced else _REBUILD
        return Check("instruction set", "broken", str(error).splitlines()[0], advice)
    known = ", ".join(f"{name} {'yes' if supported else 'no'}" for name, _, supported in sets)
    detail = (
        f"{chosen} is used{f' (BITFOLD_ISA={forced})' if forced else ''}; this CPU: {known}; {_cpu_name()}"
    )
    best = next(name for name, _, supported in sets if supported)
    if forced and chosen != best:
        return Check(
            "instruction set", "warning", detail, f"BITFOLD_ISA holds back {best}, which would be faster"
        )
    return Check("instruction set", "ok", detail)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{name}, {os.cpu_count()} CPUs"


def _self_test() -> Check:
    import torch

    from bitfold import ops
    from bitfold.formats import Format

    # Relative errors of a small product, with room; a wrong kernel is off by whole units.
    limits = {"fp32": 1e-5, "auto": 5e-4, "int8": 5e-2}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    x = torch.randn(3, 96, generator=generator)
    worst = dict.fromkeys(limits, 0.0)
    for name in ("nf4", "int8-row", "int4-g64", "int2-g64"):
        fmt = Format(name)
        packed = ops.quantize(weight, fmt)
        expected = x @ ops.dequantize(packed, fmt, (24, 96)).t()
        for level in limits:
            y = ops.linear(x, packed, list(fmt.spec((24, 96))), accuracy=level)
            worst[level] = max(worst[level], float((y - expected).norm() / expected.norm()))
    errors = ", ".join(f"{error:.1e} ({level})" for level, error in worst.items())
    detail = f"fold, unfold and linear in 4 formats; kernels differ from the plain product by {errors}"
    if not all(worst[level] < limit for level, limit in limits.items()):
        return Check(
            "self-test", "broken", detail, "the kernels of this CPU compute wrongly: report it with this text"
        )
    return Check("self-test", "ok", detail)


def _transformers() -> Check:
    version = _version("transformers")
    if version is None:
        detail = "not installed: plain torch models only, no quantize or verify on the command line"
        return Check("transformers", "warning", detail, "pip install 'bitfold[hf]'")
    numbers = _numbers(version)
    oldest, newest = ("{}.{}".format(*numbers) for numbers in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
    if numbers < OLDEST_TRANSFORMERS:
        advice = f"too old: bitfold needs {oldest} or newer; pip install 'transformers>={oldest}'"
        return Check("transformers", "warning", version, advice)
    if numbers > NEWEST_TRANSFORMERS:
        advice = (
            f"newer than {newest}, the newest that bitfold was tested with: use it as it is; if folding, "
            f"saving or loading fails, pip install 'transformers=={newest}.*'"
        )
        return Check("transformers", "warning", version, advice)
    return Check("transformers", "ok", version)


def _registration() -> Check:
    if _version("transformers") is None:
        return Check("registration", "ok", "nothing to register with")
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    import bitfold  # noqa: F401

    if "bitfold" in AUTO_QUANTIZER_MAPPING and "bitfold" in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return Check("registration", "ok", "transformers knows quant_method bitfold")
    advice = "folded models will not load through transformers; `import bitfold` warns with the reason"
    return Check("registration", "broken", "transformers does not know quant_method bitfold", advice)


def _packages() -> Check:
    names = ("numpy", "safetensors", "accelerate", "tokenizers", "peft", "rich", "tqdm")
    found = {name: _version(name) for name in names}
    detail = ", ".join(f"{name} {version or 'absent'}" for name, version in found.items())
    if found["numpy"] is None:
        return Check("other packages", "broken", detail, "pip install numpy")
    if found["safetensors"] is None:
        return Check("other packages", "warning", detail, "pip install safetensors, or nothing can be saved")
    return Check("other packages", "ok", detail)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    parts = version.split("+")[0].split(".")
    digits = ["".join(character for character in part if character.isdigit()) for part in parts[:2]]
    return int(digits[0] or 0), int(digits[1] or 0) if len(digits) > 1 else 0
