"""Show what a checkpoint is made of, by class of tensor. Reads config and headers only; loads no tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitfold.cli.output import Output, human_bytes

HELP = "bytes by class of tensor, from the headers alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("path", metavar="DIR|FILE", type=Path)


def run(options: argparse.Namespace, output: Output) -> int:
    """Read and print."""
    from bitfold.inspecting import inspect

    found = inspect(options.path)
    files = sum(found.files.values())
    output.text(
        f"{found.path}: {found.model or 'plain torch file'}, {'folded' if found.manifest else 'not folded'}"
    )
    output.text(found.summary)
    output.text(f"weight files: {len(found.files)}, {files:,} bytes ({human_bytes(files)})")
    return output.result(found.to_dict())
