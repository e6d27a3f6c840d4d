"""A bar over a known number of things, where tqdm is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]  # called with the name of each thing that is done


@contextmanager
def progress_bar(total: int, title: str, unit: str, shown: bool = True) -> Iterator[Advance]:
    """Show a bar on stderr, if a terminal or notebook, while the context lasts; gives what advances it."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda name: None  # noqa: ARG005
        return
    # None: off where stderr is no terminal. The streams of notebooks say that they are none either.
    notebook = type(sys.stderr).__module__.startswith("ipykernel")
    with tqdm(total=total, desc=title, unit=unit, disable=False if notebook else None) as bar:

        def advance(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield advance
