"""Check that an export is what it promises.

Every tensor must be there, of the right size, and finite; the bytes on disk by class must come to at least
0.8 of the ratio that the formats promise; the model must load and run in a fresh process. With --against,
weights and logits (embeddings for encoders) are compared with those of the source, which needs a directory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitfold.cli.output import Output

HELP = "reopen an export in a fresh process and check all of it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="DIR|FILE", type=Path)
    parser.add_argument("--against", metavar="SRC", type=Path, help="the float checkpoint it was made from")
    parser.add_argument(
        "--min-cosine", type=float, metavar="X", help="fail where outputs are less alike than this"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python files that came with it")


def run(options: argparse.Namespace, output: Output) -> int:
    """Verify and print; 1 where something is wrong."""
    from bitfold.errors import PackedDataError
    from bitfold.hf.verifying import verify

    if options.min_cosine is not None and options.against is None:
        msg = "--min-cosine compares outputs with those of a source: name it with --against SRC"
        raise ValueError(msg)
    try:
        found = verify(
            options.path,
            options.against,
            min_cosine=options.min_cosine,
            trust_remote_code=options.trust_remote_code,
        )
    except PackedDataError as error:  # too damaged to be opened at all
        output.text(f"problem: {error}")
        output.text(f"{options.path}: FAILED")
        return output.result(
            {"path": str(options.path), "passed": False, "problems": [{"found": str(error)}]}, 1
        )
    output.text(found.summary)
    for name, promised in found.promised.items():
        output.text(f"{name}: ratio promised {promised:.2f}, found {found.real[name]:.2f}")
    for name, value in found.comparison.items():
        output.text(f"{name.replace('_', ' ')}: {value if isinstance(value, str | int) else f'{value:.4f}'}")
    for note in found.notes:
        output.text(f"note: {note}")
    for problem in found.problems:
        output.text(f"problem: {problem}")
    output.text(f"{found.path}: {'ok' if found.passed else f'FAILED, {len(found.problems)} problems'}")
    return output.result(found.to_dict(), 0 if found.passed else 1)
