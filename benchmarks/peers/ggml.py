"""llama.cpp's products through the ggml that llama-cpp-python brings: `ggml_mul_mat` on its CPU backend.

It rounds activations to int8. "repacked" is the weight in the order that llama.cpp gives it when it loads a
model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, dequantize
from harness import cold_copies

from peers.base import NotMeasured, Peer

F32 = 0
TYPES = {"Q4_0": GGMLQuantizationType.Q4_0, "Q4_K": GGMLQuantizationType.Q4_K}
BLOCKS = {"Q4_0": (32, 18), "Q4_K": (256, 144)}  # weights, bytes


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# name -> (library, result, arguments); every object of ggml is an opaque pointer here
_FUNCTIONS: dict[str, tuple[str, Any, list[Any]]] = {
    "ggml_init": ("base", c_void_p, [_InitParams]),
    "ggml_new_tensor_2d": ("base", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": ("base", c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": ("base", c_void_p, [c_void_p]),
    "ggml_build_forward_expand": ("base", None, [c_void_p, c_void_p]),
    "ggml_log_set": ("base", None, [c_void_p, c_void_p]),
    "ggml_free": ("base", None, [c_void_p]),
    "ggml_get_data": ("base", c_void_p, [c_void_p]),
    "ggml_quantize_chunk": (
        "base",
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_backend_tensor_set": ("base", None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": ("base", c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": ("base", None, [c_void_p]),
    "ggml_backend_graph_compute": ("base", c_int, [c_void_p, c_void_p]),
    "ggml_backend_get_device": ("base", c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": ("base", c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_cpu_buffer_type": ("base", c_void_p, []),
    "ggml_backend_buft_name": ("base", c_char_p, [c_void_p]),
    "ggml_backend_cpu_reg": ("cpu", c_void_p, []),
    "ggml_backend_cpu_init": ("cpu", c_void_p, []),
    "ggml_backend_cpu_set_n_threads": ("cpu", None, [c_void_p, c_int]),
}


def _load() -> Any:
    """The functions above, as attributes."""
    spec = find_spec("llama_cpp")  # not imported: it prints, and only its libraries are needed
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python", name="llama-cpp-python")
    folder = Path(spec.origin).parent / "lib"
    files = {"base": folder / "libggml-base.so", "cpu": folder / "libggml-cpu.so"}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise ImportError(f"llama-cpp-python without {', '.join(missing)}", name="llama-cpp-python's ggml")
    libraries = {name: ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL) for name, file in files.items()}

    class Ggml:
        pass

    for name, (library, result, arguments) in _FUNCTIONS.items():
        function = getattr(libraries[library], name)
        function.restype, function.argtypes = result, arguments
        setattr(Ggml, name, staticmethod(function))
    return Ggml


_ggml = _load()
_silent = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)  # it prints a line per tensor
_ggml.ggml_log_set(ctypes.cast(_silent, c_void_p), None)


def _context(tensors: int) -> int:
    """Room for the descriptions of so many tensors; their data lie in buffers."""
    return _ggml.ggml_init(_InitParams(tensors * 1024 + 2**20, None, True))


def _repacking() -> int | None:
    """The buffer type in which ggml reorders weights, where this build has one."""
    find = _ggml.ggml_backend_reg_get_proc_address(
        _ggml.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts"
    )
    if not find:
        return None
    extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(find)(
        _ggml.ggml_backend_get_device(_ggml.ggml_backend_cpu_init())
    )
    i = 0
    while extra[i]:
        if b"REPACK" in _ggml.ggml_backend_buft_name(extra[i]):
            return extra[i]
        i += 1
    return None


def quantized(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The bytes of `weight` [n, k] in ggml's type `kind`."""
    n, k = weight.shape
    weights, nbytes = BLOCKS[kind]
    stored = torch.empty(n * k // weights * nbytes, dtype=torch.uint8)
    weight = weight.contiguous()
    _ggml.ggml_quantize_chunk(TYPES[kind], weight.data_ptr(), stored.data_ptr(), 0, n, k, None)
    return stored


def mul_mat(name: str, weight: torch.Tensor, threads: int) -> Peer:
    n, k = weight.shape
    kind = name.split()[1].rstrip(",")
    if k % BLOCKS[kind][0]:
        raise NotMeasured(f"takes only multiples of {BLOCKS[kind][0]} columns")
    place = _repacking() if "repacked" in name else _ggml.ggml_backend_cpu_buffer_type()
    if place is None:
        raise NotMeasured("this build of ggml has no repacked order")
    stored = quantized(weight, kind)
    copies = cold_copies(stored.numel())
    backend = _ggml.ggml_backend_cpu_init()
    _ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    context = _context(copies)
    weights = [_ggml.ggml_new_tensor_2d(context, TYPES[kind], k, n) for _ in range(copies)]
    if not _ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, place):
        raise NotMeasured("ggml did not allocate")
    for tensor in weights:
        _ggml.ggml_backend_tensor_set(tensor, stored.data_ptr(), 0, stored.numel())
    bound: list[tuple[int, int]] = []  # the context and buffer of the last x

    def bind(x: torch.Tensor) -> Callable[[int], torch.Tensor]:
        while bound:
            old, buffer = bound.pop()
            _ggml.ggml_backend_buffer_free(buffer)
            _ggml.ggml_free(old)
        m = len(x)
        own = _ggml.ggml_init(_InitParams(copies * 2**17 + 2**20, None, True))
        given = _ggml.ggml_new_tensor_2d(own, F32, k, m)
        results, graphs = [], []
        for tensor in weights:
            results.append(_ggml.ggml_mul_mat(own, tensor, given))
            graph = _ggml.ggml_new_graph(own)
            _ggml.ggml_build_forward_expand(graph, results[-1])
            graphs.append(graph)
        bound.append(
            (
                own,
                _ggml.ggml_backend_alloc_ctx_tensors_from_buft(own, _ggml.ggml_backend_cpu_buffer_type()),
            )
        )
        x = x.contiguous()
        _ggml.ggml_backend_tensor_set(given, x.data_ptr(), 0, x.numel() * 4)
        seen = [
            torch.frombuffer(
                (ctypes.c_float * (m * n)).from_address(_ggml.ggml_get_data(r)), dtype=torch.float32
            ).view(m, n)
            for r in results
        ]

        def call(i: int) -> torch.Tensor:
            status = _ggml.ggml_backend_graph_compute(backend, graphs[i % copies])
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute: {status}")
            return seen[i % copies]

        return call

    stands_for = torch.from_numpy(dequantize(stored.numpy().reshape(n, -1), TYPES[kind]).copy()).view(n, k)
    return Peer(name, torch.float32, True, stored.numel(), stands_for, bind)


PEERS = {
    "llama.cpp Q4_K, int8 x": mul_mat,
    "llama.cpp Q4_K repacked, int8 x": mul_mat,
    "llama.cpp Q4_0, int8 x": mul_mat,
    "llama.cpp Q4_0 repacked, int8 x": mul_mat,
}
