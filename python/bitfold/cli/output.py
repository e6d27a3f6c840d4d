"""What the commands print: text or JSON on stdout, progress on stderr; rich or tqdm where there are any."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Output", "human_bytes"]

Advance = Callable[[str, int, int], None]


class Output:
    """Where one command prints to.

    Args:
        command: its name, which goes into the JSON object.
        json_mode: one JSON object on stdout, and no text.
        quiet: no progress bar.
    """

    def __init__(self, command: str, json_mode: bool = False, quiet: bool = False) -> None:
        self.command = command
        self.json_mode = json_mode
        self.quiet = quiet

    def text(self, line: object = "") -> None:
        """A line for people; nothing under ``--json``."""
        if not self.json_mode:
            print(line, flush=True)

    def warning(self, line: str) -> None:
        """A line on stderr."""
        print(f"bitfold {self.command}: warning: {line}", file=sys.stderr, flush=True)

    def result(self, result: dict[str, Any], status: int = 0) -> int:
        """The outcome as JSON, if JSON was asked for; returns `status`."""
        if self.json_mode:
            print(json.dumps({"command": self.command, "exit_status": status, **_finite(result)}, indent=2))
        return status

    def failure(self, message: str, status: int) -> int:
        """A failure in words: on stderr, and in the JSON object."""
        print(f"bitfold {self.command}: {message}", file=sys.stderr, flush=True)
        return self.result({"error": {"message": message}}, status)

    def error(self, error: BaseException, status: int, advice: str = "") -> int:
        """A failure by exception."""
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is None and len(error.args) == 2:
            message = str(error.args[1])
        text = f"{message}; {advice}" if advice else message
        print(f"bitfold {self.command}: error: {text}", file=sys.stderr, flush=True)
        return self.result({"error": {"type": type(error).__name__, "message": message}}, status)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        """A bar over `total` bytes; gives a function that takes (what is done, bytes done, bytes in all)."""
        if self.quiet or not sys.stderr.isatty():
            yield _no_bar
            return
        try:
            manager = _rich_bar(title, total)
        except ImportError:
            try:
                manager = _tqdm_bar(title, total)
            except ImportError:
                manager = contextlib.nullcontext(_no_bar)
        with manager as advance:
            yield advance


def _no_bar(name: str, done: int, total: int) -> None:
    """Where there is no terminal, or nothing to draw with."""
    del name, done, total


def _rich_bar(title: str, total: int) -> contextlib.AbstractContextManager[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def bar() -> Iterator[Advance]:
        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
        name_column = TextColumn("{task.fields[name]}", style="dim")
        with Progress(*columns, name_column, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(title, total=total, name="")

            def advance(name: str, done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, name=name)

            yield advance

    return bar()


def _tqdm_bar(title: str, total: int) -> contextlib.AbstractContextManager[Advance]:
    from tqdm import tqdm

    @contextlib.contextmanager
    def bar() -> Iterator[Advance]:
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, leave=False) as progress:

            def advance(name: str, done: int, total: int) -> None:
                progress.total = total
                progress.set_postfix_str(name, refresh=False)
                progress.update(done - progress.n)

            yield advance

    return bar()


def human_bytes(count: float) -> str:
    """``"17.16 MiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
