"""The command line: ``bitfold plan | quantize | compare | inspect | verify | doctor``.

Also as ``python -m bitfold``. Results go to stdout (with ``--json`` exactly one JSON object), progress and
warnings to stderr. Exit status:

====  ==============================================================================================
0     done; verify: the export is what it promises; doctor: all well
1     verify found problems, or doctor found something broken
2     the command is wrong: an unknown option, format or pattern, an output that may not be replaced,
      float weights that nothing covers and nothing names, a budget that no plan can meet
3     the input is wrong: nothing there, damaged or incomplete files, pickles, NaN in a weight
4     the system refused: disk full, no permission
5     bitfold itself, or a package that the command needs, cannot be imported; ``bitfold doctor`` says why
130   interrupted
====  ==============================================================================================
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

import bitfold
from bitfold.cli import compare, doctor, inspect, plan, quantize, verify
from bitfold.cli.output import Output

__all__ = ["main"]

_COMMANDS: dict[str, ModuleType] = {
    "plan": plan,
    "quantize": quantize,
    "compare": compare,
    "inspect": inspect,
    "verify": verify,
    "doctor": doctor,
}
_EPILOG = (__doc__ or "").split("Exit status:")[1].replace("====  ", "").replace("=", "").strip("\n ")


def _version() -> str:
    try:
        return str(bitfold.__version__)
    except ImportError:  # `bitfold doctor` must come even where the native library does not load
        return "of unknown version"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitfold",
        description="Folds the weights of torch models into 2-8 bits, on disk, in RAM, and computed with.",
        epilog="exit status:\n" + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bitfold {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        module.add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Args:
        arguments: what follows the program's name; None takes it from the process.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    output = Output(options.command, json_mode=options.json, quiet=options.quiet)
    try:
        return int(_COMMANDS[options.command].run(options, output))
    except BrokenPipeError:  # the reader of a pipe has gone; nobody is left to be told
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return output.failure("interrupted; nothing was left half written", 130)
    except ImportError as error:
        return output.error(error, 5, "run `bitfold doctor` to see what is missing")
    except Exception as error:
        status = _status(error)
        if status is None:
            raise
        return output.error(error, status)


def _status(error: Exception) -> int | None:
    """Exit status for an error that was raised on purpose; None for one that is a fault of ours."""
    from bitfold import errors

    usage = errors.FormatError | errors.CoverageError | errors.BudgetError
    if isinstance(error, usage | FileExistsError | NotADirectoryError):
        return 2
    if isinstance(error, errors.BitfoldError | FileNotFoundError):
        return 3
    if isinstance(error, OSError):
        return 4
    return 2 if isinstance(error, ValueError) else None
