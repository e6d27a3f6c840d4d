"""Say what was built, what loads, which instructions the CPU has and which are used, and why something is
off.
"""

from __future__ import annotations

import argparse

from bitfold.cli.output import Output

HELP = "what was built, what loads, and why something is off"
_MARKS = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(options: argparse.Namespace, output: Output) -> int:  # noqa: ARG001
    """Examine and print; 1 where something is broken."""
    from bitfold.doctor import examine

    checks = examine()
    for check in checks:
        output.text(f"{_MARKS[check.status]}  {check.name}: {check.detail}")
        if check.advice:
            output.text(f"         -> {check.advice}")
    broken = [check.name for check in checks if check.status == "broken"]
    output.text(f"broken: {', '.join(broken)}" if broken else "all that was asked of this machine works")
    return output.result({"checks": [vars(check) for check in checks], "broken": broken}, 1 if broken else 0)
