"""What folding costs a causal language model: perplexity, mean KL to the float model, top-1 agreement.

All Linear layers but the head, embeddings float; the text is cut in windows of `--window` tokens. Mean KL and
top-1 agreement are the figures to go by: perplexity of a small model hardly moves. Calibrated rows use the
calibration text, the others none; bitsandbytes and HQQ, where installed, stand in the same run, dequantized
into the same model. Perplexity is of this tokenizer and these windows, and comparable to nothing else.

    python benchmarks/perplexity.py MODEL_DIR [--calibration FILE] [--text FILE] [--rows REGEX]

MODEL_DIR holds a model and tokenizer as transformers saves them, and, unless given otherwise,
`calibration.txt` and `validation.txt`. Without MODEL_DIR a small random model and random text stand in, which
shows that the script runs and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import arguments, environment, environment_line, print_table, write_json
from torch import Tensor, nn

import bitfold

HEAD = ["method", "format", "bits", "perplexity", "mean KL", "top-1", "seconds"]


@dataclass
class Case:
    """A row: how to quantize a copy of the model in place; returns bits per weight."""

    method: str
    format: str
    apply: Callable[[nn.Module, list[Tensor]], float]


def ours(method: str, fmt: str) -> Case:
    """bitfold."""

    def apply(model: nn.Module, calibration: list[Tensor]) -> float:
        data: dict[str, Any] = {}
        if method in ("gptq", "awq", "awq+gptq", "learned"):
            data = {"calibration": calibration, "checkpoint": False}
        bitfold.quantize(model, fmt, embeddings=None, skip=["lm_head"], method=method, progress=False, **data)
        folded = [m for m in model.modules() if isinstance(m, bitfold.nn.QuantLinear)]
        weights = sum(m.in_features * m.out_features for m in folded)
        return 8 * sum(m.packed_nbytes() for m in folded) / weights

    return Case(f"bitfold {method}", fmt, apply)


def bitsandbytes_nf4() -> Case:
    """bitsandbytes' NF4 with double quantization."""

    def apply(model: nn.Module, _: list[Tensor]) -> float:
        from bitsandbytes import functional

        for linear in _linears(model):
            packed, state = functional.quantize_4bit(
                linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
            )
            linear.weight.data = functional.dequantize_4bit(packed, state).to(linear.weight.dtype)
        return 4 + 8 / 64 + 32 / (64 * 256)

    return Case("bitsandbytes", "nf4", apply)


def hqq(bits: int, group: int = 64) -> Case:
    """The hqq package's own solver; fp16 scale and zero point per group."""

    def apply(model: nn.Module, _: list[Tensor]) -> float:
        from hqq.core.quantize import Quantizer

        for linear in _linears(model):
            packed, meta = Quantizer.quantize(
                linear.weight.data, nbits=bits, group_size=group, axis=1, device="cpu",
                compute_dtype=torch.float32,
            )  # fmt: skip
            linear.weight.data = Quantizer.dequantize(packed, meta).reshape(linear.weight.shape).float()
        return bits + 32 / group

    return Case("hqq package", f"int{bits} g{group}", apply)


CASES = [
    bitsandbytes_nf4(),
    *(hqq(bits) for bits in (4, 3, 2)),
    *(ours("round", fmt) for fmt in ("int4-g128", "int3-g64", "int2-g64-zp")),
    *(ours("search", fmt) for fmt in ("nf4", "int4-g128", "int3-g64", "int2-g64")),
    *(ours("hqq", fmt) for fmt in ("int4-g64-fz", "int3-g64-fz", "int2-g64-fz")),
    *(ours("awq", fmt) for fmt in ("int4-g128", "int3-g64")),
    *(ours("gptq", fmt) for fmt in ("nf4", "int4-g128", "int3-g64", "int2-g64", "int3-g64-outliers")),
    *(ours("awq+gptq", fmt) for fmt in ("int4-g128", "int3-g64", "int2-g64")),
    *(ours("learned", fmt) for fmt in ("int3-g64", "int2-g64")),
]


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            yield module


