"""onnxruntime's MatMulNBits: symmetric int4, blocks of 32, activations rounded to int8 (its level 4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from harness import cold_copies
from onnx import TensorProto, helper

from peers.base import NotMeasured, Peer

BLOCK = 32
INT8_ACTIVATIONS = 4  # its name for that accuracy level


def model_of(codes: np.ndarray, scales: np.ndarray, n: int, k: int) -> bytes:
    """An ONNX model of one MatMulNBits: codes [n, k/32, 16] uint8, scales [n * k/32] float32."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])]
    weights = [
        helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True),
        helper.make_tensor("scales", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
    ]
    attributes = {"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": INT8_ACTIVATIONS}
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph([node], "linear", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


@cache
def share_threads(threads: int) -> None:
    """One pool for all sessions: a pool of its own for each cold copy would be hundreds of threads."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def session_of(model: bytes, threads: int) -> Any:
    share_threads(threads)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def matmul_nbits(name: str, weight: torch.Tensor, threads: int) -> Peer:
    n, k = weight.shape
    if k % BLOCK:
        raise NotMeasured(f"takes only multiples of {BLOCK} columns")
    if n * k * 2 // 3 > 2**30:
        raise NotMeasured("left out for a weight of this size: every copy is a session of its own")
    blocks = weight.view(n, k // BLOCK, BLOCK)
    scales = (blocks.abs().amax(-1) / 7).clamp(min=1e-9)
    codes = torch.round(blocks / scales[..., None]).clamp(-8, 7) + 8
    stands_for = ((codes - 8) * scales[..., None]).view(n, k)
    codes = codes.to(torch.uint8)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).numpy()  # the first code in the low bits
    model = model_of(packed, scales.reshape(-1).numpy(), n, k)
    nbytes = packed.nbytes + scales.numel() * 4
    sessions = [session_of(model, threads) for _ in range(cold_copies(nbytes))]

    def bind(x: torch.Tensor) -> Callable[[int], torch.Tensor]:
        # Input and output stay where they are, as in a model whose layers follow one another.
        given = onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy())
        result = np.empty((len(x), n), np.float32)
        places = []
        for session in sessions:
            place = session.io_binding()
            place.bind_ortvalue_input("x", given)
            place.bind_output("y", "cpu", 0, np.float32, result.shape, result.ctypes.data)
            places.append((session, place))
        seen = torch.from_numpy(result)

        def call(i: int) -> torch.Tensor:
            session, place = places[i % len(places)]
            session.run_with_iobinding(place)
            return seen

        return call

    return Peer(name, torch.float32, True, nbytes, stands_for, bind)


PEERS = {"onnxruntime int4 g32, int8 x": matmul_nbits}
