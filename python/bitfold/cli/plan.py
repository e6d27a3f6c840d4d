"""Choose a format for every matrix of the checkpoint SRC so that the folded file is as small as asked.

The model is loaded in memory. With --text the loss of each choice is measured on that text (by the divergence
of the logits where that takes minutes, else by the error of each layer's outputs), without it by the error of
the weights. `bitfold quantize SRC OUT --plan FILE` carries the plan out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bitfold.cli.output import Output
from bitfold.cli.quantize import quiet_transformers, rule
from bitfold.outputs import Batch

HELP = "formats per matrix for a number of bytes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", type=Path, help="directory of the float checkpoint")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-ratio", type=float, metavar="X", help="float weight files by folded ones, at least"
    )
    target.add_argument("--target-bytes", metavar="SIZE", help="weight files, at most: 4000000, 4MB, 3.5MiB")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the plan here, as JSON")
    parser.add_argument("--text", metavar="FILE", type=Path, help="text to measure losses on, a line each")
    parser.add_argument("--sequences", type=int, default=16, help="of the text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument(
        "--sensitivity", default="auto", help="kl, output, weight or auto (default: %(default)s)"
    )
    parser.add_argument("--min-bits", type=int, default=2)
    parser.add_argument("--max-bits", type=int, default=8)
    parser.add_argument(
        "--candidate",
        action="append",
        metavar="FORMAT",
        help="a format to choose from, instead of the usual ones",
    )
    parser.add_argument("--embeddings", default="auto", metavar="FORMAT", help="auto, a format, or none")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave in float")
    parser.add_argument("--rule", action="append", default=[], metavar="REGEX=FORMAT", help="fix a format")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files that came with SRC"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Load, measure, choose, print."""
    import bitfold
    from bitfold.io.shards import parse_size

    quiet_transformers()
    rules = dict(rule(text) for text in options.rule)
    target = None if options.target_bytes is None else parse_size(options.target_bytes)
    model = load_float(options.source, options.trust_remote_code)
    data = None
    if options.text is not None:
        data = text_batches(options.text, options.source, model, options.sequences, options.length)
    made = bitfold.plan(
        model,
        options.target_ratio,
        target_bytes=target,
        min_bits=options.min_bits,
        max_bits=options.max_bits,
        formats=options.candidate,
        calibration=data,
        sensitivity=options.sensitivity,
        embeddings=None if options.embeddings.lower() == "none" else options.embeddings,
        skip=options.skip,
        rules=rules,
        progress=not options.quiet and not options.json,
    )
    output.text(made)
    if options.out is not None:
        from bitfold.io.atomic import atomic_file

        with atomic_file(options.out) as temporary:
            Path(temporary).write_text(made.to_json() + "\n", encoding="utf-8")
        output.text(f"{options.out}: written")
    return output.result(
        {
            "source": str(options.source),
            "out": None if options.out is None else str(options.out),
            "formats": {name: str(fmt) for name, fmt in made.items()},
            "file_bytes": made.file_bytes,
            "float_file_bytes": made.float_file_bytes,
            "ratio": made.ratio,
            "next_ratio": list(made.next_ratio),
            "bits_per_weight": made.bits_per_weight,
            "measure": made.measure,
            "notes": list(made.notes),
        }
    )


def load_float(directory: Path, trust_remote_code: bool) -> Any:
    """The model of a float checkpoint, in the class and dtype that it was saved in."""
    from bitfold.hf.meta_model import model_class, read_config

    read_config(directory)  # names what is missing
    cls = model_class(directory, trust_remote_code)
    options = {"trust_remote_code": True} if trust_remote_code else {}
    return cls.from_pretrained(directory, dtype="auto", **options).eval()


def text_batches(file: Path, directory: Path, model: Any, sequences: int, length: int) -> list[Batch]:
    """Batches of the text in `file`: of a causal model pieces of the whole, else a line each, four at a time.

    Raises ValueError where the file has no text, FileNotFoundError where it is not there.
    """
    from bitfold.calibration.batches import as_batches
    from bitfold.calibration.settings import Settings

    text = file.read_text(encoding="utf-8")
    if not text.strip():
        msg = f"{file}: no text to measure on; expected a line that is not empty"
        raise ValueError(msg)
    whole = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    lines = [text] if whole else [line for line in text.splitlines() if line.strip()][:sequences]
    settings = Settings(batch_size=1 if whole else 4, sequence_length=length, pack=whole)
    return as_batches(lines, model, str(directory), settings)[:sequences]