def windows(ids: Tensor, length: int, most: int | None) -> list[Tensor]:
    """Ids [tokens] in batches of eight windows [8, length]."""
    rows = ids[: len(ids) // length * length].view(-1, length)[:most]
    if not len(rows):
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return list(rows.split(8))


@torch.inference_mode()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Ids [rows, tokens] -> [rows, tokens, vocabulary]."""
    return model(input_ids=ids).logits.float().log_softmax(-1)


@torch.inference_mode()
def evaluate(model: nn.Module, text: list[Tensor], reference: list[Tensor] | None) -> dict[str, float]:
    """Perplexity, and mean KL (nats per token) and top-1 agreement to `reference`, the log-probabilities."""
    loss = kl = same = tokens = predicted = 0.0
    for number, ids in enumerate(text):
        logits = log_probabilities(model, ids)
        loss -= float(logits[:, :-1].gather(-1, ids[:, 1:, None]).double().sum())
        predicted += ids[:, 1:].numel()
        tokens += ids.numel()
        if reference is not None:
            wanted = reference[number]
            kl += float((wanted.exp() * (wanted - logits)).sum(-1).double().sum())
            same += float((wanted.argmax(-1) == logits.argmax(-1)).sum())
    found = {"perplexity": math.exp(loss / predicted)}
    return found if reference is None else found | {"kl": kl / tokens, "top1": same / tokens}


def load(options: argparse.Namespace) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Model, calibration and evaluation windows."""
    if options.model is None or options.smoke:
        return stand_in()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def ids(path: Path) -> Tensor:
        return tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]

    calibration = windows(
        ids(options.calibration or options.model / "calibration.txt"), options.window, options.calibrated
    )
    text = windows(ids(options.text or options.model / "validation.txt"), options.window, options.most)
    return model, calibration, text


def stand_in() -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A random model of two blocks and random text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    text = torch.randint(0, 256, (40, 32))
    return model, list(text[:32].split(8)), list(text[32:].split(8))


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory of a causal language model")
    parser.add_argument("--calibration", type=Path, help="text (default: calibration.txt beside the model)")
    parser.add_argument("--text", type=Path, help="text to evaluate on (default: validation.txt)")
    parser.add_argument("--window", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--calibrated", type=int, help="windows to calibrate on at most")
    parser.add_argument("--most", type=int, help="windows to evaluate at most")
    parser.add_argument("--rows", default="", help="regular expression for `method format`")
    options = parser.parse_args(argv)
    model, calibration, text = load(options)
    reference = [log_probabilities(model, ids) for ids in text]
    rows = [{"method": "fp32", "format": "", "bits": 32.0, **evaluate(model, text, None)}]
    for case in CASES:
        if not re.search(options.rows, f"{case.method} {case.format}"):
            continue
        changed = copy.deepcopy(model)
        start = time.perf_counter()
        try:
            bits = case.apply(changed, calibration)
        except ImportError as error:
            print(f"{case.method}: left out ({error})")
            continue
        seconds = time.perf_counter() - start
        found = evaluate(changed, text, reference)
        rows.append({"method": case.method, "format": case.format, "bits": bits, **found, "seconds": seconds})
        print(f"{case.method} {case.format}: KL {found['kl']:.5f}, {seconds:.0f} s", flush=True)
    env = environment()
    tokens = sum(ids.numel() for ids in text)
    calibrated = sum(ids.numel() for ids in calibration)
    print_table(
        f"{tokens:,} tokens in windows of {text[0].shape[1]}, calibrated on {calibrated:,}",
        HEAD,
        [
            [
                row["method"], row["format"], f"{row['bits']:.3f}", f"{row['perplexity']:.3f}",
                f"{row['kl']:.5f}" if "kl" in row else "", f"{row['top1']:.4f}" if "top1" in row else "",
                f"{row['seconds']:.1f}" if "seconds" in row else "",
            ]
            for row in rows
        ],
        environment_line(env),
    )  # fmt: skip
    name = "perplexity" if options.model is None or options.smoke else f"perplexity-{options.model.name}"
    write_json(options.out, name, {"environment": env, "tokens": tokens, "rows": rows})


if __name__ == "__main__":
    main()
