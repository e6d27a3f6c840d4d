"""Fold the checkpoint SRC into OUT, tensor by tensor; the model is never in memory.

SRC is a directory as save_pretrained writes it, with safetensors weights. OUT appears whole at the end or not
at all; it holds the same tensors as bitfold.quantize(model) and model.save_pretrained(OUT) would give, and
the tokenizer, generation config and code of SRC.
"""

from __future__ import annotations

import argparse
import re
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from bitfold.cli.output import Output, human_bytes

HELP = "fold a checkpoint on disk into another one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SRC", type=Path, help="directory of the float checkpoint")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to be made")
    parser.add_argument(
        "--format",
        default="nf4",
        help=f"format of linear layers (default: %(default)s): one of {_codes()}, and options such as -g128, "
        "-row, -sym, -dq (docs/format.md)",
    )
    parser.add_argument(
        "--embeddings",
        default="int8-g64",
        metavar="FORMAT",
        help="format of embeddings, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave in float: a module, or a regular expression",
    )
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="REGEX=FORMAT",
        help="format of single modules; FORMAT may be none",
    )
    parser.add_argument(
        "--plan",
        metavar="FILE",
        type=Path,
        help="formats of all matrices from a file of `bitfold plan --out`, instead of the four options above",
    )
    parser.add_argument("--method", help="how codes are chosen: round, search, …")
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="such as 500MB (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    parser.add_argument("--dry-run", action="store_true", help="predict the bytes, write nothing")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files that came with SRC"
    )


def _codes() -> str:
    try:
        from bitfold.formats import codes
    except ImportError:  # help must come even where the native library does not load
        return "nf4, int8, int4, …"
    return ", ".join(codes())


def run(options: argparse.Namespace, output: Output) -> int:
    """Predict, print, fold."""
    rules = dict(rule(text) for text in options.rule)
    import bitfold
    from bitfold.errors import CoverageError
    from bitfold.hf.streaming import check_target, fold_directory, plan_directory

    quiet_transformers()
    start = time.perf_counter()
    try:
        plan = plan_directory(
            options.source,
            options.format if options.plan is None else read_plan(options.plan),
            embeddings=_format(options.embeddings),
            skip=options.skip,
            rules=rules,
            method=options.method,
            max_shard_size=options.max_shard_size,
            trust_remote_code=options.trust_remote_code,
        )
    except CoverageError as error:
        message = f"{error}\n{_skip_options(str(error))}"
        raise CoverageError(message) from None
    if not options.dry_run:
        check_target(plan, options.out, options.overwrite)
    summary = bitfold.summary(plan.model)
    output.text(summary)
    output.text(
        f"weight files: {human_bytes(plan.source_bytes)} -> {plan.weights_bytes:,} bytes "
        f"({human_bytes(plan.weights_bytes)}), {plan.ratio:.2f}x smaller"
    )
    if plan.unused:
        names = ", ".join(plan.unused[:5])
        output.warning(f"{len(plan.unused)} tensors have no place in the model and are left out: {names}")
    result: dict[str, Any] = {
        "source": str(options.source),
        "out": str(options.out),
        "source_bytes": plan.source_bytes,
        "predicted_bytes": plan.weights_bytes,
        "ratio": plan.ratio,
        "left_out": plan.unused,
        "summary": summary.to_dict(),
    }
    if options.dry_run:
        output.text("dry run: nothing was written")
        return output.result({**result, "written_bytes": 0})
    with output.progress("folding", plan.source_bytes) as advance:
        written = fold_directory(plan, options.out, overwrite=options.overwrite, progress=advance)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    output.text(f"{options.out}: written in {seconds:.1f} s, at most {human_bytes(peak)} of memory resident")
    return output.result(
        {**result, "written_bytes": written, "seconds": seconds, "peak_resident_bytes": peak}
    )


def read_plan(file: Path) -> Any:
    """The Plan in a file of `bitfold plan --out`."""
    from bitfold.planning import Plan

    try:
        return Plan.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{file}: no such file; expected one that `bitfold plan --out` wrote"
        raise FileNotFoundError(msg) from None
    except ValueError as error:
        msg = f"{file}: {error}"
        raise ValueError(msg) from error


def _format(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _skip_options(message: str) -> str:
    """The names that a CoverageError lists for Python, ready to paste into a shell."""
    names = re.findall(r'^ +r?"(.*)",$', message, flags=re.MULTILINE)
    return "or here: " + " ".join(f"--skip {shlex.quote(name)}" for name in names)


def rule(text: str) -> tuple[str, str | None]:
    """The two sides of `--rule REGEX=FORMAT`."""
    pattern, separator, fmt = text.rpartition("=")  # a regular expression may hold a '=', a format cannot
    if not separator or not pattern or not fmt:
        message = f"--rule {text!r}: expected REGEX=FORMAT, such as '.*down_proj=int8-g64' or 'lm_head=none'"
        raise ValueError(message)
    return pattern, _format(fmt)


def quiet_transformers() -> None:
    """Keep transformers' advice about training and its own bars out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
