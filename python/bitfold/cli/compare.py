"""Run the float checkpoint SRC and the folded one on the same text, and show how far each layer is off."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitfold.cli.output import Output
from bitfold.cli.plan import load_float, text_batches
from bitfold.cli.quantize import quiet_transformers

HELP = "how far a folded checkpoint is from the float one, layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", type=Path, help="directory of the float checkpoint")
    parser.add_argument("folded", metavar="FOLDED", type=Path, help="directory of the folded one")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, required=True, help="text to run on, a line each"
    )
    parser.add_argument("--sequences", type=int, default=16, help="of the text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default: %(default)s)")
    parser.add_argument("--no-layers", action="store_true", help="compare what comes out at the end only")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files that came with SRC"
    )


def run(options: argparse.Namespace, output: Output) -> int:
    """Load both, run, print."""
    import bitfold

    quiet_transformers()
    model = load_float(options.source, options.trust_remote_code)
    folded = bitfold.load(options.folded, trust_remote_code=options.trust_remote_code)
    data = text_batches(options.text, options.source, model, options.sequences, options.length)
    found = bitfold.compare(model, folded, data, per_layer=not options.no_layers)
    output.text(found)
    return output.result({"source": str(options.source), "folded": str(options.folded), **found.to_dict()})
